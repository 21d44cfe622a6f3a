"""LoRA files: the same in diffusers, what is read and written, and what is refused."""

import dataclasses
import json
import pathlib
import subprocess
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sora_jax.core import trees
from sora_jax.generation import estimate, pipeline
from sora_jax.models import exchange, lora, lora_exchange, rows
from sora_jax.training import lora_files, pretrained
from tests import conftest
from tests.training import tiny_folder, tiny_lora

ORACLE = pathlib.Path(__file__).resolve().parents[1] / "oracle" / "lora.py"
EVERY = lora.Config(rank=3, alpha=2.0, layers=("^dit",))
NAME = "transformer.blocks.1.attn1.to_q.lora_{}.weight"
CALL = {
    "prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 3.0,
    "output_type": "latent", "seed": 4, "num_frames": 5, "height": 16, "width": 16,
    "shift": 3.0,
}  # fmt: skip


def metadata(**fields) -> dict:
    return {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8} | fields)}


def apart(found, wanted) -> float:
    found, wanted = map(np.asarray, (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.peers
def test_diffusers_computes_the_same_with_our_file_and_we_with_theirs(
    peers_python, tmp_path
):
    """Adapters of every layer; theirs have several ranks and scales, in the metadata."""
    folder, file = tmp_path / "transformer", tmp_path / "ours.safetensors"
    params = tiny_folder.weights("transformer")
    pretrained.write_component(folder, "transformer", params, tiny_folder.DIT)
    lora_files.write(file, tiny_lora.adapters(EVERY), tiny_folder.DIT, EVERY.scale)
    command = [peers_python, str(ORACLE), str(folder), str(file), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = safetensors.numpy.load_file(tmp_path / "found.safetensors")
    latents = found["latents"].transpose(0, 2, 3, 4, 1)
    levels, text = found["timestep"][:, None] / 1000, found["text"]

    def velocity(name):
        network = pretrained.open_component(folder, "transformer").module()
        if name != "none":
            network = lora_files.merged(tmp_path / f"{name}.safetensors", network)
        mask = jnp.ones(text.shape[:2], bool)
        row = rows.of_video(network.config, latents, levels, text, mask)
        video = rows.to_video(
            jax.jit(type(network).__call__)(network, row),
            latents.shape[1:4],
            network.config.patch,
        )
        return np.asarray(video).transpose(0, 4, 1, 2, 3)

    without = found["velocity/none"]
    for name in ("none", "ours", "theirs"):
        wanted = found[f"velocity/{name}"]
        error = apart(velocity(name), wanted)
        print(f"{name}: {error:.1e}, moved by {apart(wanted, without):.2f}")
        assert error <= 1e-4
        assert name == "none" or apart(wanted, without) > 0.05


@pytest.mark.parametrize(
    "changes, message",
    [
        ({NAME.format("A"): None}, "missing: blocks.1.attn1.to_q.lora_A.weight"),
        ({NAME.format("B"): np.zeros((31, 3), "f4")}, r"\(31, 3\) instead of \(32, 3\)"),
        ({NAME.format("B"): np.zeros((32, 2), "f4")}, r"\(3, 32\) instead of \(2, 32\)"),
        ({NAME.format("B"): np.zeros((32, 0), "f4")}, "of another shape: .*to_q.lora_B"),
        ({NAME.format("B"): np.full((32, 3), np.nan, "f4")}, "is damaged: .* holds nan"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.ones((3, 32), "f4")},
         "unexpected: diffusion_model"),
        ({"transformer.blocks.7.attn1.to_q.lora_A.weight": np.ones((3, 32), "f4")},
         "unexpected: transformer.blocks.7"),
        ({"metadata": metadata(use_rslora=True)}, "use_rslora, which is not implemented"),
        ({"metadata": {"lora_adapter_metadata": "{"}}, "is damaged"),
        ({"metadata": {"lora_adapter_metadata": "{}"}}, "is damaged: .*lora_alpha"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, changes, message):
    adapters = tiny_lora.adapters(lora.Config(rank=3))
    tensors = lora_exchange.export(adapters, tiny_folder.DIT, 1.0) | changes
    about = tensors.pop("metadata", None)
    tensors = {name: array for name, array in tensors.items() if array is not None}
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        file,
        about,
    )
    with pytest.raises(ValueError, match=message) as error:
        lora_files.read(file, tiny_folder.DIT)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_files_that_are_none_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="ends in .safetensors"):
        lora_files.read(tmp_path / "a.bin", tiny_folder.DIT)
    with pytest.raises(FileNotFoundError, match=r"has no a\.safetensors"):
        lora_files.read(tmp_path / "a.safetensors", tiny_folder.DIT)
    safetensors.numpy.save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="there are no adapters"):
        lora_files.read(tmp_path / "a.safetensors", tiny_folder.DIT)


def test_layers_that_wan_lacks_are_not_written(tmp_path):
    ours = dataclasses.replace(tiny_folder.DIT, pooled_text=True)
    assert "pooled_text" in exchange.TRANSFORMER.beyond
    adapters = tiny_lora.adapters(EVERY, ours)
    with pytest.raises(ValueError, match="has no adapters of pooled_text$"):
        lora_files.write(tmp_path / "a.safetensors", adapters, ours, 1.0)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of weights, a run with random adapters of them, and these as a file."""
    made = tmp_path_factory.mktemp("files")
    tiny_folder.write(made / "folder")
    tiny_lora.write_run(made / "folder", made / "run", EVERY)
    lora_files.write_run(made / "lora.safetensors", made / "run")
    return made


def test_a_folder_with_the_file_generates_what_the_run_does(made):
    file = made / "lora.safetensors"
    load = pipeline.Pipeline.from_pretrained
    wanted = load(made / "run")(**CALL).frames
    pipe = load(made / "folder", "float32", lora=file)
    found = pipe(**CALL).frames
    assert apart(found, wanted) <= 1e-5
    assert pipe.source["lora"] == lora_files.digest(file)
    with pytest.raises(ValueError, match="lora_2 is for a second expert"):
        load(made / "folder", "float32", lora_2=file)


def test_a_report_checks_the_file(made, tmp_path):
    report = estimate.report(
        made / "folder", [{"prompt": "a"}], loras=[made / "lora.safetensors"]
    )
    assert "weights" in report
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        missing = tmp_path / "none.safetensors"
        estimate.report(made / "folder", [{"prompt": "a"}], loras=[missing])


def test_each_of_two_experts_has_a_file_of_its_own(made, tmp_path):
    folder, file = (
        tiny_folder.write(tmp_path / "two", experts=2),
        made / "lora.safetensors",
    )
    pipe = pipeline.Pipeline.from_pretrained(folder, "float32", lora_2=file)
    first, second = (
        trees.flatten(nnx.to_pure_dict(nnx.state(nnx.merge(*part), nnx.Param)))
        for part in (pipe._dit, pipe._dit_2)
    )
    begun = trees.flatten(tiny_folder.weights("transformer", 0))
    of_second = trees.flatten(tiny_folder.weights("transformer_2", 3))
    for path, value in begun.items():
        np.testing.assert_array_equal(first[path], value, err_msg=path)
        moved = np.any(second[path] != of_second[path])
        assert moved == path.endswith("kernel"), path


def test_the_job_merges_and_checks_the_files(made, tmp_path):
    given = {"model": made / "folder", "prompt": "a", "out": tmp_path / "a.mp4"}
    given |= {"lora": made / "lora.safetensors", "lora_2": made / "other.safetensors"}
    with (
        conftest.lone_job("generate") as job,
        jax.set_mesh(jax.sharding.get_mesh()),  # the job sets its own
        mock.patch.object(
            job.pipeline.Pipeline, "from_pretrained", side_effect=ValueError("stop")
        ) as load,
    ):
        assert conftest.refusal(job, **given).endswith("stop")
        merged = {name: load.call_args.kwargs[name] for name in ("lora", "lora_2")}
        assert merged == {name: str(given[name]) for name in merged}
        message = conftest.refusal(job, **given, dry_run=True)
        assert "has no other.safetensors" in message and "\n" not in message
