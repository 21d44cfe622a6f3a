"""Consistency of subject and background, against what was changed in the clip."""

import numpy as np
import pytest

from sora_jax.evals.metrics import consistency, controls
from sora_jax.toyworld import families, render
from sora_jax.toyworld.scene import PALETTE


def clips(count, family="motion", seed=0):
    scenes = [
        families.scene("tw32", "test", i, {family: 1.0}, seed) for i in range(count)
    ]
    return np.stack([render.render(scene) for scene in scenes])


def consistent(video, frame_features):
    return consistency.similarity(consistency.of_frames(video, frame_features))


def squares(colours, grey=(120, 120, 120)):
    """A clip of a square that has these colours in turn: uint8 [1, t, h, w, 3]."""
    frames = []
    for t, colour in enumerate(colours):
        frame = np.full((16, 16, 3), grey, np.uint8)
        frame[4:10, 3 + t : 9 + t] = colour
        frames.append(frame)
    return np.stack(frames)[None]


def test_the_equation():
    """Vectors of known angles: the mean of two cosines, negative ones as zero."""
    angles = np.radians([0, 60, 120, 120])
    video = np.zeros((1, 4, 4, 4, 3), np.uint8)
    video[0, :, 0, 0, 0] = np.arange(4)

    def turning(frames_nhwc):
        index = np.round(frames_nhwc[:, 0, 0, 0] * 255).astype(int)
        return np.stack([np.cos(angles[index]), np.sin(angles[index])], 1) * 7

    expected = np.mean([(0.5 + 0.5) / 2, (0.5 + 0) / 2, (1 + 0) / 2])
    assert consistent(video, turning) == pytest.approx(expected)


def test_a_subject_that_changes_colour_or_vanishes():
    red, blue = PALETTE["red"], PALETTE["blue"]
    measure = consistency.subject_colours
    steady = consistent(squares([red] * 4), measure)
    assert steady == pytest.approx(1)
    # Two steps of the four frames' three are whole, and none is like the first.
    changed = consistent(squares([red, blue, blue, blue]), measure)
    assert changed == pytest.approx((0 + 0.5 + 0.5) / 3, abs=0.05)
    gone = consistent(squares([red, (120,) * 3, red, red]), measure)
    assert gone == pytest.approx((0 + 0.5 + 1) / 3)


def test_a_changing_background_lowers_its_own_consistency_only():
    video = clips(6)
    other = video.copy()
    grey = np.ptp(video.astype(int), axis=-1, keepdims=True) < 30
    inverted = np.where(grey, 255 - video, video)
    other[:, 5:] = inverted[:, 5:]
    measure = consistency.background_greys
    assert consistent(video, measure).min() > 0.97
    plain = squares([PALETTE["red"]] * 5, grey=(60, 60, 60))
    assert consistent(plain, measure) == pytest.approx(1, abs=1e-6)
    assert consistent(other, measure).max() < 0.75
    np.testing.assert_allclose(
        consistent(other, consistency.subject_colours),
        consistent(video, consistency.subject_colours),
        atol=0.01,
    )


def test_a_cut_to_another_clip_is_seen_by_both_features():
    video = clips(12, seed=3)
    cut = controls.make(video, names=[controls.CUT])[controls.CUT]
    for measure in (consistency.subject_colours, consistency.background_greys):
        whole = consistent(video, measure).mean()
        broken = consistent(cut, measure).mean()
        print(measure, whole, broken)
        assert broken < whole - 0.2


def test_batches_do_not_change_features(monkeypatch):
    video = clips(3)
    for measure in (consistency.subject_colours, consistency.background_greys):
        whole = consistency.of_frames(video, measure)
        with monkeypatch.context() as patch:
            patch.setattr(consistency, "_FRAMES_AT_ONCE", 4)
            batched = consistency.of_frames(video, measure)
        np.testing.assert_allclose(batched, whole, rtol=1e-6)


def test_errors_name_the_fault():
    video = np.zeros((1, 3, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="2 frames or more"):
        consistent(video[:, :1], consistency.subject_colours)
    with pytest.raises(ValueError, match="must be finite and"):
        consistent(video, lambda f: f)
    with pytest.raises(ValueError, match="must be finite and"):
        consistent(video, lambda f: np.full((len(f), 2), np.nan))
    with pytest.raises(ValueError, match="no frames"):
        consistent(video[:0], consistency.subject_colours)
    with pytest.raises(ValueError, match="4 pixels per side"):
        consistency.background_greys(np.zeros((1, 3, 8, 3)))
