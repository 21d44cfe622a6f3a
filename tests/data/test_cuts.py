"""Where shots begin, in whole clips and frame by frame."""

import numpy as np
import pytest

from sora_jax.data import cuts
from sora_jax.toyworld import families, render


def reel(seed):
    """Scenes of 9 to 33 frames, some at three times the speed, and their first frames."""
    rng = np.random.default_rng(seed)
    shots = []
    for index in range(25):
        drawn = families.scene("tw32", "test_len", index, None, seed)
        shot = render.render(drawn)[:: rng.choice([1, 3])]
        shots.append(shot[: rng.integers(min(6, len(shot)), len(shot) + 1)])
    return np.concatenate(shots), [*np.cumsum([len(shot) for shot in shots[:-1]])]


@pytest.mark.parametrize("seed", [301, 302])
def test_frame_by_frame_as_in_the_whole(seed):
    frames_thwc, truth = reel(seed)
    whole = [first for first, _ in cuts.shots(frames_thwc)[1:]]
    streamed = [*cuts.flagged(iter(frames_thwc))]
    assert all(a is b for (a, _), b in zip(streamed, frames_thwc, strict=False)) or (
        np.array_equal(np.stack([frame for frame, _ in streamed]), frames_thwc)
    )
    assert [t for t, (_, new) in enumerate(streamed) if new] == whole
    found, asked = {*whole}, {*map(int, truth)}
    assert 2 * len(found & asked) / (len(found) + len(asked)) >= 0.98


def test_frames_come_as_soon_as_they_are_decided():
    frames_thwc, _ = reel(303)
    taken = 0

    def source():
        nonlocal taken
        for frame_hwc in frames_thwc:
            taken += 1
            yield frame_hwc

    for given, _ in enumerate(cuts.flagged(source()), 1):
        assert taken <= given + 3
    assert given == len(frames_thwc)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_repeated_frames_are_no_steps(times):
    """A slow video: each frame several times, the same array or an equal one."""
    frames_thwc, _ = reel(304)
    whole = [first for first, _ in cuts.shots(frames_thwc)[1:]]
    repeated = [frame for frame in frames_thwc for _ in range(times)]
    found = [t for t, (_, new) in enumerate(cuts.flagged(repeated)) if new]
    assert found == [times * first for first in whole]
    moving = np.stack([np.roll(frames_thwc[0], 7 * t, axis=1) for t in range(8)])
    assert len(cuts.shots(moving)) == 1
    if times < 5:  # the steps around a frame that is repeated more often are all still
        assert len(cuts.shots(moving.repeat(times, axis=0))) == 1


def test_short_videos():
    frame_hwc = np.zeros((16, 16, 3), np.uint8)
    for count in range(3):
        given = [frame_hwc + np.uint8(200 * t) for t in range(count)]
        assert len([*cuts.flagged(given)]) == count
    assert [new for _, new in cuts.flagged([frame_hwc, frame_hwc + 200])] == [
        False,
        True,
    ]
