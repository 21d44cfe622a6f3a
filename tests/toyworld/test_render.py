"""Pictures: golden bits, pixel centres, background, flow and speed."""

import dataclasses
import hashlib
import json
import pathlib
import time

import numpy as np
import pytest

from sora_jax.toyworld import families, render
from sora_jax.toyworld.scene import PALETTE, TIERS, Object, Scene

GOLDEN = pathlib.Path(__file__).with_name("golden.json")


def digest(tier: str, family: str) -> str:
    """SHA-256 of 32 clips of each split's first indices, state and pixels."""
    found = hashlib.sha256()
    for index in range(32):
        split = ("train", "test", "test_ood", "test_len")[index % 4]
        scene = families.scene(tier, split, index, {family: 1.0})
        found.update(scene.to_json().encode())
        found.update(render.render(scene).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("tier", sorted(TIERS))
def test_golden_bits(tier):
    """Pixels never change without a new `scene.VERSION` (and new golden digests)."""
    golden = json.loads(GOLDEN.read_text())[tier]
    names = [name for name, f in families.FAMILIES.items() if tier in f.tiers]
    assert {name: digest(tier, name) for name in names} == golden


def lone(shape: str, x: float, y: float, radius: float = 4.5):
    """A still scene of one red object on plain grey."""
    scene = families.scene("tw32", "train", 0, {"attribute": 1.0})
    pos = np.tile([[x, y]], (scene.num_frames, 1, 1)).astype(float)
    flat = dataclasses.replace(scene.background, base=100.0, waves=())
    thing = Object(0, shape, "red", radius)
    return dataclasses.replace(
        scene, objects=(thing,), pos=pos, vel=0 * pos, background=flat
    )


@pytest.mark.parametrize("shape", render.AREA)
@pytest.mark.parametrize("place", [(16.0, 16.0), (15.3, 12.8)])
def test_pixel_centres_lie_at_halves(shape, place):
    """Area and centroid of what is drawn are those of the shape."""
    frame = render.render(lone(shape, *place))[0].astype(float)
    cover = (frame[..., 0] - 100) / (PALETTE["red"][0] - 100)
    middle = np.arange(32) + 0.5
    area = cover.sum()
    assert area == pytest.approx(render.AREA[shape] * 4.5**2, rel=0.03)
    x, y = (cover.sum(axis=0) @ middle / area, cover.sum(axis=1) @ middle / area)
    # Corners are drawn a little too full, which moves the triangle's centroid.
    assert (x, y) == pytest.approx(place, abs=0.12 if shape == "triangle" else 0.03)


def test_later_objects_cover_earlier_ones():
    scene = lone("circle", 16.0, 16.0)
    over = Object(1, "square", "blue", 2.0)
    both = dataclasses.replace(
        scene,
        objects=(*scene.objects, over),
        pos=np.repeat(scene.pos, 2, axis=1),
        vel=np.repeat(scene.vel, 2, axis=1),
    )
    frame = render.render(both)[0]
    assert tuple(frame[16, 16]) == PALETTE["blue"]
    assert tuple(frame[16, 13]) == PALETTE["red"]


def test_objects_come_grow_and_go():
    scene = lone("circle", 16.0, 16.0)
    scale = np.array([0, 0, 0.5, 1, 1, 1.25, 1.25, 0, 0], float)[:, None]
    scene = dataclasses.replace(scene, scale=scale)
    assert Scene.from_json(scene.to_json()) == scene
    video = render.render(scene).astype(float)
    cover = (video[..., 0] - 100) / (PALETTE["red"][0] - 100)
    wanted = np.pi * (4.5 * scale[:, 0]) ** 2
    np.testing.assert_allclose(cover.sum((1, 2)), wanted, rtol=0.03, atol=1e-6)
    owners = [render._owner(scene, t, *np.mgrid[0:32, 0:32]).max() for t in range(9)]
    np.testing.assert_array_equal(np.array(owners) == 0, scale[:, 0] > 0)


def test_each_shot_has_its_background():
    scene = families.scene("tw32", "train", 0, {"attribute": 1.0})
    other = families.scene("tw32", "train", 1, {"attribute": 1.0}).background
    camera = scene.camera.copy()
    camera[4:, 3] = 1
    cut = dataclasses.replace(scene, camera=camera, later=(other,))
    assert Scene.from_json(cut.to_json()) == cut
    wholes = [
        render.render(dataclasses.replace(scene, background=back))
        for back in (scene.background, other)
    ]
    video = render.render(cut)
    np.testing.assert_array_equal(video[:4], wholes[0][:4])
    np.testing.assert_array_equal(video[4:], wholes[1][4:])


@pytest.mark.parametrize("tier", sorted(TIERS))
def test_background_is_neutral_and_strong_enough(tier):
    """An autoencoder of 30 dB cannot drop it, and nobody takes it for an object."""
    for index in range(40):
        scene = families.scene(tier, "train", index, {"motion": 1.0})
        empty = dataclasses.replace(
            scene, objects=(), pos=scene.pos[:, :0], vel=scene.vel[:, :0]
        )
        frame = render.render(empty)[0].astype(float)
        assert (np.ptp(frame, axis=2) == 0).all()
        assert frame.min() > 40 and frame.max() < 215
        waves = np.array(scene.background.waves)
        rms = np.sqrt((waves[:, 3] ** 2).sum() / 2)
        assert 20 / 2**0.5 - 1e-3 <= rms <= 25 / 2**0.5 + 1e-3
        assert (2 * np.pi / np.hypot(waves[:, 0], waves[:, 1]) >= 9.99).all()


@pytest.mark.parametrize("family", ["motion", "motion_binding", "camera"])
def test_flow_carries_one_frame_to_the_next(family):
    for index in range(12):
        scene = families.scene("tw32", "train", index, {family: 1.0})
        video = render.render(scene).astype(float)
        flow, occluded = render.flow(scene)
        steps, size = len(flow), scene.size
        assert flow.shape == (steps, size, size, 2) and flow.dtype == np.float32
        pixel = np.arange(size)
        for t in (0, steps - 1):
            x = pixel[None, :] + flow[t, ..., 0]
            y = pixel[:, None] + flow[t, ..., 1]
            inner = (x >= 0) & (y >= 0) & (x < size - 1) & (y < size - 1)
            x0, y0 = np.clip(x, 0, size - 2).astype(int), np.clip(y, 0, size - 2)
            y0 = y0.astype(int)
            fx, fy = (x - x0)[..., None], (y - y0)[..., None]
            after = video[t + 1]
            found = (after[y0, x0] * (1 - fx) + after[y0, x0 + 1] * fx) * (1 - fy)
            found += (after[y0 + 1, x0] * (1 - fx) + after[y0 + 1, x0 + 1] * fx) * fy
            off = np.abs(found - video[t]).max(axis=2)
            used = inner & ~occluded[t]
            assert used.mean() > 0.75
            # Edges of objects are not bilinear; all the rest is.
            assert np.quantile(off[used], 0.8) < 3.0
            still = np.abs(video[t + 1] - video[t]).max(axis=2)
            moved = still[used] > 20
            if moved.any():
                assert off[used][moved].mean() < 0.5 * still[used][moved].mean()


def test_occlusion_is_reported():
    scene = lone("circle", 16.0, 16.0)
    pos = scene.pos.copy()
    pos[:, 0, 0] += 2.0 * np.arange(scene.num_frames) - 8
    moving = dataclasses.replace(scene, pos=pos)
    flow, occluded = render.flow(moving)
    assert flow[0, 16, 8] == pytest.approx([2.0, 0.0])  # On the circle,
    assert flow[0, 16, 20] == pytest.approx([0.0, 0.0])  # on the background,
    assert occluded[0, 16, 13] and not occluded[0, 16, 20]  # just ahead of it.


def test_five_hundred_clips_a_second_on_one_core():
    """Time of this process's core, so that other work on the machine hardly counts."""
    mix = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}

    def seconds() -> float:
        start = time.process_time()
        for index in range(100):
            render.render(families.scene("tw32", "train", index, mix))
        return time.process_time() - start

    assert 100 / min(seconds() for _ in range(5)) >= 500
