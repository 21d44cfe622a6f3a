"""Tasks on random weights: what was given comes back, and each method is its statement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import rng
from sora_jax.data import conditions, regions
from sora_jax.diffusion import timesteps
from sora_jax.generation import compiled, pipeline, tasks
from sora_jax.generation import given as givens
from sora_jax.models import rows
from tests.generation import tiny

EVERYTHING = (*(p.value for p in conditions.PATTERNS), "mid_clip")


def film(frames, seed=0, height=16, width=16):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe():
    """A pipeline that says it was trained with everything, in chunks of two clips."""
    settings = dataclasses.replace(
        tiny.SETTINGS, trained_patterns=EVERYTHING, batch_size=2
    )
    return pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=settings
    )


def run(pipe, task, **arguments):
    """Frames of two clips as uint8, and the clip steps that progress was told of."""
    steps = []
    out = pipe.run(task, ["a cat", "x"], seed=3, progress=steps.append, **arguments)
    return np.round(out.frames * 255).astype(np.uint8), sum(steps)


STEPS = 2 * tiny.SETTINGS.num_inference_steps  # of two clips, in one window


@pytest.mark.parametrize("length", [1, 4, 5, 9, 14])
def test_a_video_is_continued_and_stays_what_it_was(pipe, length):
    video = film(length)
    found, steps = run(pipe, "extend", video=video, frames=6)
    assert found.shape == (2, length + 6, 16, 16, 3)
    np.testing.assert_array_equal(found[:, :length], np.stack([video] * 2))
    assert np.ptp(found[:, length:].astype(int), axis=0).max() > 0  # two clips
    *_, windows = pipe.check_task("extend", "a cat", video=video, frames=6)
    assert steps == windows * STEPS and windows == (1 if length < 5 else 2)
    with pytest.raises(ValueError, match="windows of 5 frames continue a video by 4"):
        pipe.check_task("extend", "a", video=video, frames=6, num_frames=5)


def test_latents_are_carried_from_window_to_window(pipe, monkeypatch):
    """They are known in the next window, and encoded and decoded once."""
    seen, encoded, decoded = [], [], []
    denoise, encode, decode = pipe.denoise, pipe.encode, pipe.decode_latents

    def spying(request, rows, text, null, noise, given, **rest):
        made = denoise(request, rows, text, null, noise, given, **rest)
        seen.append((given, np.asarray(made), np.asarray(noise)))
        return made

    monkeypatch.setattr(pipe, "denoise", spying)
    monkeypatch.setattr(
        pipe, "encode", lambda video: encoded.append(video.shape[1]) or encode(video)
    )
    monkeypatch.setattr(
        pipe, "decode_latents", lambda x: decoded.append(x.shape[1]) or decode(x)
    )
    run(pipe, "extend", video=film(9), frames=12)
    assert encoded == [5] and decoded == [2 + 3] and len(seen) == 3
    assert [given.start for given, *_ in seen] == [0, 1, 1]
    for (_, before, noise), (given, after, other) in zip(seen, seen[1:], strict=False):
        known = np.asarray(given.known_bthw)[0, :, 0, 0]
        # Like a clip of three latents without its first, as in training.
        assert known.tolist() == [True, False] and after.shape[1] == 2
        np.testing.assert_array_equal(after[:, :1], before[:, -1:])
        assert np.abs(noise[:, :1] - other[:, :1]).max() > 0.1  # each has its own


@pytest.mark.parametrize("length", [1, 2, 9])
def test_what_comes_before_a_video_is_made(pipe, length):
    video = film(length)
    found, _ = run(pipe, "extend_backwards", video=video, frames=13)
    assert found.shape[1] == 13 + length
    np.testing.assert_array_equal(found[:, 13:], np.stack([video] * 2))
    *_, windows = pipe.check_task("extend_backwards", "a", video=video, frames=13)
    assert windows == {1: 2, 2: 2, 9: 3}[length]
    one = pipe.check_task("extend_backwards", "a", video=film(1), frames=16)
    assert one[2] == 3  # of 8, 6 and 2 new frames


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 6])
def test_two_videos_are_connected_and_both_stay(pipe, frames, length):
    first, second = film(length), film(length + 1, 1)
    found, _ = run(pipe, "connect", video=first, video_2=second, frames=frames)
    assert found.shape[1] == 2 * length + 1 + frames
    np.testing.assert_array_equal(found[0, :length], first)
    np.testing.assert_array_equal(found[1, length + frames :], second)


def test_pictures_are_within_the_last_latent_of_a_connection_as_in_training():
    for frames in range(1, 20):
        head, last = tasks._ends(film(9), film(9), 4)
        whole = tasks._whole(head + frames + last, 4)
        assert (head, last) == (5, 3)
        assert whole - 4 < head + frames + last <= whole


def test_the_middle_of_a_video_is_replaced(pipe):
    video = film(20)
    found, _ = run(pipe, "replace", video=video, first=7, last=11)
    kept = [*range(7), *range(12, 20)]
    assert found.shape[1] == 20
    np.testing.assert_array_equal(found[:, kept], np.stack([video[kept]] * 2))
    assert (found[:, 7:12] != video[7:12]).any(axis=(2, 3, 4)).all()


@pytest.mark.parametrize(
    "length, factor, windows", [(2, 2, 1), (5, 2, 1), (6, 2, 2), (4, 3, 2), (3, 4, 1)]
)
def test_frames_are_filled_in_at_a_higher_rate(pipe, length, factor, windows):
    video = film(length)
    found, steps = run(pipe, "fill", video=video, factor=factor, fps=6.0)
    assert found.shape[1] == factor * (length - 1) + 1 and steps == windows * STEPS
    np.testing.assert_array_equal(found[:, ::factor], np.stack([video] * 2))
    out = pipe.run("fill", "a cat", video=video, factor=factor, fps=6.0)
    assert out.recipes[0]["fps"] == 6.0 * factor
    assert pipe.check_task("fill", "a", video=video, factor=factor)[2] == windows


def test_keyframes_at_any_times(pipe):
    images = film(3)
    found, _ = run(pipe, "keyframes", images=images, at=[0, 3, 8])
    free, _ = run(pipe, "keyframes", images=images[1:], at=[3, 8])
    assert found.shape == free.shape == (2, 9, 16, 16, 3)
    assert (found != free).any()
    moved, _ = run(pipe, "keyframes", images=images, at=[0, 4, 8])
    assert (found != moved).any()
    # A picture at frame 0 alone is a first frame.
    first, _ = run(pipe, "keyframes", images=images[:1], at=[0])
    image = np.round(pipe(["a cat", "x"], seed=3, image=images[0]).frames * 255)
    np.testing.assert_array_equal(first[:, 1:], image[:, 1:].astype(np.uint8))
    for made, at in ((found, [0, 3, 8]), (moved, [0, 4, 8]), (first, [0])):
        np.testing.assert_array_equal(made[:, at], np.stack([images[: len(at)]] * 2))


@pytest.mark.parametrize("length", [1, 5, 9])
def test_outside_of_a_mask_nothing_changes(pipe, length):
    video, mask = film(length), ~regions.of_clip("a", (length, 16, 16))
    found, _ = run(pipe, "inpaint", video=video, mask=mask)
    np.testing.assert_array_equal(found[:, ~mask], np.stack([video[~mask]] * 2))
    assert mask.any() and (found[:, mask] != video[mask]).mean() > 0.9


def test_what_is_replaced_is_not_seen(pipe):
    """The result depends on the kept pixels alone."""
    video, mask = film(9), np.zeros((16, 16), bool)
    mask[:, 8:] = True
    other = video.copy()
    other[:, :, 8:] = 255 - other[:, :, 8:]
    one, two = (run(pipe, "inpaint", video=v, mask=mask)[0] for v in (video, other))
    np.testing.assert_array_equal(one, two)
    other[:, :, :8] = 255 - other[:, :, :8]
    assert (run(pipe, "inpaint", video=other, mask=mask)[0][:, :, :, 8:] != one[:, :, :, 8:]).any()  # fmt: skip


def test_a_video_is_put_in_the_middle_of_a_larger_frame(pipe):
    video = film(9, height=8, width=16)
    found, _ = run(pipe, "outpaint", video=video, height=16, width=32)
    assert found.shape == (2, 9, 16, 32, 3)
    np.testing.assert_array_equal(found[:, :, 4:12, 8:24], np.stack([video] * 2))


@pytest.mark.parametrize("is_trained", [True, False])
def test_regions_are_given_where_they_were_trained(pipe, monkeypatch, is_trained):
    """Else the solver alone keeps them: see test_untrained_modes.py."""
    seen, denoise = [], pipe.denoise

    def spying(*arguments, **named):
        seen.append(arguments[5])
        return denoise(*arguments, **named)

    monkeypatch.setattr(pipe, "denoise", spying)
    if not is_trained:
        rest = tuple(name for name in EVERYTHING if name != "region")
        monkeypatch.setattr(
            pipe, "settings", dataclasses.replace(pipe.settings, trained_patterns=rest)
        )
    run(pipe, "inpaint", video=film(5), mask=np.ones((16, 16), bool))
    assert seen[0].blended is not is_trained


@pytest.mark.parametrize(
    ("patterns", "start", "circular"),
    [
        (("none",), 0, False),
        (("none", "mid_clip"), 1, False),
        (("loop",), 1, True),
    ],
)
def test_a_loop_is_made_as_it_was_trained(pipe, monkeypatch, patterns, start, circular):
    seen, denoise = [], pipe.denoise

    def spying(request, rows, text, null, noise, given, **named):
        seen.append((noise.shape[1], given.start, given.is_loop, named["is_rolled"]))
        return denoise(request, rows, text, null, noise, given, **named)

    monkeypatch.setattr(pipe, "denoise", spying)
    settings = dataclasses.replace(pipe.settings, trained_patterns=patterns)
    monkeypatch.setattr(pipe, "settings", settings)
    found, steps = run(pipe, "loop")
    assert found.shape == (2, 8, 16, 16, 3) and steps == STEPS
    assert seen == [(2, start, circular, not circular)]
    assert (found[0] != found[1]).any()


def test_tokens_of_which_a_part_is_kept_are_noise_at_first():
    """As in training, where a token is known if all of its latents are."""
    config = dataclasses.replace(tiny.DIT, patch=(1, 2, 2))
    known = jnp.zeros((1, 1, 4, 4), bool).at[:, :, :, :3].set(True)
    latents, noise = jnp.zeros((1, 1, 4, 4, 4)), jnp.full((1, 1, 4, 4, 4), 9.0)
    text = {"states": jnp.zeros((1, 2, 16)), "mask": jnp.ones((1, 2), bool)}
    start = compiled.start_rows(
        config, noise, text, 8.0, 0.0, givens.Given(known, latents)
    )
    assert start.given_bn.tolist() == [[True, False, True, False]]
    np.testing.assert_array_equal(start.tokens_bnc[0, 1::2], 9.0)
    np.testing.assert_array_equal(start.tokens_bnc[0, ::2], 0.0)


def test_weights_that_give_no_numbers_are_reported(pipe, monkeypatch):
    bad = lambda x: np.full((2, 5, 16, 16, 3), np.nan)  # noqa: E731
    monkeypatch.setattr(pipe, "decode_latents", bad)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(pipe, "vary", video=film(5))


def velocities(pipe, text, scale):
    """The guided velocity of one clip, (x, tau) -> [1, t, h, w, c], by hand."""
    dit = tiny.networks()["dit"]
    request = pipe.check_inputs(prompt=text, seed=3)
    given, null = pipe.encode_prompt(request, [0])

    @jax.jit
    def alone(x, tau, states, mask):
        row = rows.of_video(tiny.DIT, x, jnp.full((1, 1), tau), states, mask, fps=8.0)
        return rows.to_video(dit(row), x.shape[1:4], tiny.DIT.patch)

    def velocity(x, tau):
        with_text, without = (
            np.asarray(alone(x, tau, c["states"], c["mask"])) for c in (given, null)
        )
        return without + scale * (with_text - without)

    return velocity


def latents_of(pipe, video):
    return np.asarray(pipe.encode(video[None].astype(np.float32) / 127.5 - 1))


def decoded(pipe, latents):
    frames = np.asarray(pipe.decode_latents(jnp.asarray(latents, jnp.float32)))
    return frames[0]


def test_variations_are_those_of_sdedit(pipe):
    """Noise to a level, then Euler's method to 0, in a loop without any machinery."""
    video, level = film(9), 0.7
    taus = timesteps.schedule(4, 3.0, level)
    assert taus[0] == np.float32(level) and taus[-1] == 0
    velocity = velocities(pipe, "a cat", 2.0)
    noise = np.asarray(jax.random.normal(rng.key(3, "noise"), (3, 2, 2, 4)))[None]
    x = (1 - taus[0]) * latents_of(pipe, video) + taus[0] * noise
    for tau, following in zip(taus[:-1], taus[1:], strict=True):
        x = x + (following - tau) * velocity(x, tau)
    out = pipe.run("vary", "a cat", video=video, strength=level, seed=3)
    np.testing.assert_allclose(out.frames[0], decoded(pipe, x), atol=1 / 255)
    # The lower the level, the nearer to the video.
    away = [
        np.abs(
            pipe.run("vary", "a cat", video=video, strength=s, seed=3).frames[0]
            - decoded(pipe, latents_of(pipe, video))
        ).mean()
        for s in (0.05, 0.5, 1.0)
    ]
    assert away[0] < 0.5 * away[1] < away[2]


def test_edits_are_those_of_flowedit(pipe):
    """Algorithm 1 of arXiv 2412.08629, in a loop without any machinery."""
    video, level = film(9), 0.8
    taus = timesteps.schedule(4, 3.0, level)
    new, old = velocities(pipe, "a cat", 2.0), velocities(pipe, "a dog", 1.5)
    source = latents_of(pipe, video)
    z, key = source.copy(), rng.key(3, "edit noise")
    for tau, following in zip(taus[:-1], taus[1:], strict=True):
        number = jnp.round(tau * 2**20).astype(jnp.int32)
        tokens = jax.random.normal(jax.random.fold_in(key, number), (12, 4))
        noise = np.asarray(tokens).reshape(1, 3, 2, 2, 4)
        noised = (1 - tau) * source + tau * noise
        z = z + (following - tau) * (new(z + noised - source, tau) - old(noised, tau))
    out = pipe.run(
        "edit", "a cat", video=video, source="a dog", strength=level, seed=3,
        source_guidance_scale=1.5, method="flowedit",
    )  # fmt: skip
    np.testing.assert_allclose(out.frames[0], decoded(pipe, z), atol=1 / 255)


def test_an_edit_to_the_same_text_changes_nothing(pipe):
    video = film(9)
    out = pipe.run(
        "edit", "a cat", video=video, source="a cat", source_guidance_scale=2.0, seed=3,
        method="flowedit",
    )  # fmt: skip
    alone = decoded(pipe, latents_of(pipe, video))
    np.testing.assert_allclose(out.frames[0], alone, atol=1 / 255)


def test_a_recipe_says_what_was_given(pipe):
    video = film(5)
    out = pipe.run("extend", ["a cat", "x"], video=video, frames=2, seed=3)
    first, second = out.recipes
    assert first["task"] == "extend" and first["inputs"]["frames"] == 2
    assert first["inputs"] == second["inputs"] and second["seed"] == 4
    other = pipe.run("extend", "a cat", video=255 - video, frames=2, seed=3)
    assert other.recipes[0]["inputs"]["video"] != first["inputs"]["video"]
    assert (
        pipe.run("vary", "a cat", video=video).recipes[0]["inputs"]["strength"] == 0.8
    )


def test_a_video_of_another_size_is_scaled_where_a_size_is_asked_for(pipe):
    video = film(5, height=16, width=32)
    found, _ = run(pipe, "extend", video=video, frames=4)
    assert found.shape[2:4] == (16, 32)
    found, _ = run(pipe, "extend", video=video, frames=4, height=16, width=16)
    assert found.shape[2:4] == (16, 16)
    np.testing.assert_array_equal(found[0, :5], video[:, :, 8:24])


@pytest.mark.parametrize(
    "task, arguments, message",
    [
        ("turn", {}, "'turn' is unknown; there are keyframes, loop, reference"),
        ("extend", {"frames": 3}, "'extend' needs video"),
        ("extend", {"video": film(5)}, "'extend' needs frames"),
        ("extend", {"video": film(5), "frames": 0}, "nothing to make"),
        ("extend", {"video": film(5), "frames": -2}, "from 0 on, not -2"),
        ("extend", {"video": film(5)[0], "frames": 2}, r"uint8 \[t, h, w, 3\]"),
        ("extend", {"video": film(5) / 255, "frames": 2}, "uint8, not float64"),
        (
            "extend",
            {"video": film(5), "frames": 2, "mask": film(1)},
            "mask has no meaning",
        ),
        ("extend", {"video": film(5, height=15), "frames": 2}, "height is 15"),
        ("vary", {"video": film(6)}, "6 frames; .*the nearest is 5 or 9"),
        ("vary", {"video": film(5), "strength": 1.5}, r"level in \(0, 1\], not 1.5"),
        ("edit", {"video": film(5), "method": "flowedit"}, "flowedit needs source"),
        ("edit", {"video": film(5), "method": "magic"}, "method is 'magic'"),
        ("edit", {"video": film(5), "source": "x"}, "no meaning for method context"),
        ("edit", {"video": film(5), "strength": 0.5}, "no meaning for method context"),
        ("reference", {"references": film(3)}, "there are 3 references; up to 2"),
        ("blend", {"video": film(5), "video_2": film(9)}, "5 and 9 frames"),
        (
            "blend",
            {"video": film(5), "video_2": film(5), "curve": [0.5]},
            "curve is two",
        ),
        (
            "blend",
            {"video": film(5), "video_2": film(5), "curve": [0, 2]},
            "curve is two",
        ),
        ("fill", {"video": film(1)}, "nothing to fill"),
        ("fill", {"video": film(3), "factor": 1}, "from 2 on"),
        ("fill", {"video": film(3), "factor": 9}, "9, more than a window of 9 frames"),
        ("replace", {"video": film(9), "first": 0, "last": 3}, "left on both sides"),
        ("replace", {"video": film(9), "first": 5, "last": 3}, "left on both sides"),
        ("inpaint", {"video": film(5), "mask": np.ones((4, 16, 16))}, "4 frames of 16"),
        ("inpaint", {"video": film(5), "mask": np.ones(3)}, "mask is"),
        ("outpaint", {"video": film(5)}, "larger height or width"),
        (
            "keyframes",
            {"images": film(2), "at": [3, 3]},
            "two keyframes are at frame 3",
        ),
        ("keyframes", {"images": film(2), "at": [3, 9]}, "frame 9; the video has .* 8"),
        ("keyframes", {"images": film(2), "at": [-1, 2]}, "not -1"),
        ("loop", {"num_frames": 5}, "5, too few for a circle: give 9"),
        ("loop", {"num_frames": 10}, "the nearest is 9 or 13"),
        ("loop", {"video": film(5)}, "video has no meaning"),
        ("keyframes", {"images": film(2), "at": [1]}, "2 images and 1 times"),
        ("vary", {"video": film(5), "step_cache": 0.1}, "step_cache|step cache"),
    ],
)
def test_wrong_inputs_get_one_sentence(pipe, task, arguments, message):
    with pytest.raises(
        (ValueError, FileNotFoundError, TypeError), match=message
    ) as error:
        pipe.run(task, "a cat", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["extend", "connect", "fill", "keyframes"])
def test_a_denoiser_that_was_not_trained_for_a_task_is_named(pipe, task):
    settings = dataclasses.replace(
        pipe.settings, trained_patterns=("none", "first_frame")
    )
    other = pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=settings
    )
    inputs = {
        "extend": {"video": film(5), "frames": 4},
        "connect": {"video": film(5), "video_2": film(5), "frames": 3},
        "fill": {"video": film(5)},
        "keyframes": {"images": film(1), "at": [4]},
    }[task]
    with pytest.raises(ValueError, match=f"'{task}' needs .* trained with none, first"):
        other.check_task(task, "a cat", **inputs)
    other.check_task("vary", "a cat", video=film(5))  # needs none
