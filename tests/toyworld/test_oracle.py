"""The oracle: exact on the truth, and fooled by no control."""

import dataclasses

import numpy as np
import pytest

from experiments.toyworld_controls import FLOORS, controls, degrade
from sora_jax.toyworld import captions, families, oracle, render, rules
from sora_jax.toyworld.scene import TIERS

PARTS = {
    "attribute": {"colour", "shape", "pass"},
    "count": {"colour", "count", "shape", "pass"},
    "relation": {"side", "colours", "shapes", "pass"},
    "motion": {"colour", "shape", "direction", "speed", "pass"},
    "motion_binding": {"colours", "shapes", "directions", "speeds", "pass"},
    "camera": {"camera", "colour", "shape", "pass"},
    "gravity": {"colour", "shape", "falls", "way", "bounce", "pass"},
    "collision": {
        "colours",
        "shapes",
        "approach",
        "meet",
        "separate",
        "momentum",
        "speeds",
        "pass",
    },
    "shots": {"colour", "shape", "same", "cuts", "backgrounds", "acts", "pass"},
    "to_and_fro": {"colour", "shape", "direction", "turns", "speeds", "end", "pass"},
    "camera_path": {"first", "second", "time", "colour", "shape", "pass"},
    "change": {"colour", "shape", "change", "steady", "same", "pass"},
}


def score_text(text: str, video: np.ndarray) -> dict[str, bool]:
    return oracle.score_slots(captions.parse(text), video)


def scenes(tier: str, family: str, count: int, split: str = "test") -> list:
    return [families.scene(tier, split, i, {family: 1.0}) for i in range(count)]


KINDS = [(tier, name) for name, f in families.FAMILIES.items() for tier in f.tiers]


@pytest.mark.parametrize(("tier", "family"), KINDS)
def test_truth_passes_in_every_split(tier, family):
    for split in ("test", "test_comp", "test_ood", "test_len"):
        for scene in scenes(tier, family, 5, split):
            verdict = oracle.score(scene, render.render(scene))
            assert set(verdict) == PARTS[family]
            assert all(verdict.values()), (split, scene.index, verdict)
            assert all(type(value) is bool for value in verdict.values())


@pytest.mark.parametrize("family", families.BASIC)
def test_control_table(family):
    """Tampered clips pass exactly as often as they are still true."""
    table = controls("tw32", family, 24)
    assert table.pop("truth")[0] >= FLOORS["truth"]
    for name in ("noise 8", "blur .7, noise 8", "blur 1, noise 12"):
        assert table.pop(name)[0] >= 0.97, name
    for name, (share, level) in table.items():
        assert share == pytest.approx(level, abs=0.05), name


def test_each_part_is_judged_on_its_own():
    scene = families.scene("tw32", "test", 3, {"motion": 1.0})
    video = render.render(scene)
    subject = scene.truth.subjects[0]
    wrong = {
        "colour": "red" if subject.colour != "red" else "blue",
        "shape": "circle" if subject.shape != "circle" else "cross",
        "direction": {"left": "up", "up": "left"}.get(subject.direction, "left"),
        "speed": {"slow": "fast", "fast": "slow"}[subject.speed],
    }
    for part, value in wrong.items():
        changed = dataclasses.replace(subject, **{part: value})
        slots = dataclasses.replace(scene.truth, subjects=(changed,))
        verdict = oracle.score_slots(slots, video)
        assert not verdict[part] and not verdict["pass"]
        if part != "colour":  # Without the object there is nothing to judge.
            assert sum(verdict.values()) == 3


def test_relation_is_signed_and_bound_to_its_objects():
    scene = next(
        s for s in scenes("tw32", "relation", 50) if s.truth.relation == "left"
    )
    video = render.render(scene)
    first, second = scene.truth.subjects
    a, b = (f"a {s.colour} {s.shape}" for s in (first, second))
    judge = score_text
    assert judge(f"{a} to the left of {b}", video)["pass"]
    assert judge(f"{b} to the right of {a}", video)["pass"]
    assert not judge(f"{a} to the right of {b}", video)["side"]
    assert not judge(f"{b} to the left of {a}", video)["side"]
    assert not judge(f"{a} above {b}", video)["side"]
    assert judge(f"{a} above {b}", video)["colours"]
    assert not judge(f"{a} to the left of {b}", video[:, :, ::-1])["pass"]
    blue = next(c for c in ("blue", "red", "green") if c not in (a + b))
    verdict = judge(f"{a} to the left of a {blue} {second.shape}", video)
    assert not verdict["colours"] and not verdict["side"] and not verdict["pass"]


def test_text_is_asked_only_for_what_it_states():
    scene = families.scene("tw32", "test", 3, {"motion": 1.0})
    video = render.render(scene)
    subject = scene.truth.subjects[0]
    way = subject.direction
    assert score_text(f"something moves {way}", video)["pass"]
    assert score_text(f"a {subject.shape} moves {way}", video)["pass"]
    assert score_text(f"a {subject.colour} thing moves {way}", video)["pass"]
    assert score_text("the camera stays still", video)["pass"]
    assert score_text("an old town in the rain", video) == {"pass": False}


def junk(size: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (5, size, size, 3))
    return {
        "black": np.zeros((5, size, size, 3), np.uint8),
        "grey": np.full((5, size, size, 3), 128, np.uint8),
        "noise": noise.astype(np.uint8),
        "all red": np.broadcast_to(np.uint8([220, 40, 40]), (5, size, size, 3)),
        "one frame": np.zeros((1, size, size, 3), np.uint8),
    }


@pytest.mark.parametrize("tier", sorted(TIERS))
def test_what_cannot_be_read_never_passes(tier):
    for name, video in junk(TIERS[tier].size).items():
        for family in [name for t, name in KINDS if t == tier]:
            scene = families.scene(tier, "test", 1, {family: 1.0})
            assert not oracle.score(scene, video)["pass"], (name, family)
        for text in ("a red circle", "the camera stays still", "a red circle moves up"):
            assert not score_text(text, video)["pass"], (name, text)


def test_only_toy_world_clips_are_read():
    for video, message in (
        (np.zeros((5, 32, 32, 3)), "uint8"),
        (np.zeros((5, 32, 32), np.uint8), "uint8"),
        (np.zeros((5, 32, 16, 3), np.uint8), "square"),
        (np.zeros((5, 40, 40, 3), np.uint8), "16, 32, 64"),
    ):
        with pytest.raises(ValueError, match=message):
            oracle.read(video)


def test_an_object_must_be_the_largest_of_its_frame():
    """A small red thing beside a large blue one is not a clip of a red thing."""
    scene = families.scene("tw32", "test", 0, {"relation": 1.0})
    big, small = (
        dataclasses.replace(thing, radius=radius)
        for thing, radius in zip(scene.objects, (6.0, 4.0), strict=True)
    )
    video = render.render(dataclasses.replace(scene, objects=(big, small)))
    assert score_text(f"a {big.colour} {big.shape}", video)["pass"]
    assert not score_text(f"a {small.colour} {small.shape}", video)["pass"]


def test_motion_must_be_uniform():
    """Frames out of order, a jump, and standing still are no motion."""
    scene = families.scene("tw32", "test", 3, {"motion": 1.0})
    video = render.render(scene)
    jump = np.concatenate([np.repeat(video[:1], 5, 0), np.repeat(video[-1:], 4, 0)])
    for changed in (video[[4, 0, 7, 2, 8, 1, 6, 3, 5]], jump, video[:1].repeat(9, 0)):
        assert not oracle.score(scene, changed)["direction"]


@pytest.mark.parametrize("tier", ["tw32", "tw64"])
def test_camera_is_tracked_through_noise_and_blur(tier):
    """Where it ends, in pixels and log zoom: clean, and as a 30 dB autoencoder does."""
    for scene in scenes(tier, "camera", 8):
        for sigma, noise, limit in ((0.01, 0.0, 0.16), (0.7, 8.0, 0.4)):
            video = degrade(render.render(scene), sigma, noise, scene.index)
            reading = oracle.read(video)
            assert rules.camera_class(reading) == scene.truth.camera
            first, last = scene.camera[0], scene.camera[-1]
            shift = (last[:2] - first[:2]) * np.exp(first[2])
            moved_d2, zoom_d = reading.camera.shift, reading.camera.zoom
            before_d = np.concatenate([[0.0], np.cumsum(zoom_d)[:-1]])
            found = (moved_d2 * np.exp(-before_d)[:, None]).sum(0)
            np.testing.assert_allclose(found, shift, atol=limit)
            assert zoom_d.sum() == pytest.approx(last[2] - first[2], abs=limit / 8)


def test_count_is_of_one_colour_and_exact():
    scene = next(s for s in scenes("tw32", "count", 40) if s.truth.count == 3)
    video = render.render(scene)
    subject = scene.truth.subjects[0]
    for number, word in ((2, "two"), (3, "three"), (4, "four")):
        verdict = score_text(f"{word} {subject.colour} {subject.shape}s", video)
        assert verdict["count"] == (number == 3)
