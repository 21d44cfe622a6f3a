"""What a task gives the denoiser, beside what training gave it, and what comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.data import conditions, packing
from sora_jax.diffusion import timesteps
from sora_jax.generation import compiled
from sora_jax.generation import given as givens
from sora_jax.models import dit, rows
from sora_jax.training import objectives
from tests.generation import tiny

GRID, C = (3, 2, 2), 4
CONFIG = dataclasses.replace(tiny.DIT, patch=(1, 1, 2))


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def training_row(given, latents, beside, times, noise, tau, known_tau, fps):
    """The one clip of a packed row, noised, as the objective gives it to the denoiser."""
    known = conditions.Config({"none": 0.5, "loop": 0.5})
    objective = objectives.Denoiser(
        CONFIG, tiny.TEXT, timesteps.Config(), known, text_dropout=0.0,
        null_ids=[1] + [0] * 5,
    )  # fmt: skip
    tokens_mc, places_m3 = packing.patches(np.asarray(latents), CONFIG.patch)
    places_m3 = places_m3 + np.float32([given.start, 0, 0])
    for time, latent in zip(times, beside, strict=True):
        more_mc, more_m3 = packing.patches(np.asarray(latent)[None], CONFIG.patch)
        tokens_mc = np.concatenate([tokens_mc, more_mc])
        places_m3 = np.concatenate([places_m3, more_m3 + np.float32([time, 0, 0])])
    grid = [s // p for s, p in zip(latents.shape, CONFIG.patch, strict=False)]
    batch = {
        "tokens": tokens_mc[None], "places": places_m3[None],
        "slots": conditions.slots(given, grid)[None],
        "segments": np.ones((1, len(tokens_mc)), np.int32),
        "period": np.full(
            (1, 1), len(latents) * (given.pattern == "loop"), np.float32
        ),
        "frames": np.full((1, 1), len(latents)), "fps": np.full((1, 1), fps, np.float32),
        "text_ids": np.ones((1, 1, 6), np.int32), "text_mask": np.ones((1, 1, 6), bool),
        "tau": np.full((1, 1), tau, np.float32), "drop": np.zeros((1, 1), bool),
        "known_tau": np.full((1, 1), known_tau, np.float32), "noise": noise[None],
    }  # fmt: skip
    modules = {"text_encoder": tiny.networks()["text_encoder"]}
    clean, _ = objective.clean_rows(modules, jax.tree.map(jnp.asarray, batch))
    tau_n1 = clean.tau[..., None]
    x0 = clean.tokens_bnc
    return dataclasses.replace(
        clean, tokens_bnc=(1 - tau_n1) * x0 + tau_n1 * batch["noise"]
    )


@pytest.mark.parametrize(
    "given",
    [
        conditions.Condition("none"),
        conditions.Condition("head", 0, head=2),
        conditions.Condition("both", 1, head=1, pictures=(11, 12)),
        conditions.Condition("keyframes", 0, pictures=(5,)),
        conditions.Condition("reference", references=(7, 9)),
        conditions.Condition("edit", source=3),
        conditions.Condition("loop", 1, 1 + GRID[0]),
    ],
    ids=lambda given: f"{given.pattern} from {given.start}",
)
def test_a_task_gives_what_training_gave(given):
    """The same tokens at the same places, levels and roles, and so the same velocity."""
    known_tau, fps = 0.1, 12.0
    latents, noise = drawn(1, *GRID, C), drawn(1, *GRID, C, seed=1)
    times, role = [frame / 4 for frame in given.pictures], rows.Role.KNOWN
    if given.references:
        times, role = [-1.0, -2.0], rows.Role.REFERENCE
    if given.source is not None:
        times, role = [*range(GRID[0])], rows.Role.SOURCE
    shape = (1, len(times), *GRID[1:], C)
    others, other_noise = drawn(*shape, seed=2), drawn(*shape, seed=3)
    beside = (rows.Beside(others, jnp.asarray(times, jnp.float32), role),)
    known = jnp.zeros((1, *GRID), bool).at[:, : given.head].set(True)
    text = tiny.networks()["text_encoder"](
        jnp.ones((1, 6), jnp.int32), jnp.ones((1, 6), bool)
    )
    row = compiled.start_rows(
        CONFIG, noise, {"states": text, "mask": jnp.ones((1, 6), bool)}, fps, known_tau,
        givens.Given(
            known if given.head else None, latents, given.start,
            beside if times else (), given.pattern == "loop",
        ),
        (other_noise,) if times else (),
    )  # fmt: skip
    of_clip = [np.asarray(rows.patches.patchify(noise, CONFIG.patch))[0]]
    if times:
        of_clip += [np.asarray(rows.patches.patchify(other_noise, CONFIG.patch))[0]]
    trained = training_row(
        given,
        latents[0],
        others[0],
        times,
        np.concatenate(of_clip),
        1.0,
        known_tau,
        fps,
    )
    np.testing.assert_allclose(row.tokens_bnc, trained.tokens_bnc, atol=1e-6)
    np.testing.assert_allclose(row.pos_bn3, trained.pos_bn3, atol=1e-6)
    np.testing.assert_allclose(np.broadcast_to(
        np.asarray(row.tau)[..., None] if row.tau.ndim == 1 else row.tau, trained.tau.shape
    ), trained.tau)  # fmt: skip
    wanted = trained.roles_bn
    found = jnp.zeros_like(wanted) if row.roles_bn is None else row.roles_bn
    np.testing.assert_array_equal(found, wanted)
    assert int((wanted > 0).sum()) == 2 * (given.head + len(times))
    period = 0.0 if row.period_bn is None else row.period_bn
    np.testing.assert_allclose(
        trained.period_bn, jnp.broadcast_to(period, wanted.shape)
    )
    assert bool((trained.period_bn > 0).any()) == (given.pattern == "loop")
    config = dataclasses.replace(CONFIG, context_embedding=True)
    network = dit.DiT(config, rngs=jax_rngs())
    network.context[...] = drawn(2, CONFIG.dim, seed=4)
    ours, theirs = jax.jit(lambda a, b: (network(a), network(b)))(row, trained)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def jax_rngs():
    from flax import nnx

    return nnx.Rngs(0)


PICTURES = dict(
    beside=(rows.Beside(drawn(4, 2, 2, 2, 4, seed=5), jnp.asarray([1.25, 2.0])),)
)


def generated(pipe, given, **arguments):
    """Latents of two clips, with what is given of them."""
    request = pipe.check_inputs(
        prompt=["a cat", "x"], seed=3, output_type="latent", **arguments
    )
    (batch,) = pipe.batches(request)
    text, null = pipe.encode_prompt(request, batch)
    noise, _ = pipe.prepare_latents(request, batch)
    return np.asarray(pipe.denoise(request, batch, text, null, noise, given))[:2]


def test_pictures_change_the_video_and_are_no_part_of_it(pipe):
    free, held = (
        generated(pipe, given) for given in (givens.Given(), givens.Given(**PICTURES))
    )
    assert free.shape == held.shape == (2, 3, 2, 2, 4)
    assert np.abs(free - held).max() > 1e-3
    (pictures,) = PICTURES["beside"]
    moved = dataclasses.replace(pictures, times_t=jnp.asarray([0.0, 2.0]))
    moved = givens.Given(beside=(moved,))
    assert np.abs(generated(pipe, moved) - held).max() > 1e-4
    later = givens.Given(**PICTURES, start=1)
    assert np.abs(generated(pipe, later) - held).max() > 1e-4


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_known_latents_come_back_exactly_beside_pictures(pipe, sampler):
    latents = drawn(4, 3, 2, 2, 4, seed=7)
    known = (
        jnp.zeros((4, 3, 2, 2), bool).at[:, :2, :, 1].set(True)
    )  # part of two frames
    given = givens.Given(known, latents, **PICTURES)
    found = generated(pipe, given, sampler=sampler)
    inside = np.asarray(known)[:2]
    np.testing.assert_array_equal(found[inside], np.asarray(latents)[:2][inside])
    assert np.abs(found[~inside] - np.asarray(latents)[:2][~inside]).max() > 0.1


@pytest.mark.parametrize("shape", [{"replica": 2, "ring": 2, "tensor": 2}, {"fsdp": 8}])
def test_a_mesh_makes_the_same(pipe, shape):
    known = jnp.zeros((4, 3, 2, 2), bool).at[:, :1].set(True)
    given = givens.Given(known, drawn(4, 3, 2, 2, 4, seed=7), **PICTURES)
    wanted = generated(pipe, given)
    with jax.set_mesh(meshes.make_mesh(shape)):
        spread = pipe_of(pipe)
        found = generated(spread, given)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def pipe_of(pipe):
    """The same pipeline on the current mesh."""
    made = tiny.networks()
    return type(pipe)(
        made["dit"], made["text_encoder"], made["vae"], tiny.Letters(), pipe.settings
    )
