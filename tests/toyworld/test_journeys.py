"""Things that come back and cameras that move twice: exact paths, and each part judged."""

import dataclasses

import numpy as np
import pytest

from experiments import family_controls
from experiments.toyworld_controls import controls
from sora_jax.toyworld import captions, families, journeys, oracle, render
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    SPLITS,
    Event,
    Scene,
    Slots,
    Subject,
    find_tier,
)


def scenes(family, count, tier="tw32", split="test") -> list[Scene]:
    return [families.scene(tier, split, i, {family: 1.0}) for i in range(count)]


def failing(slots: Slots, reading: oracle.Reading) -> set[str]:
    verdict = oracle.score_slots(slots, reading)
    return {name for name, right in verdict.items() if not right} - {"pass"}


def with_event(slots: Slots, k: int, **values) -> Slots:
    events = list(slots.events)
    events[k] = dataclasses.replace(events[k], **values)
    return dataclasses.replace(slots, events=tuple(events))


def with_subject(slots: Slots, **values) -> Slots:
    subject = dataclasses.replace(slots.subjects[0], **values)
    return dataclasses.replace(slots, subjects=(subject,))


def other(value: str, *values: str) -> str:
    return next(one for one in values if one != value)


# -- There and back --------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["tw32", "tw64"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_way_there_is_the_way_back(tier, split):
    """Speeds are equal, turns as many as stated, and bounces at the edges."""
    size_class, seen = find_tier(tier), set()
    for scene in scenes("to_and_fro", 40, tier, split):
        subject, kind = scene.truth.subjects[0], scene.truth.events[0].value
        steps = np.diff(scene.pos[:, 0], axis=0)
        speed = np.hypot(*steps[0])
        np.testing.assert_allclose(
            steps[0] / speed, DIRECTIONS[subject.direction], atol=1e-3
        )
        assert speed > 1.3 * size_class.fast[1] - 1e-3 or split != "test_ood"
        ways = {(subject.colour, w) for w in (subject.direction,)}
        ways |= {(subject.colour, journeys.OPPOSITE[subject.direction])}
        assert not ways & HELD_OUT_DIRECTIONS
        seen.add(kind)
        if kind != "bounce":
            turned = np.abs(np.diff(steps, axis=0)).max(axis=1) > 0.1
            assert turned.sum() == {"back": 1, "twice": 3}[kind]
            np.testing.assert_allclose(np.hypot(*steps.T), speed, atol=1e-3)
            np.testing.assert_allclose(scene.pos[0], scene.pos[-1], atol=1e-3)
            continue
        # Mirrored at walls that its edge touches, it would go straight on.
        room = scene.objects[0].radius + 0.5
        t = np.arange(scene.num_frames)[:, None]
        straight = scene.pos[0, 0] + t * steps[0]
        span = scene.size - 2 * room
        folded = span - abs(span - (straight - room) % (2 * span)) + room
        np.testing.assert_allclose(
            scene.pos[:, 0], folded, atol=6e-3
        )  # rounded steps add up
        outside = (straight < room - 1e-3) | (straight > scene.size - room + 1e-3)
        assert outside.any() and "-" in subject.direction
    assert ("twice" in seen) == (scene.num_frames > 16)
    assert ("bounce" in seen) == (tier == "tw64") and "back" in seen


def test_turns_of_a_series():
    assert journeys.turns(np.array([0.0, 2, 4, 6, 4, 2, 0])) == [3]
    assert journeys.turns(np.array([0.0, 0.2, 3, 6, 6.1, 5.9, 3, 0.1, 3])) == [4, 7]
    assert journeys.turns(np.array([0.0, 1, 2, 3])) == []
    assert journeys.turns(np.array([0.0, 0.3, -0.3, 0.2])) == []


def test_each_part_of_a_way_is_judged_on_its_own():
    for scene in scenes("to_and_fro", 12) + scenes("to_and_fro", 12, "tw64"):
        reading, slots = oracle.read(render.render(scene)), scene.truth
        subject, kind = slots.subjects[0], slots.events[0].value
        assert failing(slots, reading) == set()
        for name, values in {
            "colour": ("red", "blue"),
            "shape": ("circle", "cross"),
            "direction": ("left", "up"),
        }.items():
            wrong = other(getattr(subject, name), *values)
            assert failing(with_subject(slots, **{name: wrong}), reading) == {name}
        if kind != "bounce":
            wrong = other(kind, "back", "twice")
            assert failing(with_event(slots, 0, value=wrong), reading) == {"turns"}
            # Drifting across its way, it is not where it began.
            t = np.linspace(0, 1, scene.num_frames)[:, None, None]
            away = 0.8 * np.ptp(scene.pos, axis=0).max() * t
            across = np.array(DIRECTIONS[subject.direction])[::-1] * (1, -1)
            aside = dataclasses.replace(scene, pos=scene.pos + away * across)
            assert "end" in failing(slots, oracle.read(render.render(aside)))
        else:
            wrong = with_event(slots, 0, value="twice")
            assert "turns" in failing(wrong, reading)
            middle = scene.size / 2 + 0.6 * (scene.pos - scene.size / 2)
            inner = dataclasses.replace(scene, pos=middle)
            assert failing(slots, oracle.read(render.render(inner))) == {"end"}


def test_another_pace_back_is_found():
    for scene in scenes("to_and_fro", 40, "tw64"):
        if scene.truth.events[0].value != "back":
            continue
        place = np.interp(np.arange(17), (0, 5, 16), (0, 8, 16))
        path = [np.interp(place, np.arange(17), x) for x in scene.pos[:, 0].T]
        pos = np.stack(path, -1)[:, None]
        video = render.render(dataclasses.replace(scene, pos=pos))
        assert failing(scene.truth, oracle.read(video)) == {"speeds"}


# -- Two motions of the camera ---------------------------------------------------------


@pytest.mark.parametrize("tier", ["tw32", "tw64"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_camera_moves_as_stated(tier, split):
    """On the screen: a resting point moves by the pace, and sizes by the zoom."""
    size_class = find_tier(tier)
    stretch = {"test_ood": 1.4, "test_len": 0.7}.get(split, 1.0)
    for scene in scenes("camera_path", 25, tier, split):
        names = [event.value for event in scene.truth.events]
        assert names[0] != names[1]
        zoom = np.diff(scene.camera[:, 2])
        shift = np.diff(scene.camera[:, :2], axis=0) * np.exp(scene.camera[:-1, 2:3])
        found = []
        for dz, (dx, dy) in zip(zoom, shift, strict=True):
            low, high = np.array(size_class.zoom) * stretch
            if abs(dz) > 1e-3:
                assert low - 2e-4 <= abs(dz) <= high + 2e-4
                assert abs(dx) + abs(dy) < 1e-3
                found.append("zoom-in" if dz > 0 else "zoom-out")
                continue
            low, high = np.array(size_class.pan) * stretch
            assert low - 1e-3 <= max(abs(dx), abs(dy)) <= high + 1e-3
            assert min(abs(dx), abs(dy)) < 1e-3
            way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else None
            found.append(f"pan-{way}" if way else f"tilt-{'down' if dy > 0 else 'up'}")
        number = found.count(names[0])
        assert found == [names[0]] * number + [names[1]] * (len(found) - number)
        assert 0.3 * len(found) <= number <= 0.7 * len(found)
        second = scene.truth.events[1].second
        assert second in (None, number / size_class.fps)


def test_each_part_of_a_camera_path_is_judged_on_its_own():
    for scene in scenes("camera_path", 10):
        reading, slots = oracle.read(render.render(scene)), scene.truth
        first, second = (event.value for event in slots.events)
        when = journeys.change(reading)
        assert failing(slots, reading) == set()
        wrong = next(
            n for n in ("pan-left", "tilt-up", "zoom-in") if n not in (first, second)
        )
        assert failing(with_event(slots, 0, value=wrong), reading) == {"first"}
        assert failing(with_event(slots, 1, value=wrong), reading) == {"second"}
        exchanged = with_event(with_event(slots, 0, value=second), 1, value=first)
        assert {"first", "second"} <= failing(exchanged, reading)
        for late, parts in ((2, set()), (3, {"time"})):
            at = with_event(slots, 1, second=(when + late) / 8)
            assert failing(at, reading) == parts
        colour = other(slots.subjects[0].colour, "red", "blue")
        assert "colour" in failing(with_subject(slots, colour=colour), reading)
        shape = other(slots.subjects[0].shape, "circle", "cross")
        assert failing(with_subject(slots, shape=shape), reading) == {"shape"}


@pytest.mark.parametrize("family", ["to_and_fro", "camera_path"])
def test_controls(family):
    table = controls("tw32", family, 12) | family_controls.controls("tw32", family, 12)
    for name, (share, level) in table.items():
        if level is None or name == "truth":
            assert share >= 0.9, name
        else:
            assert share == pytest.approx(level, abs=0.05), name


def test_free_texts():
    ball = (Subject("red", "circle", "left"),)
    for text, kind in (
        ("a red ball goes left and comes back", "back"),
        ("a red ball goes left and comes back twice", "twice"),
        ("a red ball goes left and bounces off the edge", "bounce"),
    ):
        slots = captions.parse(text)
        assert slots == Slots(ball, events=(Event("turn", value=kind),))
        assert slots.family == "to_and_fro"
    slots = captions.parse("the camera pans left, after one second it then zooms in")
    moves = (
        Event("camera", value="pan-left"),
        Event("camera", value="zoom-in", second=1.0),
    )
    assert slots == Slots(events=moves) and slots.family == "camera_path"
    twice = captions.parse("the camera pans left, all the while the camera pans left")
    assert twice == Slots(camera="pan-left")


def test_what_cannot_be_read_is_not_shown():
    grey = np.full((1, 32, 32, 3), 128, np.uint8)
    for family in ("to_and_fro", "camera_path"):
        slots = scenes(family, 1)[0].truth
        for video in (grey, grey.repeat(9, 0)):
            assert not oracle.score_slots(slots, video)["pass"]
