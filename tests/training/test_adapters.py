"""Runs with LoRA: what they train, keep, resume and load, and what they refuse."""

import shutil

import jax
import numpy as np
import pytest

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.core import trees
from sora_jax.data import latent_cache
from sora_jax.generation import estimate, runs, wan
from sora_jax.training import (
    adapters,
    checkpoint,
    encode_text,
    initial,
    jobs,
    loop,
    metrics,
    pretrained,
    recipe,
    run_folder,
)
from tests.training import tiny_folder
from tests.training.test_initial import same
from tests.training.tiny_lora import config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of weights, and latents that its own video VAE made."""
    return tiny_folder.write_with_latents(tmp_path_factory.mktemp("lora"))


def train(c, run, sizes=None):
    """The job `train` on a mesh; returns the losses."""
    sizes = sizes or {"fsdp": 1}
    count = int(np.prod([*sizes.values()]))
    built = configs.build(recipe.Recipe, c, "")
    mesh = meshes.make_mesh(sizes, jax.devices()[:count])
    with jax.set_mesh(mesh):
        run_folder.check(run, c)
        task = jobs.denoiser(c, run, mesh)
        run_folder.claim(run, c)
        loop.train(
            built.loop, built.optim, task.objective, task.batches, seed=c.seed,
            folder=run, mesh=mesh, initial=task.initial, fixed=task.fixed,
        )  # fmt: skip
    return [row["loss"] for row in metrics.read(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def tuned(made):
    """A run with LoRA of four steps on one device, and its losses."""
    run = made / "tuned"
    return run, train(config(made), run)


def test_only_adapters_are_trained_and_kept(made, tuned):
    run, losses = tuned
    assert losses[-1] < losses[0]
    state = checkpoint.read_state(run)
    assert state["params"].keys() == state["ema"].keys() == {"lora"}
    sizes = {name: sum(a.size for a in jax.tree.leaves(state[name])) for name in state}
    assert sizes["opt_state"] <= 2 * sizes["params"] + 16
    names = trees.flatten(state["params"])
    assert len(names) == 20  # two matrices of eight projections and two layers
    for name, value in names.items():
        assert name.startswith("lora.dit.blocks.") and np.all(np.abs(value) > 0), name
    # The weights that the run adapts are the folder's, bit for bit.
    kept = pretrained.open_component(run / "transformer", "transformer")
    same(kept.load(), tiny_folder.weights("transformer"))


def test_a_run_that_was_stopped_ends_with_the_same_bits(made, tuned):
    """Also without the folder that it began with."""
    run, (wanted, losses) = made / "stopped", tuned
    train(config(made, loop__num_steps=2), run)
    hidden = (made / "folder").rename(made / "hidden")
    try:
        # As a run of four steps that was stopped at two.
        configs.write(run, configs.read(wanted))
        assert train(config(made), run)[2:] == losses[2:]
    finally:
        hidden.rename(made / "folder")
    same(checkpoint.read_state(run)["params"], checkpoint.read_state(wanted)["params"])


def test_a_mesh_and_accumulation_change_nothing(made, tuned):
    c, sizes = (
        config(made, loop__accumulation=2),
        {"fsdp": 2, "tensor": 2, "ulysses": 1},
    )
    np.testing.assert_allclose(train(c, made / "spread", sizes), tuned[1], rtol=1e-5)


def test_a_run_is_used_with_its_adapters_merged(made, tuned):
    run, _ = tuned
    merged = trees.flatten(runs.load(run).params["dit"])
    adapter = trees.flatten(checkpoint.load_run(run).params["lora"]["dit"])
    for path, wanted in trees.flatten(tiny_folder.weights("transformer")).items():
        layer, _, kind = path.rpartition(".")
        if kind == "kernel" and f"{layer}.adapter.a" in adapter:
            a, b = (adapter[f"{layer}.adapter.{name}"] for name in "ab")
            wanted = wanted + 1.5 * np.einsum("lir,lro->lio", a, b)
        np.testing.assert_allclose(merged[path], wanted, atol=1e-6, err_msg=path)
    text = estimate.report(run, [{"prompt": "a"}])
    assert "dit" in text and "lora" in text


def begin(c, run, made):
    """What a new run begins with, whose fixed networks are now in its folder."""
    begun = initial.from_model(c, run, made / "latents" / "vae")
    begun.keep()
    return begun.params()


def test_a_run_begins_with_one_that_has_adapters(made, tuned):
    """All weights are trained then, from the merged ones; or new adapters of them."""
    run, _ = tuned
    merged = runs.load(run).params["dit"]
    full = begin(config(made, init=str(run), lora__rank=0), made / "full", made)
    assert full.keys() == {"dit"} and not (made / "full" / "transformer").exists()
    same(full["dit"], merged)
    assert begin(config(made, init=str(run)), made / "twice", made) == {}
    same(adapters.base(made / "twice", tiny_folder.DIT).load(), merged)


def test_a_text_encoder_that_was_trained_may_be_frozen_and_the_reverse(made, tuned):
    """Both networks of a run of ours become files of the run that adapts it."""
    of_ours, run = made / "of_ours", made / "of_that"
    wan.to_run(pretrained.open_folder(made / "folder"), of_ours)
    frozen, c = of_ours / "text_encoder", configs.read(of_ours)
    params = checkpoint.load_run(of_ours).params
    params["text_encoder"] = pretrained.open_component(frozen, "text_encoder").load()
    shutil.rmtree(of_ours / "checkpoints")
    shutil.rmtree(frozen)
    checkpoint.save_run(of_ours, params)
    c.text.frozen = False
    configs.write(of_ours, c)
    c, vae = config(made, init=str(of_ours)), made / "latents" / "vae"
    # Text states of another encoder, stored with the latents, are not for this one.
    encode_text.cache_folder(made / "latents").mkdir()
    begun, source = initial.from_model(c, run, vae), latent_cache.open(made / "latents")
    assert encode_text.states_of_run(c, run, source, begun, ["alt"]) is None
    encode_text.cache_folder(made / "latents").rmdir()
    assert begin(c, run, made) == {}
    for folder, name in (("transformer", "dit"), ("text_encoder", "text_encoder")):
        same(pretrained.open_component(run / folder, folder).load(), params[name])
    # The other way: one that was frozen is trained along.
    c = config(made, init=str(tuned[0]), lora__rank=0, text__frozen=False)
    begun = begin(c, made / "along", made)
    assert begun.keys() == params.keys()
    same(begun["text_encoder"], params["text_encoder"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora__layers": ("attn3",)}, "'attn3', which fits none of the layers"),
        ({"init": ""}, "lora.rank is 2, but there are no weights to adapt"),
        ({"text__frozen": False}, "add --config.text.frozen=True"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(made, tmp_path, changes, message):
    c = config(made, **changes)
    mesh = meshes.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message) as error:
        jobs.denoiser(c, tmp_path / "run", mesh)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_section_has_no_adapters(made, tuned):
    run, _ = tuned
    c = configs.read(run)
    assert adapters.config_of(c).scale == 1.5
    del c["lora"]
    assert not adapters.config_of(c).rank
