"""Flow against analytic motion and the renderer's, and what spoils a video."""

import numpy as np
import pytest

from sora_jax.evals.metrics import controls, temporal
from sora_jax.evals.prompts import make_clips
from sora_jax.toyworld import families, render
from tests.evals.metrics import textures


def drifting_texture(velocity, frames=5, size=40):
    return textures.drifting(velocity, frames, size)[None]


@pytest.mark.parametrize("velocity", [(0.3, 0.1), (1.2, -0.7), (-2.5, 1.5)])
def test_estimated_flow_of_a_translation(velocity):
    motion = temporal.estimate(drifting_texture(velocity))
    error = np.linalg.norm(motion.flow_bphwx - np.array(velocity), axis=-1)
    assert error[motion.followed_bphw].mean() < 0.15
    assert error[:, :, 8:-8, 8:-8].mean() < 0.08
    assert motion.followed_bphw.mean() > 0.75


def test_pixels_that_leave_the_frame_are_not_tracked():
    motion = temporal.estimate(drifting_texture((2.5, 0.0)))
    assert not motion.followed_bphw[..., -2:].any()
    assert motion.followed_bphw[..., 4:-6].mean() > 0.9


def motion_scenes(count):
    return [
        families.scene("tw32", "val", index, {"motion": 1.0}) for index in range(count)
    ]


def test_estimate_agrees_with_the_renderer_inside_objects():
    scenes = motion_scenes(16)
    video = np.stack([render.render(scene) for scene in scenes])
    exact, estimated = make_clips.exact_motion(scenes), temporal.estimate(video)
    moving = np.linalg.norm(exact.flow_bphwx, axis=-1) > 0.5
    both = moving & exact.followed_bphw & estimated.followed_bphw
    gap = np.linalg.norm(exact.flow_bphwx - estimated.flow_bphwx, axis=-1)
    print(f"\nmedian error inside objects {np.median(gap[both]):.2f} px a frame")
    assert np.median(gap[both]) < 0.3
    # The background rests, but for what the objects' edges drag along.
    assert np.median(np.linalg.norm(estimated.flow_bphwx, axis=-1)[~moving]) < 0.2


def test_exact_flow_exposes_spoilt_clips():
    """Along the true motion a still video has an error, and a shuffled one more."""
    scenes = motion_scenes(12)
    video = np.stack([render.render(scene) for scene in scenes])
    exact = make_clips.exact_motion(scenes)
    spoilt = controls.make(video)

    def error(clips, name="warping_error"):
        return temporal.measure(clips, exact)[name].mean()

    truth = error(video)
    print(
        f"\nground truth {truth:.2e}", {n: f"{error(c):.2e}" for n, c in spoilt.items()}
    )
    assert error(spoilt["still"]) > 3 * truth
    assert error(spoilt["time-reversed"]) > 10 * truth
    assert error(spoilt["frames shuffled"]) > 10 * truth


def test_estimated_flow_does_not_let_a_still_video_win_unnoticed():
    video = np.stack([render.render(scene) for scene in motion_scenes(12)])
    found = {"ground truth": temporal.measure(video)}
    found |= {n: temporal.measure(c) for n, c in controls.make(video).items()}
    means = {
        name: {key: value.mean() for key, value in values.items()}
        for name, values in found.items()
    }
    for name, values in means.items():
        print(name, {key: f"{value:.2e}" for key, value in values.items()})
    truth, still = means["ground truth"], means["still"]
    shuffled = means["frames shuffled"]
    # The still clips' errors are the lowest: it is the motion that gives them away.
    assert still["warping_error"] == 0 and still["motion"] == 0
    assert truth["motion"] > 0.1
    assert shuffled["warping_error"] > 2 * truth["warping_error"]
    assert shuffled["followed"] < truth["followed"] - 0.05


def test_flicker_is_seen_and_motion_is_not_punished():
    clip = drifting_texture((1.0, 0.5))
    light = 1 + 0.06 * (-1.0) ** np.arange(clip.shape[1])
    flickering = (clip * light[None, :, None, None, None]).clip(0, 255).astype(np.uint8)
    exact = temporal.Motion(
        np.broadcast_to(np.float32([1.0, 0.5]), (1, 4, 40, 40, 2)),
        np.ones((1, 4, 40, 40), bool),
    )
    steady = temporal.measure(clip, exact)["flicker"][0]
    assert steady < 0.003
    assert temporal.measure(flickering, exact)["flicker"][0] > 0.04
    # Without the flow the steady clip would look as if it flickered.
    none = temporal.Motion(np.zeros_like(exact.flow_bphwx), exact.followed_bphw)
    assert temporal.measure(clip, none)["flicker"][0] > 5 * steady


def test_chunks_and_types_do_not_change_the_flow(monkeypatch):
    clips = np.concatenate([drifting_texture((0.5, k * 0.3)) for k in range(5)])
    whole = temporal.estimate(clips)
    with monkeypatch.context() as patch:
        patch.setattr(temporal, "_PAIRS_AT_ONCE", 2)
        chunked = temporal.estimate(clips)
    np.testing.assert_allclose(chunked.flow_bphwx, whole.flow_bphwx, atol=1e-5)
    as_float = temporal.estimate(clips.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(as_float.flow_bphwx, whole.flow_bphwx, atol=1e-3)


def test_both_directions_are_those_of_the_reversed_clips(monkeypatch):
    """Also where the pairs do not fill the last chunk."""
    clips = np.concatenate([drifting_texture((0.5, k * 0.3)) for k in range(3)])
    monkeypatch.setattr(temporal, "_PAIRS_AT_ONCE", 5)
    found = temporal.estimate_both(clips)
    for motion, video in zip(found, (clips, clips[:, ::-1]), strict=True):
        wanted = temporal.estimate(video)
        np.testing.assert_allclose(motion.flow_bphwx, wanted.flow_bphwx, atol=1e-5)
        np.testing.assert_array_equal(motion.followed_bphw, wanted.followed_bphw)


def test_clips_without_tracked_pixels_have_nan():
    clip = drifting_texture((0.0, 0.0))
    nothing = temporal.Motion(
        np.zeros((1, 4, 40, 40, 2), np.float32), np.zeros((1, 4, 40, 40), bool)
    )
    found = temporal.measure(clip, nothing)
    assert np.isnan(found["warping_error"][0]) and found["followed"][0] == 0


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match="2 frames or more"):
        temporal.measure(np.zeros((1, 1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\[b, t, h, w, 3\]"):
        temporal.measure(np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="NaN"):
        temporal.measure(np.full((1, 2, 16, 16, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="the clips need"):
        wrong = temporal.estimate(drifting_texture((0, 0)))
        temporal.measure(drifting_texture((0, 0), frames=3), wrong)
