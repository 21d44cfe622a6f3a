import jax
import numpy as np
import pytest

from sora_jax.diffusion import known

GRID = (5, 2, 3)


@pytest.mark.parametrize(
    "pattern, kwargs, frames",
    [
        ("none", {}, []),
        ("first_frame", {}, [0]),
        ("head", {"head": 3}, [0, 1, 2]),
        ("tail", {"tail": 2}, [3, 4]),
        ("both", {"head": 2, "tail": 1}, [0, 1, 4]),
    ],
)
def test_named_patterns_give_whole_latent_frames(pattern, kwargs, frames):
    mask = known.mask(pattern, GRID, **kwargs)
    assert mask.shape == GRID and mask.dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(mask.all((1, 2))), frames)
    np.testing.assert_array_equal(mask.all((1, 2)), mask.any((1, 2)))


@pytest.mark.parametrize(
    "pattern, grid, kwargs, message",
    [
        ("first_frame", (1, 2, 2), {}, "at least 2 latent frames, not 1"),
        ("both", (2, 2, 2), {}, "at least 3 latent frames"),
        ("head", (3, 2, 2), {"head": 3}, "must leave at least one"),
        ("tail", (3, 2, 2), {"tail": 0}, "unknown, and one known"),
        ("random", (3, 2, 2), {}, "use sample_known"),
    ],
)
def test_patterns_that_leave_nothing_are_refused(pattern, grid, kwargs, message):
    with pytest.raises(ValueError, match=message):
        known.mask(pattern, grid, **kwargs)


def _frames(pattern, n=512, grid=GRID):
    mask = known.sample_known(jax.random.key(0), n, grid, {pattern: 1.0})
    mask = np.asarray(mask)
    assert mask.shape == (n, *grid) and mask.dtype == bool
    np.testing.assert_array_equal(mask.all((2, 3)), mask.any((2, 3)))
    return mask.any((2, 3))


def test_drawn_none_and_first_frame():
    assert not _frames("none").any()
    np.testing.assert_array_equal(_frames("first_frame").sum(0), [512, 0, 0, 0, 0])


@pytest.mark.parametrize("pattern", ["head", "tail"])
def test_drawn_ends_have_every_length(pattern):
    frames = _frames(pattern)
    if pattern == "tail":
        frames = frames[:, ::-1]
    assert np.all(np.diff(frames.astype(int), axis=1) <= 0)
    lengths = np.bincount(frames.sum(1), minlength=6)
    assert lengths[0] == lengths[5] == 0 and lengths[1:5].min() > 80


def test_drawn_both_keeps_both_ends_and_a_gap():
    frames = _frames("both")
    assert frames[:, 0].all() and frames[:, -1].all()
    assert (~frames).any(1).all()
    changes = np.abs(np.diff(frames.astype(int), axis=1)).sum(1)
    np.testing.assert_array_equal(changes, 2)
    splits = {tuple(row) for row in frames}
    assert len(splits) == 1 + 2 + 3  # all ways to give 2, 3 or 4 of 5 frames
    counts = np.bincount(frames.sum(1), minlength=5)[2:5] / len(frames)
    np.testing.assert_allclose(counts, 1 / 3, atol=0.06)


def test_drawn_random_gives_some_and_leaves_some():
    frames = _frames("random")
    counts = np.bincount(frames.sum(1), minlength=6)
    assert counts[0] == counts[5] == 0 and counts[1:5].min() > 80
    assert len({tuple(row) for row in frames}) == 2**5 - 2


def test_patterns_are_drawn_in_their_proportion_and_purely():
    mix = {"none": 0.5, "first_frame": 0.3, "tail": 0.2, "head": 0.0}
    draw = jax.jit(lambda key: known.sample_known(key, 2000, GRID, mix))
    frames = np.asarray(draw(jax.random.key(1))).any((2, 3))
    assert abs((~frames.any(1)).mean() - 0.5) < 0.05
    assert abs(frames[:, 0].mean() - 0.3) < 0.05
    assert abs(frames[:, -1].mean() - 0.2) < 0.05
    np.testing.assert_array_equal(draw(jax.random.key(1)), draw(jax.random.key(1)))


@pytest.mark.parametrize(
    "mix, message",
    [
        ({"first": 1.0}, "known-token pattern 'first' is unknown"),
        ({"none": 0.5, "head": 0.4}, "sum to 1, not 0.9"),
        ({"none": 1.5, "head": -0.5}, "'head' is negative"),
    ],
)
def test_wrong_mixes_are_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        known.Config(probabilities=mix)
    with pytest.raises(ValueError, match=message):
        known.sample_known(jax.random.key(0), 2, GRID, mix)


def test_an_image_has_no_room_for_a_known_frame():
    with pytest.raises(ValueError, match="at least 2 latent frames, not 1"):
        known.sample_known(jax.random.key(0), 2, (1, 2, 2), {"first_frame": 1.0})


def test_levels_give_known_tokens_their_own_small_level():
    tau_n = np.asarray([0.9, 0.01], np.float32)
    mask = np.broadcast_to(known.mask("first_frame", GRID), (2, *GRID))
    levels_n2, index = known.levels(jax.numpy.asarray(tau_n), mask, 0.05)
    np.testing.assert_allclose(levels_n2, [[0.9, 0.05], [0.01, 0.05]])
    want = np.where(mask, np.float32(0.05), tau_n[:, None, None, None])
    rows = np.arange(2)[:, None, None, None]
    np.testing.assert_array_equal(np.asarray(levels_n2)[rows, index], want)
    np.testing.assert_array_equal(known.token_tau(tau_n, mask, 0.05), want)
