"""What is given beside a video, against plain statements of what the solver does with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import rng
from sora_jax.diffusion import timesteps
from sora_jax.generation import pipeline, tasks, windows
from sora_jax.models import dit, rows
from tests.generation import tiny
from tests.generation.test_tasks import EVERYTHING, decoded, film, latents_of

CONFIG = dataclasses.replace(tiny.DIT, context_embedding=True)
KNOWN_TAU, SEED = 0.02, 3
GRID = (3, 2, 2)


@pytest.fixture(scope="module")
def networks():
    found = tiny.networks()
    own = found["dit"]
    found["dit"] = dit.DiT(CONFIG, rngs=jax_rngs())
    from flax import nnx

    graph, state = nnx.split(found["dit"], nnx.Param)
    flat = dict(nnx.to_flat_state(nnx.split(own, nnx.Param)[1]))
    random = np.random.default_rng(8)
    filled = [
        (path, flat.get(path, leaf.replace(jnp.asarray(random.normal(size=leaf.shape), "f4"))))
        for path, leaf in nnx.to_flat_state(state)
    ]  # fmt: skip
    found["dit"] = nnx.merge(graph, nnx.from_flat_state(filled))
    return found


def jax_rngs():
    from flax import nnx

    return nnx.Rngs(0)


@pytest.fixture(scope="module")
def pipe(networks):
    settings = dataclasses.replace(
        tiny.SETTINGS, trained_patterns=EVERYTHING, batch_size=1, known_tau=KNOWN_TAU
    )
    return pipeline.Pipeline(**networks, tokenizer=tiny.Letters(), settings=settings)


def noise_of(name, shape, *more):
    return np.asarray(jax.random.normal(rng.key(SEED, name, *more), shape))[None]


def by_hand(pipe, networks, beside, role, times, *, text=2.0, given=1.0, anchor=0.0):
    """Euler's method in a loop: latents of a video of which `beside` is given.

    Args:
      beside: clean latents [1, q, h, w, c] with their role and times.
      text, given: guidance scales of the prompt and of what is given.
      anchor: level of what is given at the first step.
    """
    request = pipe.check_inputs(prompt="a cat", seed=SEED)
    texts = pipe.encode_prompt(request, [0])
    other_noise = noise_of("picture noise", beside.shape[1:])

    @jax.jit
    def alone(x, tau, states, mask, level):
        noised = (1 - level) * beside + level * other_noise
        row = rows.of_video(
            CONFIG, x, jnp.stack([tau, level])[None], states, mask, fps=8.0,
            beside=[rows.Beside(noised, jnp.asarray(times, jnp.float32), role)],
        )  # fmt: skip
        return rows.to_video(networks["dit"](row), GRID, CONFIG.patch)

    taus = timesteps.schedule(4, 3.0)
    x = noise_of("noise", (*GRID, 4))
    for tau, following in zip(taus[:-1], taus[1:], strict=True):
        until = taus[1]  # after a tenth of four steps, and at least one
        share = np.clip((tau - until) / (1 - until), 0, 1)
        level = KNOWN_TAU + share * ((anchor or KNOWN_TAU) - KNOWN_TAU)
        both, other, null = (
            np.asarray(alone(x, tau, c["states"], c["mask"], jnp.float32(one)))
            for c, one in ((texts[0], level), (texts[1], level), (texts[1], 1.0))
        )
        velocity = other + text * (both - other)
        if given != 1:
            velocity = null + given * (other - null) + text * (both - other)
        x = x + (following - tau) * velocity
    return x


class Kept(windows.Windows):
    def decode(self, latents_bthwc):
        self.kept = np.asarray(latents_bthwc)
        return super().decode(latents_bthwc)


def made(pipe, task, **arguments):
    """The latents that a task makes of one clip."""
    request, inputs, _ = pipe.check_task(
        task, "a cat", seed=SEED, batch_size=1, **arguments
    )
    window = Kept(pipe, request, [0], *pipe.encode_prompt(request, [0]))
    tasks.find(task).make(window, **inputs)
    return window.kept


def images(count):
    return [*film(count, seed=5)]


def alone_latents(pipe, frames):
    return np.concatenate([latents_of(pipe, frame[None]) for frame in frames], axis=1)


@pytest.mark.parametrize("count", [1, 2])
def test_references_are_pictures_before_the_video(pipe, networks, count):
    pictures = images(count)
    found = made(pipe, "reference", references=pictures)
    beside = alone_latents(pipe, pictures)
    role, times = rows.Role.REFERENCE, [-1.0, -2.0][:count]
    wanted = by_hand(pipe, networks, beside, role, times)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    for wrong in ((rows.Role.KNOWN, times), (role, [0.0, 1.0][:count])):
        other = by_hand(pipe, networks, beside, *wrong)
        assert np.abs(other - wanted).max() > 3e-3


def test_an_edit_sees_the_video_as_it_is(pipe, networks):
    video = film(9)
    found = made(pipe, "edit", video=video)
    role = rows.Role.SOURCE
    wanted = by_hand(pipe, networks, latents_of(pipe, video), role, [0, 1, 2])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"given_scale": 2.5}, {"anchor_tau": 0.6}, {"given_scale": 2.5, "anchor_tau": 0.6}]
)  # fmt: skip
def test_guidance_by_what_is_given_and_a_falling_anchor(pipe, networks, options):
    pictures = images(1)
    found = made(pipe, "reference", references=pictures, **options)
    beside, role = alone_latents(pipe, pictures), rows.Role.REFERENCE
    names = {"given": "given_scale", "anchor": "anchor_tau"}
    named = {n: options[o] for n, o in names.items() if o in options}
    wanted = by_hand(pipe, networks, beside, role, [-1.0], **named)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    plain = by_hand(pipe, networks, beside, role, [-1.0])
    assert np.abs(plain - wanted).max() > 3e-3


def test_guidance_by_the_given_without_that_by_the_text(pipe, networks):
    pictures = images(1)
    found = made(
        pipe, "reference", references=pictures, given_scale=2.0, guidance_scale=1.0
    )
    beside, role = alone_latents(pipe, pictures), rows.Role.REFERENCE
    wanted = by_hand(pipe, networks, beside, role, [-1.0], text=1.0, given=2.0)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_blend_is_a_variation_of_mixed_latents(pipe):
    """At the ends of the curve it is a variation of either video."""
    first, second = film(9, 1), film(9, 2)
    one = pipe.run("vary", "a cat", video=first, strength=0.5, seed=SEED).frames
    for curve, video in (((0, 0), first), ((1, 1), second)):
        found = pipe.run(
            "blend", "a cat", video=first, video_2=second, strength=0.5, curve=curve,
            seed=SEED,
        ).frames  # fmt: skip
        alone = pipe.run("vary", "a cat", video=video, strength=0.5, seed=SEED).frames
        np.testing.assert_allclose(found, alone, atol=1 / 255)
    low = pipe.run(
        "blend", "a cat", video=first, video_2=second, strength=1e-3, curve=(0, 0.5, 1),
        seed=SEED,
    ).frames[0]  # fmt: skip
    latents = [latents_of(pipe, video) for video in (first, second)]
    shares = np.array([0, 0.5, 1])[None, :, None, None, None]
    mixed = decoded(pipe, latents[0] + shares * (latents[1] - latents[0]))
    np.testing.assert_allclose(low, mixed, atol=4 / 255)
    assert np.abs(one[0] - low).max() > 4 / 255


@pytest.mark.parametrize("option", [{"given_scale": 2.0}, {"anchor_tau": 0.5}])
def test_options_of_what_is_given_are_refused_where_that_is_nothing(pipe, option):
    (name,) = option
    message = f"{name} is for what the denoiser is given .* leave it out"
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **option)
    video, flow = film(9), {"method": "flowedit", "source": "a cat"}
    for task, inputs in (
        ("vary", {"video": video}),
        ("edit", {"video": video} | flow),
        ("loop", {}),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.check_task(task, "a dog", **inputs, **option)
    pipe.check_task("edit", "a dog", video=video, **option)
    mask = np.ones((1, *video.shape[1:3]), bool)
    pipe.check_task("inpaint", "a dog", video=video, mask=mask, **option)
