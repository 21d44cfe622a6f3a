"""Each score against what was drawn: the truth is exact, or one clip must beat another."""

import dataclasses
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest
from scipy import ndimage, stats

from sora_jax.data.curation import (
    brightness,
    cut_count,
    letterbox,
    motion,
    sharpness,
    stages,
    text_area,
)
from sora_jax.toyworld import families, render
from tests.data.curation.folders import FPS, toy


def textured(shift_t2, size=64):
    """Waves in three directions, moved by (x, y) pixels in each frame."""
    shift_t2 = np.asarray(shift_t2, float)
    y, x = np.mgrid[:size, :size].astype(float)
    grey = np.full((len(shift_t2), size, size), 128.0)
    for turn, length in ((0.3, 11.0), (1.3, 17.0), (2.4, 14.0)):
        across = x - shift_t2[:, :1, None]
        down = y - shift_t2[:, 1:, None]
        along = across * math.cos(turn) + down * math.sin(turn)
        grey += 25 * np.sin(2 * math.pi * along / length)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("shift", [(0, 0), (1.5, 0), (-0.7, 2.0), (0, -4.0)])
def test_a_camera_that_moves_at_one_speed(shift):
    frames_thwc = textured(np.arange(7)[:, None] * np.array(shift))
    scores = motion.score(frames_thwc, FPS)
    speed = math.hypot(*shift) * FPS / 64
    assert scores["motion_camera"] == pytest.approx(speed, rel=0.02, abs=0.002)
    assert scores["motion"] == pytest.approx(speed, rel=0.02, abs=0.002)
    assert scores["jitter"] < 0.02 and scores["still"] == (speed == 0)
    assert scores["motion_share"] == pytest.approx(float(speed > 0), abs=0.01)


def test_speeds_are_of_time_and_of_the_shorter_side():
    moving = np.arange(5)[:, None] * np.array([1.0, 0.5])
    scores = motion.score(textured(moving), 8.0)
    faster = motion.score(textured(moving), 24.0)
    large = textured(moving).repeat(3, axis=1).repeat(3, axis=2)
    for name in ("motion", "motion_camera"):
        assert faster[name] == pytest.approx(3 * scores[name], rel=1e-4)
        assert motion.score(large, 8.0)[name] == pytest.approx(scores[name], rel=1e-3)


def test_a_shaking_camera_has_jitter_and_a_repeated_frame_is_still():
    steady = np.arange(9)[:, None] * np.array([1.0, 0.0])
    shaking = np.array([[t, 2.0 * (t % 2)] for t in range(9)])
    calm, shaken = (motion.score(textured(x), FPS) for x in (steady, shaking))
    # The camera's speed changes by 4 pixels a frame, from +2 to -2, at every frame.
    assert shaken["jitter"] == pytest.approx(4 * FPS / 64, rel=0.1)
    assert calm["jitter"] < 0.01
    slow = textured(steady[:5]).repeat(2, axis=0)
    assert motion.score(slow, FPS)["still"] == pytest.approx(0.5, abs=0.13)


def test_motion_orders_clips_by_their_true_flow():
    """Objects and cameras at random speeds; motion_local by the object's speed."""
    rng = np.random.default_rng(5)
    for family, bar in (("motion", 0.95), ("camera", 0.95)):
        true, found, local, speed = [], [], [], []
        for index in range(16):
            drawn = families.scene("tw64", "train", index, {family: 1.0}, 77)
            steps = rng.uniform(0, 2.2) * np.arange(5)
            camera = steps[:, None] * (drawn.camera[1] - drawn.camera[0])
            drawn = dataclasses.replace(
                drawn,
                pos=drawn.pos[:1]
                + steps[:, None, None] * (drawn.pos[1] - drawn.pos[0]),
                camera=drawn.camera[:1] + camera,
            )
            flow, _ = render.flow(drawn)
            scores = motion.score(render.render(drawn), FPS)
            true.append(np.linalg.norm(flow, axis=-1).mean())
            found.append(scores["motion"])
            local.append(scores["motion_local"])
            speed.append(np.linalg.norm(drawn.pos[1] - drawn.pos[0]))
        ranks = [stats.spearmanr(true, found).statistic]
        if family == "motion":
            ranks.append(stats.spearmanr(speed, local).statistic)
        print(family, ranks)
        assert min(ranks) >= bar


def test_pictures_have_no_motion_and_small_frames_are_read():
    for frames_thwc in (toy(0)[:1], toy(0)[:2], np.zeros((5, 8, 8, 3), np.uint8)):
        scores = stages.run(stages.STAGES, frames_thwc, FPS)
        assert {*scores} == {*stages.scores_of(stages.STAGES)}
    assert motion.score(toy(0)[:1], FPS) == dict.fromkeys(motion.SCORES, 0.0)


def test_blur_lowers_sharpness():
    frames_thwc = toy(1, "tw64")
    soft = ndimage.gaussian_filter(frames_thwc, (0, 1, 1, 0))
    softer = ndimage.gaussian_filter(frames_thwc, (0, 2, 2, 0))
    found = [sharpness.score(x, FPS)["sharpness"] for x in (frames_thwc, soft, softer)]
    assert found[0] > 3 * found[1] > 6 * found[2]
    # One bright pixel of 1 in a frame of 0: its Laplacian is -4 there, 1 at its sides.
    dot = np.zeros((1, 12, 12, 3), np.uint8)
    dot[:, 6, 6] = 255
    inner = 100  # pixels, without the edge
    variance = (16 + 4) / inner
    assert sharpness.score(dot, FPS)["sharpness"] == pytest.approx(variance, rel=1e-5)


def test_brightness_and_contrast_are_mean_and_spread():
    half = np.zeros((3, 8, 8, 3), np.uint8)
    half[:, :4] = 255
    half[2] = 0  # a fade to black
    scores = brightness.score(half, FPS)
    assert scores["brightness"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores["contrast"] == pytest.approx((0.5 + 0.5 + 0) / 3, abs=1e-5)
    assert scores["darkest_frame"] == 0
    green = np.full((1, 8, 8, 3), (0, 255, 0), np.uint8)
    assert brightness.score(green, FPS)["brightness"] == pytest.approx(0.587, abs=1e-3)


@pytest.mark.parametrize("rows, columns", [(0, 0), (8, 0), (0, 10), (6, 6)])
def test_black_bars_are_measured(rows, columns):
    frames_thwc = toy(2, "tw64").copy()
    frames_thwc[:, :rows] = frames_thwc[:, 64 - rows :] = 10
    frames_thwc[:, :, :columns] = frames_thwc[:, :, 64 - columns :] = 10
    area = 1 - (1 - rows / 32) * (1 - columns / 32)
    found = letterbox.score(frames_thwc, FPS)["letterbox"]
    assert found == pytest.approx(area, abs=1e-6)


def test_dark_clips_have_no_bars():
    night = toy(2, "tw64").copy()
    night[:, :30] = 5  # a sky above a street
    for frames_thwc in (night, np.zeros_like(night), night // 16):
        assert letterbox.score(frames_thwc, FPS)["letterbox"] == 0


def test_a_line_of_text_is_found_where_it_is():
    font = PIL.ImageFont.load_default(18)
    for index in range(6):
        large = PIL.Image.fromarray(toy(index, "tw64")[0]).resize((256, 256))
        assert text_area.score(np.asarray(large)[None], FPS)["text_area"] == 0
        draw = PIL.ImageDraw.Draw(large)
        box = draw.textbbox((20, 40 + 30 * index), "All that glitters", font=font)
        draw.text((20, 40 + 30 * index), "All that glitters", "white", font)
        grey_hw = np.asarray(large.convert("L"), np.float32) / 255
        found_hw = text_area.lines(grey_hw)
        left, top, right, bottom = map(int, box)
        inside = found_hw[top : bottom + 4, left - 6 : right + 6]
        assert inside.sum() == found_hw.sum() > 0.5 * (bottom - top) * (right - left)


def test_stripes_and_shapes_are_no_text():
    x = np.arange(256)
    fence = np.where(x // 4 % 2, 255, 0).astype(np.uint8)  # as high as the frame
    fence = np.broadcast_to(fence[None, None, :, None], (1, 256, 256, 3))
    edge = np.where(x[:, None] > x, 255, 0).astype(np.uint8)
    edge = np.broadcast_to(edge[None, ..., None], (1, 256, 256, 3))
    for frames_thwc in (fence, edge):
        assert text_area.score(frames_thwc, FPS)["text_area"] == 0


def test_cuts_inside_a_clip_are_counted():
    joined = np.concatenate([toy(0)[:5], toy(3)[:5], toy(7)[:7]])
    assert cut_count.score(joined, FPS) == {"cuts": 2.0}
    assert cut_count.score(toy(0), FPS) == {"cuts": 0.0}


def test_a_stage_that_breaks_its_word_is_named(monkeypatch):
    class Stage:
        NAME, VERSION, SCORES = "beauty", 1, {"beauty": "how it looks"}
        given: dict = {}

        def score(self, frames_thwc, fps):
            return self.given

    stage = Stage()
    monkeypatch.setitem(stages.STAGES, "beauty", stage)
    for given in ({}, {"beauty": 1.0, "more": 1.0}, {"beauty": math.nan}):
        stage.given = given
        with pytest.raises(ValueError, match="stage 'beauty' gave"):
            stages.run(["beauty"], toy(0), FPS)
    stage.given = {"beauty": 0.123456789}
    assert stages.run(["beauty"], toy(0), FPS) == {"beauty": 0.123457}
