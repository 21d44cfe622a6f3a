"""Fine-tuning: what a run begins with, what it leaves alone, what it refuses."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import wan_1_3b
from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.core import rng, trees
from sora_jax.generation import pipeline, wan
from sora_jax.training import (
    checkpoint,
    initial,
    jobs,
    loop,
    metrics,
    pretrained,
)
from tests.training import tiny_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The sizes of the tiny folder's networks.
TINY = {
    "model.dit.dim": 32, "model.dit.num_heads": 2, "model.dit.num_layers": 2,
    "model.dit.mlp_dim": 48, "model.dit.text_dim": 16, "model.dit.freq_dim": 16,
    "model.dit.in_channels": 4, "model.dit.out_channels": 4,
    "model.text_encoder.vocab_size": 320, "model.text_encoder.num_layers": 2,
    "model.text_encoder.num_heads": 2, "model.text_encoder.head_dim": 8,
    "model.text_encoder.mlp_dim": 32,
    "model.dit.dtype": "float32", "model.text_encoder.dtype": "float32",
    "sample.num_frames": 5, "sample.height": 16, "sample.width": 16,
    "loop.num_steps": 4, "loop.log_every": 1, "loop.checkpoint_every": 2,
    "optim.warmup_steps": 1, "optim.learning_rate": 1e-3,
}  # fmt: skip
CALL = {
    "prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 3.0,
    "output_type": "latent", "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of weights, and latents that its own video VAE made."""
    return tiny_folder.write_with_latents(tmp_path_factory.mktemp("tune"))


def recipe(made, **changes):
    c = wan_1_3b.get_config()
    given = TINY | {"data.latents": str(made / "latents"), "init": str(made / "folder")}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    c.update_from_flattened_dict(given)
    return c


def train(made, run, devices=8, **changes):
    """The job as a user runs it."""
    values = TINY | {name.replace("__", "."): v for name, v in changes.items()}
    init = values.pop("init", made / "folder")
    command = [
        sys.executable, "-m", "sora_jax.train", "--config=configs/wan_1_3b.py",
        f"--out={run}", f"--config.data.latents={made / 'latents'}",
        f"--init={init}", *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    )
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, text=True,
        capture_output=True, timeout=240,
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


@pytest.fixture(scope="module")
def still(made):
    """A run on eight devices whose learning rate is 0, with a part that Wan lacks."""
    run = made / "still"
    code, output = train(
        made, run, mesh__fsdp=4, mesh__tensor=2, optim__learning_rate=0.0,
        model__dit__known_embedding=True, known__probabilities__none=0.5, known__probabilities__first_frame=0.5,
    )  # fmt: skip
    assert code == 0, output
    return run


def same(found, wanted):
    found, wanted = trees.flatten(found), trees.flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_run_begins_with_the_weights_of_the_folder(made, still):
    folder = pretrained.open_folder(made / "folder")
    found = checkpoint.read_state(still)["params"]
    assert found.keys() == {"dit"}  # the text encoder is in no checkpoint
    assert not np.any(found["dit"].pop("known"))  # what Wan lacks is zero at first
    same(found["dit"], folder.components["transformer"].load())
    kept = pretrained.open_component(still / "text_encoder", "text_encoder")
    same(kept.load(), folder.components["text_encoder"].load())


def test_the_run_generates_what_the_folder_does(made, still):
    size = {"num_frames": 5, "height": 16, "width": 16, "shift": 3.0}
    wanted = pipeline.Pipeline.from_pretrained(made / "folder")(**CALL, **size)
    pipe = pipeline.Pipeline.from_pretrained(still)
    found = pipe(**CALL)
    error = np.linalg.norm(found.frames - wanted.frames) / np.linalg.norm(wanted.frames)
    assert error <= 1e-5
    assert pipe.tokenizer.ids("a &amp; b") == pipe.tokenizer.ids("a & b")


def test_the_optimizer_holds_nothing_for_what_is_not_trained(still):
    state = checkpoint.read_state(still)
    names = {path.split(".")[0] for path in trees.flatten(state["params"])}
    assert names == {"dit"}
    sizes = {name: sum(a.size for a in jax.tree.leaves(state[name])) for name in state}
    assert sizes["opt_state"] <= 2 * sizes["params"] + 16


@pytest.fixture(scope="module")
def tuned(made):
    """A run on one device whose weights move."""
    run = made / "tuned"
    code, output = train(made, run, devices=1)
    assert code == 0, output
    return run


@pytest.mark.slow
def test_a_mesh_changes_nothing(made, tuned):
    run = made / "spread"
    code, output = train(made, run, mesh__fsdp=2, mesh__tensor=2, mesh__replica=2)
    assert code == 0, output
    one, eight = (
        trees.flatten(checkpoint.read_state(r)["params"]) for r in (tuned, run)
    )
    begun = trees.flatten({"dit": tiny_folder.weights("transformer")})
    for path, value in one.items():
        moved = np.abs(value - begun[path]).max()
        assert np.abs(value - eight[path]).max() <= 0.05 * moved, path
    assert max(np.abs(one[p] - begun[p]).max() for p in one) > 1e-3


def test_the_same_command_goes_on_without_the_folder(made, tuned):
    """All that a run needs is in it: the folder may be gone when it goes on."""
    run = made / "again"
    code, output = train(made, run, devices=1, loop__num_steps=2)
    assert code == 0, output
    # As a run of four steps that was stopped at two.
    configs.write(run, configs.read(tuned))
    hidden = (made / "folder").rename(made / "hidden")
    try:
        code, output = train(made, run, devices=1)
    finally:
        hidden.rename(made / "folder")
    assert code == 0, output
    same(*(checkpoint.load_run(r).params for r in (run, tuned)))


def test_a_frozen_text_encoder_is_the_one_that_is_used(made, tuned):
    """The first loss is that of the folder's own networks on the first batch."""
    c = recipe(made, data__batch_size=8)
    mesh = meshes.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        job = jobs.denoiser(c, made / "loss", mesh)
        with job.batches(0) as rows:
            batch = loop.to_device(next(rows), mesh)
        batch = job.objective.draw(rng.key(c.seed, "train", 0), batch, 0.0)
        folder = pretrained.open_folder(made / "folder").components
        names = {"dit": "transformer", "text_encoder": "text_encoder"}
        params = {ours: folder[theirs].load() for ours, theirs in names.items()}

        @jax.jit
        def loss(params, batch):
            modules = job.objective.networks.bind(params)
            total, weight, _ = job.objective.loss(modules, batch)
            return total / weight

        wanted = float(loss(params, batch))
    first = metrics.read(tuned / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_run_begins_with_another_run(made, tuned):
    run = made / "second"
    code, output = train(made, run, devices=1, init=tuned, optim__learning_rate=0.0)
    assert code == 0, output
    same(*(checkpoint.load_run(r).params for r in (run, tuned)))


def test_a_text_encoder_may_be_trained_along(made, tmp_path):
    code, output = train(made, tmp_path / "run", devices=1, text__frozen=False)
    assert code == 0, output
    params = checkpoint.read_state(tmp_path / "run")["params"]
    moved = trees.flatten(params["text_encoder"])
    begun = trees.flatten(tiny_folder.weights("text_encoder", 1))
    assert any(np.any(moved[path] != value) for path, value in begun.items())
    assert not (tmp_path / "run" / "text_encoder").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__dit__num_layers": 3}, "num_layers: 2, now 3"),
        ({"model__dit__mask_text": True}, "mask_text: False, now True"),
        ({"model__text_encoder__head_dim": 4}, "head_dim: 8, now 4"),
        ({"model__text_encoder__vocab_size": 8}, "but the tokenizer has"),
        ({"text__encoder": "x"}, "leave text.encoder empty"),
        ({"init": "nothing"}, "is neither a run nor a folder with a model_index.json"),
        ({"data__batch_size": 9}, "batch_size"),
        ({"init": ""}, "text.frozen needs a trained text encoder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(made, tmp_path, changes, message):
    c = recipe(made, **changes)
    with (
        jax.set_mesh(meshes.make_mesh({"fsdp": 8})),
        pytest.raises((ValueError, FileNotFoundError), match=message) as error,
    ):
        jobs.denoiser(c, tmp_path / "run", jax.sharding.get_mesh())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()  # what is refused leaves nothing behind


def test_latents_of_another_vae_are_refused(made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    file = tmp_path / "folder" / "vae" / "config.json"
    file.write_text(file.read_text().replace("0.4", "0.5"))
    c = recipe(made, init=str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="not made by the video VAE"):
        initial.from_model(c, tmp_path / "run", made / "latents" / "vae")


def test_one_of_two_experts_must_be_named(made, tmp_path):
    folder = tiny_folder.write(tmp_path / "two", experts=2)
    vae = made / "latents" / "vae"
    with pytest.raises(ValueError, match="a run trains one: name .*/transformer"):
        initial.from_model(recipe(made, init=str(folder)), tmp_path / "a", vae)
    with pytest.raises(ValueError, match="has one transformer"):
        c = recipe(made, init=str(made / "folder" / "transformer_2"))
        initial.from_model(c, tmp_path / "b", vae)
    for seed, name, levels in (
        (0, "transformer", (0.875, 1.0)),
        (3, "transformer_2", (0.0, 0.875)),
    ):
        c = recipe(made, init=str(folder / name))
        with pytest.raises(ValueError, match="a run trains one"):
            initial.from_model(c, tmp_path / name, vae)  # all levels: half are not its
        c.noise.levels = levels
        begun = initial.from_model(c, tmp_path / name, vae)
        same(begun.params()["dit"], tiny_folder.weights(name, seed))


def test_files_of_another_start_are_not_read(made, tmp_path):
    """Files of another model, in a folder that no run has claimed yet."""
    run = tmp_path / "run"
    c = recipe(made, data__batch_size=8)
    for left in ("tokenizer.json", "text_encoder/weights.safetensors"):
        (run / left).parent.mkdir(parents=True, exist_ok=True)
        (run / left).write_text("{}")
        with (
            jax.set_mesh(meshes.make_mesh({"fsdp": 8})),
            pytest.raises(ValueError, match="belongs to another model"),
        ):
            jobs.denoiser(c, run, jax.sharding.get_mesh())
        shutil.rmtree(run)


def test_a_converted_folder_is_a_start_like_the_folder_itself(made, tmp_path):
    """With the part that Wan lacks, which is zero at first there too."""
    source = pretrained.open_folder(made / "folder")
    wan.to_run(source, tmp_path / "run")
    # And computed in other ways than the folder's, which makes no other network.
    added = {
        "model__dit__known_embedding": True, "model__dit__quantization": "int8",
        "model__dit__remat": "full", "model__dit__num_kv_heads": 2,
        "model__dit__dtype": "bfloat16",
    }  # fmt: skip
    vae = made / "latents" / "vae"
    one, other = (
        initial.from_model(recipe(made, init=str(f), **added), tmp_path / "x", vae)
        for f in (made / "folder", tmp_path / "run")
    )
    same(*(begun.params() for begun in (one, other)))
    with pytest.raises(ValueError, match="time_scale: None, now 2"):
        c = recipe(made, init=str(tmp_path / "run"), model__dit__time_scale=2.0)
        initial.from_model(c, tmp_path / "x", vae)


def test_a_component_of_ours_is_read_as_one_of_a_peer(tmp_path):
    """`weights.safetensors` with our names: the same numbers, laid out on the mesh."""
    params = tiny_folder.weights("text_encoder")
    checkpoint.save_weights(tmp_path, params, tiny_folder.TEXT)
    component = pretrained.open_component(tmp_path, "text_encoder")
    assert component.config == tiny_folder.TEXT
    same(component.load(), params)
    with jax.set_mesh(meshes.make_mesh({"fsdp": 4, "tensor": 2})):
        spread = component.load()
        layouts = trees.flatten(component.networks.layouts()["component"])
    for path, array in trees.flatten(spread).items():
        assert array.sharding == layouts[path], path
    del params["norm_out"]
    checkpoint.save_weights(tmp_path, params, tiny_folder.TEXT)
    with pytest.raises(ValueError, match=r"norm_out\.scale is missing"):
        pretrained.open_component(tmp_path, "text_encoder")


def test_the_config_keeps_what_a_run_began_with(made, tuned):
    assert configs.read(tuned).init == str(made / "folder")
