"""Scenes of several shots: what they hold, what they show, and what they are not."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments import family_controls
from experiments.toyworld_controls import controls
from sora_jax.toyworld import captions, families, oracle, render, shots
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    SPLITS,
    Draws,
    Event,
    Scene,
    Slots,
    Subject,
    find_tier,
)


def scenes(count, tier="tw32", split="test") -> list[Scene]:
    return [families.scene(tier, split, i, {"shots": 1.0}) for i in range(count)]


def parts_of(scene: Scene) -> list[np.ndarray]:
    """The thing's path in each shot."""
    shot = scene.camera[:, 3]
    return [scene.pos[shot == k, 0] for k in range(int(shot[-1]) + 1)]


@pytest.mark.parametrize("tier", ["tw32", "tw64"])
@pytest.mark.parametrize("split", SPLITS)
def test_each_shot_is_as_stated(tier, split):
    size_class = find_tier(tier)
    for scene in scenes(25, tier, split):
        events, paths = scene.truth.events, parts_of(scene)
        assert len(events) == len(paths) == 1 + len(scene.later)
        assert len(paths) == 3 or split != "test_len"
        assert len({event.value for event in events}) == len(events)
        starts = np.cumsum([len(path) for path in paths])[:-1]
        for start, event in zip(starts, events[1:], strict=True):
            assert event.second in (None, start / size_class.fps)
        for event, path in zip(events, paths, strict=True):
            assert len(path) >= 4
            steps = np.diff(path, axis=0)
            np.testing.assert_allclose(
                steps, steps[:1].repeat(len(steps), 0), atol=3e-4
            )
            speed = np.hypot(*steps[0])
            if event.value == shots.REST:
                assert speed == 0
                continue
            unit = steps[0] / speed
            np.testing.assert_allclose(unit, DIRECTIONS[event.value], atol=1e-3)
            assert speed > 1.3 * size_class.fast[1] - 1e-3 or split != "test_ood"
        for before, after in itertools.pairwise(paths):
            away = np.hypot(*(after[0] - before[-1]))
            assert away >= scene.size / 4 - 1e-3
        backgrounds = (scene.background, *scene.later)
        assert len({str(one) for one in backgrounds}) == len(backgrounds)


def test_no_colour_moves_as_it_never_does_in_training():
    for scene in scenes(150, "tw64", "train"):
        colour = scene.truth.subjects[0].colour
        ways = {(colour, event.value) for event in scene.truth.events}
        assert not ways & HELD_OUT_DIRECTIONS
        text = captions.caption(scene, "alt")
        assert not captions.parse(text).held_out(), text
    moving = Slots((Subject("red"),), events=(Event("shot", value="down"),))
    assert moving.held_out()


def test_cuts_are_found_in_frames():
    for scene in scenes(12) + scenes(4, "tw64"):
        cut = 1 + np.flatnonzero(np.diff(scene.camera[:, 3]))
        starts, new = shots.cuts(oracle.read(render.render(scene)))
        np.testing.assert_array_equal(starts, cut)
        assert new.all()
    for family in ("motion", "camera", "attribute"):  # which have none
        for index in range(8):
            scene = families.scene("tw32", "test_ood", index, {family: 1.0})
            assert not len(shots.cuts(oracle.read(render.render(scene)))[0])


def changed(slots: Slots, k: int, **values) -> Slots:
    events = list(slots.events)
    events[k] = dataclasses.replace(events[k], **values)
    return dataclasses.replace(slots, events=tuple(events))


def failing(slots: Slots, reading: oracle.Reading) -> set[str]:
    verdict = oracle.score_slots(slots, reading)
    return {name for name, right in verdict.items() if not right} - {"pass"}


def test_each_part_is_judged_on_its_own():
    for scene in scenes(6):
        reading, slots = oracle.read(render.render(scene)), scene.truth
        (subject,), (first, second) = slots.subjects, slots.events
        cut = len(parts_of(scene)[0])

        assert failing(slots, reading) == set()
        colour = "red" if subject.colour != "red" else "blue"
        shape = "cross" if subject.shape != "cross" else "circle"
        for name, value in (("colour", colour), ("shape", shape)):
            one = dataclasses.replace(subject, **{name: value})
            wrong = dataclasses.replace(slots, subjects=(one,))
            assert failing(wrong, reading) == {name}
        other = next(w for w in DIRECTIONS if w not in (first.value, second.value))
        assert failing(changed(slots, 0, value=other), reading) == {"acts"}
        assert failing(changed(slots, 1, value=other), reading) == {"acts"}
        swapped = changed(changed(slots, 0, value=second.value), 1, value=first.value)
        assert failing(swapped, reading) == {"acts"}
        assert failing(changed(slots, 1, second=(cut + 1) / 8), reading) == set()
        assert failing(changed(slots, 1, second=(cut + 2) / 8), reading) == {"cuts"}
        one_more = dataclasses.replace(slots, events=(*slots.events, first))
        assert failing(one_more, reading) == {"acts", "cuts"}
        # And in the frames: one background, and another thing after the cut.
        same = dataclasses.replace(scene, later=(scene.background,))
        assert failing(slots, oracle.read(render.render(same))) == {"backgrounds"}
        thing = scene.objects[0]
        for name, value in (("colour", "green"), ("shape", "circle")):
            if getattr(thing, name) == value:
                continue
            other = dataclasses.replace(thing, **{name: value})
            video = render.render(scene)
            late = render.render(dataclasses.replace(scene, objects=(other,)))
            video[cut:] = late[cut:]
            assert failing(slots, oracle.read(video)) == {"same"}


def test_controls():
    table = controls("tw32", "shots", 16) | family_controls.controls(
        "tw32", "shots", 16
    )
    for name, (share, level) in table.items():
        if level is None or name == "truth":
            assert share >= 0.93, name
        else:
            assert share == pytest.approx(level, abs=0.05), name


def test_flow_ends_at_a_cut_and_pace_does_not():
    for scene in scenes(4):
        _, occluded = render.flow(scene)
        cut = np.diff(scene.camera[:, 3]) > 0
        assert occluded[cut].all() and not occluded[~cut].all((1, 2)).any()
        limit = find_tier(scene.tier).fast[1] + 1e-3
        assert np.hypot(*scene.vel[:, 0].T).max() <= limit


@pytest.mark.parametrize(
    ("text", "acts", "second"),
    [
        ("a red circle moves left, then elsewhere it waits", ("left", "rest"), None),
        (
            "a red circle waits, after half a second cut to a place where it goes up",
            ("rest", "up"),
            0.5,
        ),
        (
            "subject: red circle, motion: right, time: 0.75, next shot: motion: none",
            ("right", "rest"),
            0.75,
        ),
    ],
)
def test_free_texts(text, acts, second):
    events = (Event("shot", value=acts[0]), Event("shot", value=acts[1], second=second))
    stated = captions.parse(text)
    assert stated == Slots((Subject("red", "circle"),), events=events)
    assert stated.family == "shots"


def test_a_time_without_room_is_refused():
    scene = scenes(1)[0]
    slots = changed(scene.truth, 1, second=5.0)
    with pytest.raises(ValueError, match="no shots of 9 frames begin at"):
        shots.lay_out(Draws(0, "a", 0), find_tier("tw32"), "test", slots)
