"""Files of feature networks become folders; what is not as it should be is refused."""

import hashlib
import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sora_jax.core import digests, trees
from sora_jax.evals.features import networks, weight_folders
from sora_jax.models import i3d, i3d_exchange
from tests import conftest

TORCH = pathlib.Path(__file__).resolve().parents[2] / "oracle" / "torch_weights.py"


@pytest.fixture(scope="module")
def files(peers_python, tmp_path_factory):
    """Files as torch writes them: see tests/oracle/torch_weights.py."""
    out = tmp_path_factory.mktemp("weights")
    subprocess.run([peers_python, TORCH, out], check=True)
    return out


@pytest.fixture(scope="module")
def tensors(files):
    names = ("piergiaj", "hassony2")
    return {n: safetensors.numpy.load_file(files / f"{n}.safetensors") for n in names}


@pytest.fixture
def convert(peers_python):
    """Runs the job; returns what it says where it ends early."""

    def call(source, target, **values):
        values |= {"from": source, "out": target, "torch_python": peers_python}
        with conftest.lone_job("convert") as job:
            for name, value in values.items():
                job.FLAGS[name].value = value
                job.FLAGS[name].present = 1
            try:
                with jax.set_mesh(jax.sharding.get_mesh()):  # the job sets its own
                    job.main()
            except ValueError as error:
                return str(error)
            finally:
                assert not target.with_name(f"{target.name}.partial").exists()

    return call


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "config.json is damaged"),
        ("[" * 100_000, "config.json is damaged: maximum recursion"),
        ("[]", "config.json is damaged: it is not a JSON object"),
        ('{"kind": ["i3d"]}', "kind is .*, it must be one of"),
        ('{"kind": "i3d", "sha256": "0"}', "config.json lacks the network's config"),
        ('{"kind": "i3d", "sha256": 3, "config": {}}', "config.json lacks"),
        ('{"kind": "i3d", "sha256": "0", "config": {}}', "weights.safetensors"),
        ('{"model_type": "clip"}', "has no model.safetensors"),
        ("{}", "has no model.safetensors"),
    ],
)
def test_a_damaged_description_is_refused_in_one_sentence(tmp_path, text, message):
    digests.store(tmp_path / "config.json", text)
    with pytest.raises(weight_folders.WrongWeights, match=message) as error:
        weight_folders.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def params_of(
    loaded: weight_folders.Weights, part: str = "video"
) -> dict[str, np.ndarray]:
    return trees.flatten(nnx.to_pure_dict(nnx.state(loaded.parts[part])))


@pytest.mark.peers
@pytest.mark.parametrize("layout, eps", [("piergiaj", 1e-5), ("hassony2", 1e-3)])
def test_both_ports_files(files, tensors, convert, tmp_path, layout, eps):
    given = {"eps": eps} if layout == "piergiaj" else {}
    source = files / f"{layout}.pt"
    assert convert(source, tmp_path / "i3d", **given) is None
    loaded = weight_folders.load(tmp_path / "i3d")
    wanted = i3d_exchange.read_i3d(tensors[layout], i3d.Config())
    found = params_of(loaded)
    assert found.keys() == trees.flatten(wanted).keys()
    for name, array in trees.flatten(wanted).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert (loaded.kind, loaded.parts["video"].config.eps) == ("i3d", eps)
    description = json.loads((tmp_path / "i3d" / "config.json").read_text())
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert description["source"] == {"file": source.name, "sha256": sha256}
    content = (tmp_path / "i3d" / "weights.safetensors").read_bytes()
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.peers
def test_an_epsilon_is_required(files, convert, tmp_path):
    message = convert(files / "piergiaj.pt", tmp_path / "i3d")
    assert "two epsilons" in message and "--eps 1e-5" in message
    assert not (tmp_path / "i3d").exists()


@pytest.mark.peers
def test_tensorflows_variables(tensors, convert, tmp_path):
    params = i3d_exchange.read_i3d(tensors["piergiaj"], i3d.Config())
    flat = i3d_exchange.TF.export(params, i3d.Config())
    variables = {n: np.asarray(a) for n, a in flat.items() if "gamma" not in n}
    np.savez(tmp_path / "hub.npz", **variables)
    assert convert(tmp_path / "hub.npz", tmp_path / "i3d") is None
    loaded = weight_folders.load(tmp_path / "i3d")
    found, wanted = params_of(loaded), trees.flatten(params)
    for name, array in wanted.items():
        same = np.ones_like(array) if name.endswith(".scale") else array
        np.testing.assert_array_equal(found[name], same, err_msg=name)
    assert loaded.parts["video"].config.eps == 1e-3


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["named.pt", pytest.param("ordered.pt", marks=pytest.mark.slow)]
)
def test_a_torchscript_needs_trust(files, tensors, convert, tmp_path, name):
    """It runs only with its own hash, and is then compared with the converted network."""
    source, target = files / name, tmp_path / "i3d"
    assert "torch cannot read" in convert(source, target)  # no pickle of tensors
    message = convert(source, target, trust_torchscript=True)
    assert weight_folders.STYLEGAN_V in message and "is a program" in message
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert "no meaning without" in convert(source, target, sha256=sha256)
    assert not target.exists()
    assert convert(source, target, trust_torchscript=True, sha256=sha256) is None
    found = params_of(weight_folders.load(target))
    wanted = i3d_exchange.read_i3d(tensors["hassony2"], i3d.Config())
    for path, array in trees.flatten(wanted).items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.peers
def test_a_torchscript_with_another_output_is_refused(files, convert, tmp_path):
    source = files / "other.pt"
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    message = convert(source, tmp_path / "i3d", trust_torchscript=True, sha256=sha256)
    assert "differs from that of the network" in message
    assert not (tmp_path / "i3d").exists()


@pytest.mark.peers
def test_no_code_is_run(files, convert, tmp_path):
    """A pickle that would make a file, and does not."""
    assert "torch cannot read" in convert(files / "code.pt", tmp_path / "out")
    assert not (files / "code_was_run").exists()


@pytest.mark.peers
def test_unknown_files_are_refused(files, convert, tmp_path):
    message = convert(files / "unknown.pt", tmp_path / "out")
    assert "not the names of a known I3D" in message and "a.weight" in message
    message = convert(files / "vjepa.pth.tar", tmp_path / "out")
    assert "give --probe" in message
    both = convert(
        files / "vjepa.pth.tar", tmp_path / "out", probe=files / "probe.pth.tar"
    )
    assert "V-JEPA do not fit" in both  # not of the published size
    small = convert(files / "videomae.pth", tmp_path / "out")
    assert "VideoMAE do not fit" in small
    assert "no meaning for a file" in convert(
        files / "unknown.pt", tmp_path / "out", license="mit"
    )


@pytest.fixture
def folder(tmp_path):
    params = trees.map_paths(
        lambda path, like: np.ones(like.shape, np.float32),
        i3d_exchange.PIERGIAJ.shapes(i3d.Config()),
    )
    weight_folders.save(tmp_path / "i3d", "i3d", i3d.Config(), params, {})
    return tmp_path / "i3d"


def test_other_weights_are_refused(folder):
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(weight_folders.WrongWeights, match="is damaged: its SHA-256 is"):
        weight_folders.load(folder)
    digests.store(file, bytes(content))
    with pytest.raises(
        weight_folders.WrongWeights, match="SHA-256 .* but config.json has"
    ):
        weight_folders.load(folder)
    arrays = safetensors.numpy.load(bytes(content))
    arrays["extra"] = arrays.pop("mixed_3b.b0.kernel")
    content = safetensors.numpy.save(arrays)
    digests.store(file, content)
    description = json.loads((folder / "config.json").read_text())
    description["sha256"] = hashlib.sha256(content).hexdigest()
    digests.store(folder / "config.json", json.dumps(description))
    missing = "missing: mixed_3b.b0.kernel; unexpected: extra"
    with pytest.raises(weight_folders.WrongWeights, match=missing):
        weight_folders.load(folder)
    description["kind"] = "c3d"
    digests.store(folder / "config.json", json.dumps(description))
    with pytest.raises(
        weight_folders.WrongWeights, match="'c3d', it must be one of i3d"
    ):
        weight_folders.load(folder)
    with pytest.raises(weight_folders.WrongWeights, match="has no config.json"):
        weight_folders.load(folder / "elsewhere")


def test_without_the_peers_environment(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="not a Python with torch"):
        weight_folders.convert(
            tmp_path / "a.pt", tmp_path / "b", python=tmp_path / "none"
        )


def test_weights_of_another_network_are_refused(folder):
    assert networks.open("i3d", folder).sha256 == weight_folders.load(folder).sha256
    with pytest.raises(networks.WrongWeights, match="holds i3d, not videomae"):
        networks.open("videomae", folder)
