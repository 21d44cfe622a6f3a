"""Amount, smoothness and distribution of motion, against motion that is known."""

import numpy as np
import pytest

from sora_jax.evals.metrics import controls, distances, motion, temporal
from sora_jax.evals.prompts import make_clips
from sora_jax.toyworld import families, render


def moving_scenes(count, seed=0, direction=None):
    found, index = [], 0
    while len(found) < count:
        scene = families.scene("tw32", "test", index, {"motion": 1.0}, seed)
        index += 1
        if direction in (None, scene.truth.subjects[0].direction):
            found.append(scene)
    return found


def uniform(velocity_px, shape=(1, 8, 32, 32)):
    """Motion in which every pixel moves alike, and all can be followed."""
    flow = np.broadcast_to(np.float32(velocity_px), (*shape, 2))
    return temporal.Motion(flow, np.ones(shape, bool))


def test_dynamic_degree_is_the_speed_of_the_fastest():
    found = motion.dynamic_degree(uniform((3.0, 4.0)), fps=8)
    assert found["dynamic_degree"] == pytest.approx(8 * 5 / 32)
    assert found["dynamic"] == 1
    # A twentieth of the pixels is enough, half of that is half the speed.
    flow = np.zeros((1, 8, 20, 20, 2), np.float32)
    flow[:, :, 0, :20, 0] = 2.0
    everywhere = np.ones(flow.shape[:-1], bool)
    some = motion.dynamic_degree(temporal.Motion(flow, everywhere), fps=8)
    assert some["dynamic_degree"] == pytest.approx(8 * 2 / 20)
    flow[:, :, 0, 10:] = 0
    half = motion.dynamic_degree(temporal.Motion(flow, everywhere), fps=8)
    assert half["dynamic_degree"] == pytest.approx(8 * 1 / 20)
    # What cannot be followed rests.
    lost = temporal.Motion(flow, np.zeros_like(everywhere))
    assert motion.dynamic_degree(lost, fps=8)["dynamic_degree"] == 0


def test_the_threshold_does_not_depend_on_size_or_rate():
    """6 pixels of 256 at 8 frames a second, in a quarter of the pairs."""
    for side, fps in ((256, 8), (32, 8), (32, 16)):
        limit = 6 / 256 * side * 8 / fps
        for speed, dynamic in ((0.99 * limit, 0), (1.01 * limit, 1)):
            still = uniform((speed, 0), (1, 8, side, side))
            assert motion.dynamic_degree(still, fps=fps)["dynamic"] == dynamic
    flow = np.zeros((1, 8, 16, 16, 2), np.float32)
    everywhere = np.ones(flow.shape[:-1], bool)
    for pairs, dynamic in ((1, 0), (2, 1)):
        flow[:, :pairs] = 3.0
        found = motion.dynamic_degree(temporal.Motion(flow, everywhere), fps=8)
        assert found["dynamic"] == dynamic


def test_estimated_degree_is_near_the_exact_one_and_steps_with_the_speed():
    scenes = moving_scenes(16)
    video = np.stack([render.render(scene) for scene in scenes])
    exact = motion.dynamic_degree(make_clips.exact_motion(scenes), fps=8)[
        "dynamic_degree"
    ]
    speed = np.array([np.linalg.norm(scene.vel[0, 0]) for scene in scenes])
    # Some objects fill less than a twentieth of the frame, 52 pixels.
    known = make_clips.exact_motion(scenes)
    moving = (np.abs(known.flow_bphwx).max(-1) > 0) & known.followed_bphw
    share = np.minimum(1, moving.sum((2, 3)) / 52).mean(1)
    np.testing.assert_allclose(exact, 8 / 32 * speed * share, rtol=1e-3)
    found = motion.dynamic_degree(temporal.estimate(video), fps=8)
    assert found["dynamic"].all()
    assert np.abs(found["dynamic_degree"] / exact - 1).mean() < 0.35
    assert np.corrcoef(found["dynamic_degree"], exact)[0, 1] > 0.8


def sliding(shifts, size=32):
    """A smooth texture at the given places: uint8 [1, t, h, w, 3]."""
    y, x = np.mgrid[:size, :size] + 0.5
    frames = []
    for shift in shifts:
        wave = np.sin((x - shift) * 0.45) + np.sin((y + 0.6 * (x - shift)) * 0.35)
        frames.append(np.repeat(128 + 40 * wave[..., None], 3, axis=2))
    return np.round(frames).astype(np.uint8)[None]


def test_steady_motion_is_smooth_and_nothing_else_is():
    steady = motion.smoothness(sliding(np.arange(8) * 1.0))
    assert steady > 0.9
    to_and_fro = motion.smoothness(sliding([0, 1, 0, 1, 0, 1, 0, 1]))
    jerky = motion.smoothness(
        sliding(np.cumsum([0, 0.3, 1.7, 0.2, 1.8, 0.3, 1.7, 0.2]))
    )
    assert to_and_fro < 0.05 and jerky < 0.5
    assert motion.smoothness(sliding(np.zeros(8))) == 0
    nothing = temporal.Motion(
        np.zeros((1, 7, 32, 32, 2), np.float32), np.zeros((1, 7, 32, 32), bool)
    )
    assert motion.smoothness(sliding(np.arange(8)), nothing) == 0


def test_exact_motion_backwards_explains_the_toy_world():
    scenes = moving_scenes(6)
    video = np.stack([render.render(scene) for scene in scenes])
    flow = np.zeros((6, 8, 32, 32, 2), np.float32)
    coloured = np.ptp(video[:, ::-1][:, :-1].astype(int), axis=-1) > 60
    for number, scene in enumerate(scenes):
        flow[number][coloured[number]] = -scene.vel[0, 0]
    # What the object is about to cover cannot be followed on.
    stays = make_clips.exact_motion(scenes).followed_bphw[:, 1:]
    followed = np.ones(flow.shape[:-1], bool)
    followed[:, 1:] = stays[:, ::-1]  # pair k begins with frame 8 - k
    exact = temporal.Motion(flow, followed)
    found = motion.smoothness(video, exact)
    print(found)
    assert found.min() > 0.55  # the rest is lost between pixels, at edges
    wrong = temporal.Motion(-flow, followed)
    assert motion.smoothness(video, wrong).max() < 0.2


def test_histograms_hold_direction_speed_and_change():
    right = motion.histograms(uniform((2.0, 0.0)), fps=8)
    assert right[0, 0] == pytest.approx((8 * 2 / 32) ** 0.5)
    assert right[0, 1:] == pytest.approx(np.zeros(15))
    down = motion.histograms(uniform((0.0, 2.0)), fps=8)
    assert down[0].argmax() == motion.DIRECTIONS // 4
    flow = np.zeros((1, 2, 16, 16, 2), np.float32)
    flow[:, 1, ..., 0] = 1.0
    faster = motion.histograms(
        temporal.Motion(flow, np.ones(flow.shape[:-1], bool)), fps=16
    )
    # Half the change of the velocity, over the one pair of pairs.
    assert faster[0, motion.DIRECTIONS] == pytest.approx(0.5**0.5)
    still = motion.histograms(uniform((0.0, 0.0)), fps=8)
    assert not still.any()


def test_the_motion_distance_sees_a_reversal_and_no_blur():
    video = np.stack(
        [render.render(s) for s in moving_scenes(48, seed=5, direction="right")]
    )
    clips, reference = video[:24], video[24:]
    kinds = {"given": clips} | controls.make(
        clips, names=(controls.BLURRED, controls.REVERSED)
    )
    described = {
        name: motion.histograms(temporal.estimate(c), fps=8)
        for name, c in kinds.items()
    }
    other = motion.histograms(temporal.estimate(reference), fps=8)
    far = {name: distances.frechet(d, other) for name, d in described.items()}
    print(far)
    assert far["time-reversed"] > 10 * far["blurred"]
    assert far["time-reversed"] > 10 * far["given"]


def test_clips_are_measured_independently():
    video = np.concatenate([sliding(np.arange(6) * k / 3) for k in range(4)])
    together = motion.smoothness(video)
    alone = [motion.smoothness(clip[None])[0] for clip in video]
    np.testing.assert_allclose(alone, together, rtol=1e-6)
    flows = temporal.estimate(video)
    one = temporal.Motion(flows.flow_bphwx[2:3], flows.followed_bphw[2:3])
    for measure in (motion.histograms, lambda m, fps: motion.dynamic_degree(m, fps=fps)["dynamic_degree"]):  # fmt: skip
        np.testing.assert_allclose(
            measure(one, fps=8)[0], measure(flows, fps=8)[2], rtol=1e-6
        )


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match="fps is 0"):
        motion.dynamic_degree(uniform((1, 1)), fps=0)
    with pytest.raises(ValueError, match="3 frames or more"):
        motion.smoothness(np.zeros((1, 2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="the clips need"):
        motion.smoothness(np.zeros((1, 4, 16, 16, 3), np.uint8), uniform((1, 1)))
    with pytest.raises(ValueError, match="3 frames"):
        motion.histograms(uniform((1, 1), (1, 1, 8, 8)), fps=8)
