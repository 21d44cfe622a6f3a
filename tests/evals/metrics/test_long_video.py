"""Drift, seams, repetition and loops, against what was put into the clip."""

import numpy as np
import pytest

from sora_jax.evals.metrics import controls, long_video
from sora_jax.toyworld import families, render


def clips(count, split="test_len", seed=0):
    scenes = [
        families.scene("tw32", split, i, {"motion": 1.0}, seed) for i in range(count)
    ]
    return np.stack([render.render(scene) for scene in scenes])


def test_known_slopes_are_measured():
    """A still picture that fades: every series is a straight line that is known."""
    picture = clips(1)[:, :1].astype(np.float64) / 255
    fade = np.linspace(0, 0.4, 17)[None, :, None, None, None]
    video = np.float32(2 * ((1 - fade) * picture + fade * 0.8) - 1)
    found = long_video.drift(video, fps=8)
    first = {k: v[0, 0] for k, v in long_video.series(video[:, :1]).items()}
    rate = 8 * 0.4 / 16
    assert found["brightness"] == pytest.approx(
        rate * (0.8 - first["brightness"]), 1e-4
    )
    for name in ("contrast", "saturation", "sharpness"):
        assert found[name] == pytest.approx(-rate * first[name], 1e-3), name


def test_an_outlying_frame_does_not_tilt_the_slope():
    values = 0.3 + 0.01 * np.arange(12.0)[None]
    values[0, [3, 7]] = 50.0, -20.0
    assert long_video.slope(values) == pytest.approx(0.01)


def test_motion_is_not_drift():
    video = clips(8)
    fading = controls.make(video, names=[controls.DRIFT])[controls.DRIFT]
    true, faded = (long_video.drift(v, fps=8) for v in (video, fading))
    for name in long_video.SERIES:
        assert np.abs(true[name]).mean() < np.abs(faded[name]).mean() / 4, name
    assert (faded["contrast"] < 0).all() and (faded["sharpness"] < 0).all()


def test_only_frames_at_a_seam_score_high():
    video = clips(8)
    assert long_video.seam_score(video, [8]).max() < 2
    for spoil in (controls.frame_dropped, controls.frame_twice):
        spoilt = spoil(video)
        assert long_video.seam_score(spoilt, [8]).min() > 3, spoil
        assert long_video.seam_score(spoilt, [5]).max() < 2, spoil
    assert long_video.seam_score(controls.with_cut(video), [8]).min() > 10
    assert not long_video.seam_score(np.repeat(video[:, :1], 17, axis=1), [8]).any()


def test_the_seam_score_has_its_formula():
    """Steps of 10, 12, 14, 40, 10, 12, 14 of 255: (40 - 12) / (1.4826 * 2)."""
    levels = np.cumsum([0, 10, 12, 14, 40, 10, 12, 14])
    video = np.broadcast_to(levels[None, :, None, None, None], (1, 8, 4, 4, 3)).astype(
        np.uint8
    )
    assert long_video.seam_score(video, [4]) == pytest.approx(28 / (1.4826 * 2), 1e-5)


def test_repetition_is_the_share_that_was_shown_before(monkeypatch):
    video = clips(8)
    assert not long_video.repetition(video).any()
    twice = np.concatenate([video[:, :8], video[:, :8]], axis=1)
    # Of 14 frames that have one two before them, the later 8 are repeats.
    np.testing.assert_allclose(long_video.repetition(twice), 8 / 14)
    assert (long_video.repetition(np.repeat(video[:, :1], 9, axis=1)) == 1).all()
    # Only frames at least so far back count.
    monkeypatch.setattr(long_video, "LEAST_LAG", 8)
    np.testing.assert_allclose(long_video.repetition(twice), 1)
    monkeypatch.setattr(long_video, "LEAST_LAG", 9)
    assert not long_video.repetition(twice).any()


def test_loops():
    video = clips(8)
    seamless = long_video.loop_ratio(controls.looped(video))
    np.testing.assert_allclose(seamless, 1, atol=0.25)
    assert (long_video.loop_ratio(video) > 2).all()
    still = long_video.loop_ratio(np.repeat(video[:, :1], 9, axis=1))
    assert np.isnan(still).all()
    np.testing.assert_allclose(
        long_video.loop_score(np.array([1, 4, 0.5, np.nan])), [1, 0.25, 0.5, 0]
    )
    # Steps of 3, and 12 back to the first frame.
    levels = np.array([0, 3, 6, 9, 12], np.uint8)[None, :, None, None, None]
    ramp = np.broadcast_to(levels, (1, 5, 4, 4, 3))
    assert long_video.loop_ratio(ramp) == pytest.approx(4, rel=1e-6)


def test_distances_are_those_of_each_pair():
    video = clips(2)[:, [0, 1, 2, 0, 5]]
    unit = video.reshape(2, 5, -1) / 255
    expected = np.sqrt(np.square(unit[:, :, None] - unit[:, None]).mean(3))
    found = long_video.frame_distances(video)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-7)
    steps = long_video.steps(video)
    np.testing.assert_allclose(steps, np.diagonal(expected, 1, 1, 2), rtol=1e-5)
    loops = long_video.loop_ratio(video)
    np.testing.assert_allclose(loops, expected[:, -1, 0] / np.median(steps, 1), 1e-5)


def test_clips_are_measured_independently():
    video = clips(3)
    for measure in (
        lambda v: long_video.seam_score(v, [8]),
        long_video.repetition,
        long_video.loop_ratio,
        lambda v: long_video.drift(v, fps=8)["sharpness"],
    ):
        alone = [measure(clip[None])[0] for clip in video]
        np.testing.assert_allclose(alone, measure(video), rtol=1e-6)


def test_errors_name_the_fault():
    video = np.zeros((1, 6, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="seams are frames 1 to 5"):
        long_video.seam_score(video, [6])
    with pytest.raises(ValueError, match="seams are frames 1 to 5"):
        long_video.seam_score(video, [])
    with pytest.raises(ValueError, match="3 steps are not seams"):
        long_video.seam_score(video, [2, 4])
    with pytest.raises(ValueError, match="3 frames or more"):
        long_video.repetition(video[:, :2])
    with pytest.raises(ValueError, match="3 frames or more"):
        long_video.loop_ratio(video[:, :2])
    with pytest.raises(ValueError, match="3 frames or more"):
        long_video.drift(video[:, :2], fps=8)
    with pytest.raises(ValueError, match="fps is 0"):
        long_video.drift(video, fps=0)
