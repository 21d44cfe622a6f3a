"""Open weights to a run, the run to open weights, and what cannot be converted."""

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import nnx
from safetensors.numpy import load_file

from configs import toy
from sora_jax.core import config as configs
from sora_jax.core import digests, mesh, trees
from sora_jax.generation import estimate, export, pipeline
from sora_jax.models import lora
from sora_jax.training import (
    checkpoint,
    initial,
    lora_files,
    perceptual,
    pretrained,
    run_folder,
)
from tests import conftest
from tests.training import tiny_folder, tiny_lora

CALL = {
    "prompt": "a red &amp; blue circle", "num_frames": 5, "height": 16, "width": 16,
    "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two_experts"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "folder"
    return tiny_folder.write(folder, request.param)


@pytest.fixture(scope="module")
def job():
    """Calls the job with flags."""
    with conftest.lone_job("convert") as convert:

        def call(source, target, **values):
            texts = {name: str(value) for name, value in values.items()}
            texts |= {"from": str(source), "out": str(target)}
            with flagsaver.flagsaver():
                for name, text in texts.items():
                    convert.FLAGS[name].parse(text)
                    convert.FLAGS[name].present = 1
                with jax.set_mesh(jax.sharding.get_mesh()):  # the job sets its own
                    conftest.run_job(convert)

        yield call


@pytest.fixture(scope="module")
def run(source, job):
    """The run that the folder becomes."""
    target = source.parent / "run"
    job(source, target, mesh="fsdp=2,tensor=2,replica=2")
    return target


def test_a_run_generates_what_the_folder_does(source, run):
    wanted = pipeline.Pipeline.from_pretrained(source, "float32")(**CALL)
    pipe = pipeline.Pipeline.from_pretrained(run)
    found = pipe(**CALL)
    np.testing.assert_array_equal(found.frames, wanted.frames)
    assert pipe.settings == pipeline.Pipeline.from_pretrained(source).settings
    with jax.set_mesh(mesh.make_mesh({"fsdp": 4, "tensor": 2})):
        spread = pipeline.Pipeline.from_pretrained(run, keep_text_encoder=False)
        assert spread._text_encoder is None
        frames = spread(**CALL).frames
        assert spread._text_encoder is None
    assert np.abs(frames - wanted.frames).max() <= 1e-4 * np.abs(wanted.frames).max()


def test_a_run_holds_weights_and_no_optimizer(source, run):
    assert not (run / "checkpoints" / "0" / "state").exists()
    experts = {"dit"} | ({"dit_2"} if (source / "transformer_2").is_dir() else set())
    assert checkpoint.load_run(run).params.keys() == experts
    assert configs.read(run).text.frozen


def test_there_and_back_bit_for_bit(source, run, tmp_path, job):
    back = tmp_path / "back"
    job(run, back, license="apache-2.0", training_data="None.", datasets="a/b,c/d")
    before, after = (pretrained.open_folder(folder) for folder in (source, back))
    assert before.components.keys() == after.components.keys()
    for name, component in before.components.items():
        assert component.config == after.components[name].config
        found, wanted = (
            trees.flatten(c.load()) for c in (after.components[name], component)
        )
        for path, array in wanted.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert (before.boundary, before.scheduler) == (after.boundary, after.scheduler)
    for name in ("spiece.model",):
        assert (back / "tokenizer" / name).read_bytes() == (
            source / "tokenizer" / name
        ).read_bytes()
    card = (back / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and 'datasets: ["a/b", "c/d"]' in card


def test_a_frozen_text_encoder_leaves_as_it_came(source, tmp_path, job):
    """Its run computes in bfloat16; the files are the source's own."""
    run, back = tmp_path / "run", tmp_path / "back"
    job(source, run, dtype="bfloat16")
    job(run, back, license="mit")
    name = "model.safetensors"
    before, after = (f / "text_encoder" / name for f in (source, back))
    assert before.read_bytes() == after.read_bytes()
    assert pipeline.Pipeline.from_pretrained(run).source["weights"] == (
        pretrained.open_folder(source).digest()
    )


def test_weights_may_leave_narrower(source, tmp_path, job):
    target = tmp_path / "run"
    job(source, target, dtype="bfloat16")
    table = checkpoint.load_run(target).params["dit"]["blocks"]["ffn"]["up"]["kernel"]
    assert table.dtype == jax.numpy.bfloat16
    assert configs.read(target).model.dit.dtype == "bfloat16"


def test_two_runs_become_two_experts(tmp_path, job):
    """What the training of A14B's experts, one run each, is put together with."""
    runs = []
    for seed in (3, 5):
        folder = tiny_folder.write(tmp_path / f"folder{seed}")
        params = tiny_folder.weights("transformer", seed)
        name = "transformer"
        pretrained.write_component(folder / name, name, params, tiny_folder.DIT)
        runs.append(tmp_path / f"run{seed}")
        job(folder, runs[-1])
    for run, levels in zip(runs, ("(0.9, 1.0)", "(0.0, 0.9)"), strict=True):
        file = run / "config.py.txt"
        digests.store(file, file.read_text().replace("(0.0, 1.0)", levels))
    with pytest.raises(ValueError, match="one of two experts"):
        pipeline.Pipeline.from_pretrained(runs[0])(**CALL)
    with pytest.raises(ValueError, match="one of two experts"):
        estimate.report(runs[0], [CALL])
    with pytest.raises(SystemExit, match="one of two experts"):
        job(runs[0], tmp_path / "alone", license="mit")
    with pytest.raises(SystemExit, match="was trained on the levels"):
        job(runs[1], tmp_path / "a", expert_2=runs[0], boundary=0.9, license="mit")
    both = tmp_path / "both"
    job(runs[0], both, expert_2=runs[1], boundary=0.9, license="mit")
    found = pretrained.open_folder(both)
    assert found.boundary == 0.9
    for name, seed in (("transformer", 3), ("transformer_2", 5)):
        wanted = trees.flatten(tiny_folder.weights(name, seed))
        for path, array in trees.flatten(found.components[name].load()).items():
            np.testing.assert_array_equal(array, wanted[path], err_msg=path)


def test_adapters_leave_merged_in_a_folder_or_alone_in_a_file(tmp_path, job, capsys):
    folder, run = tiny_folder.write(tmp_path / "folder"), tmp_path / "run"
    adapted = lora.Config(rank=2, alpha=1.0, layers=("^dit",))
    tiny_lora.write_run(folder, run, adapted)
    whole, alone = tmp_path / "whole", tmp_path / "alone.safetensors"
    job(run, whole, license="mit")
    job(run, alone)
    assert f"{alone} written" in capsys.readouterr().out
    component = pretrained.open_component(folder / "transformer", "transformer")
    begun = trees.flatten(component.load())
    wanted = lora_files.merged(alone, component.module())
    wanted = trees.flatten(nnx.to_pure_dict(nnx.state(wanted, nnx.Param)))
    found = pretrained.open_component(whole / "transformer", "transformer").load()
    for path, array in trees.flatten(found).items():
        np.testing.assert_allclose(array, wanted[path], atol=1e-6, err_msg=path)
        assert np.any(array != begun[path]) == path.endswith("kernel"), path
    for source, flags, message in (
        (run, {}, "exists: choose another file"),
        (run, {"license": "mit"}, "--license has no meaning for a LoRA file"),
    ):
        with pytest.raises(SystemExit, match=message):
            job(source, alone, **flags)
    plain = tmp_path / "plain"
    job(folder, plain)
    for source, message in (
        (plain, "was trained without LoRA, so it has no adapters to write"),
        (folder, "is not a run folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            job(source, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"license": "mit"}, "--license has no meaning for a folder"),
        ({"boundary": 0.5}, "--boundary has no meaning for a folder"),
    ],
)
def test_flags_of_the_other_direction_are_refused(
    source, tmp_path, flags, message, job
):
    with pytest.raises(SystemExit, match=message):
        job(source, tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())  # not even a part of it


def importing(init="", encoder="", latents=""):
    """A config that imports."""
    c = toy.get_config()
    c.init, c.text.encoder, c.data.latents = map(str, (init, encoder, latents))
    return c


def test_a_folder_of_a_newer_release_is_converted_unless_strict(
    source, tmp_path, job, logging_of_jobs, caplog
):
    """A field that is not known is warned of; the job, a pipeline and a run refuse it."""
    newer = shutil.copytree(source, tmp_path / "newer")
    file = newer / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": True}))
    target, told = tmp_path / "run", "not known: newer = True of .*text_encoder"
    with pytest.raises(SystemExit, match=told):
        job(newer, target, strict=True)
    assert not target.exists()
    with pytest.raises(ValueError, match=told):
        pipeline.Pipeline.from_pretrained(newer, strict=True)
    with pytest.raises(ValueError, match=told):
        estimate.report(newer, [], strict=True)
    for named in ({"init": newer / "transformer"}, {"encoder": newer}):
        with pytest.raises(ValueError, match=told):
            initial.check_fields(importing(**named))
    job(newer, target)
    assert f"newer = True of {file}" in caplog.text
    assert configs.read(target).weights == pretrained.open_folder(source).digest()
    # The run has the file, and with it the field.
    for refuses in (
        lambda: pipeline.Pipeline.from_pretrained(target, strict=True),
        lambda: estimate.report(target, [], strict=True),
        lambda: initial.check_fields(importing(init=target)),
    ):
        with pytest.raises(ValueError, match=told):
            refuses()


def test_a_strict_training_refuses_the_field_of_its_latents_vae(source, tmp_path):
    vae = shutil.copytree(source / "vae", tmp_path / "latents" / "vae")
    initial.check_fields(importing(latents=tmp_path / "latents"))
    file = vae / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": True}))
    with pytest.raises(ValueError, match="not known: newer = True of .*vae"):
        initial.check_fields(importing(latents=f"elsewhere, {tmp_path / 'latents'}"))


def test_what_is_no_model_is_refused(run, tmp_path, job):
    (tmp_path / "empty").mkdir()
    for source, flags, message in (
        (tmp_path / "empty", {"license": "mit"}, "is not a run folder"),
        (run, {}, "give --license"),
        (run, {"license": "mit", "boundary": 0.5}, "go together"),
        (run, {"license": "mit", "dtype": "float32"}, "--dtype has no meaning"),
    ):
        with pytest.raises(SystemExit, match=message):
            job(source, tmp_path / "out", **flags)
    with pytest.raises(SystemExit, match="is not empty"):
        job(run, run, license="mit")


def test_what_diffusers_lacks_is_named(source, tmp_path, job):
    target = tmp_path / "run"
    job(source, target)
    file = target / "config.py.txt"
    text = file.read_text()
    wanted = "model.dit.time_scale = None"
    assert wanted in text
    digests.store(file, text.replace(wanted, "model.dit.time_scale = 2.0"))
    with pytest.raises(SystemExit, match="cannot express .*config.time_scale"):
        job(target, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_model_leaves_as_a_tokenizer_with_the_same_ids(run, tmp_path):
    pipe = pipeline.Pipeline.from_pretrained(run)
    pipe.save_pretrained(tmp_path / "out", export.Card(license="mit"))
    tensors = load_file(
        tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    )
    assert tensors
    other = pretrained.open_folder(tmp_path / "out").tokenizer
    assert other.name == "tokenizer.json"


@pytest.mark.peers
def test_the_published_files_of_lpips_become_one(tmp_path, job, peers_python, capsys):
    oracle = conftest.ROOT / "tests" / "oracle" / "perceptual.py"
    subprocess.run([peers_python, str(oracle), "alexnet", str(tmp_path)], check=True)
    trunk, target = tmp_path / "trunk.pth", tmp_path / "lpips.safetensors"
    flags = {"lpips_heads": tmp_path / "heads.pth", "torch_python": peers_python}
    job(trunk, target, **flags)
    weights = perceptual.open_weights(target)
    assert weights.config.network == "alexnet"
    assert f"SHA-256 {weights.sha256[:16]}" in capsys.readouterr().out
    for changed, message in (
        ({}, "exists: choose another file"),
        ({"license": "mit"}, "--license has no meaning for weights of LPIPS"),
        ({"lpips_heads": trunk}, "lin0.model.1.weight is missing"),
    ):
        out = target if not changed else tmp_path / "other.safetensors"
        with pytest.raises(SystemExit, match=message):
            job(trunk, out, **flags | changed)
    assert not (tmp_path / "other.safetensors").exists()


def test_lpips_needs_both_of_its_files(tmp_path, job):
    with pytest.raises(SystemExit, match="heads.pth is missing"):
        (tmp_path / "vgg16.pth").touch()
        heads, out = tmp_path / "heads.pth", tmp_path / "out.safetensors"
        job(tmp_path / "vgg16.pth", out, lpips_heads=heads)


def test_a_target_that_cannot_be_written_is_found_before_anything_is_read(
    job, tmp_path
):
    file = tmp_path / "file"
    file.write_text("x")
    for target, reason in {
        file: "file is a file: --out names the folder to write",
        file / "run": "file is a file, not a folder",
        file / "a" / "run": "file is a file, not a folder",
    }.items():
        with pytest.raises(SystemExit, match=f"convert: .*{reason}"):
            job(tmp_path / "missing", target)
    with pytest.raises(SystemExit, match="w.safetensors cannot be written: .*a file"):
        job(tmp_path / "missing", file / "w.safetensors", lpips_heads="vgg.pth")
    assert [*tmp_path.iterdir()] == [file]


def test_a_released_run_is_used_like_the_run(source, run, job, tmp_path):
    released = tmp_path / "released"
    job(run, released, layout="run", mesh="fsdp=-1")
    assert not (released / "checkpoints").exists()
    wanted = pipeline.Pipeline.from_pretrained(run)(**CALL).frames
    found = pipeline.Pipeline.from_pretrained(released)(**CALL).frames
    np.testing.assert_array_equal(found, wanted)
    assert checkpoint.steps(released) == [0]
    sizes = [checkpoint.networks_in(folder) for folder in (run, released)]
    assert sizes[0].keys() == sizes[1].keys()
    assert estimate.report(released, [CALL])

    half = tmp_path / "half"
    job(run, half, layout="run", dtype="float16")
    stored = load_file(half / "weights.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"float16"}
    near = pipeline.Pipeline.from_pretrained(half)(**CALL).frames
    assert 0 < np.abs(near - wanted).max() <= 2e-2 * np.abs(wanted).max()

    content = bytearray((half / "weights.safetensors").read_bytes())
    content[-2] ^= 1
    (half / "weights.safetensors").write_bytes(content)
    with pytest.raises(digests.Damaged, match="weights.safetensors is damaged"):
        pipeline.Pipeline.from_pretrained(half)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        checkpoint.load_run(released, step=7)
    with pytest.raises(SystemExit, match="--dtype float16 is for --layout run"):
        job(source, tmp_path / "no", dtype="float16")


def test_a_released_run_is_a_start_but_is_not_resumed(run, job, tmp_path):
    released = tmp_path / "released"
    job(run, released, layout="run")
    with pytest.raises(ValueError, match=f"--init {released}"):
        run_folder.check(released, configs.read(released))
