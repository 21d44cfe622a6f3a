"""Things that change: what a scene shows, and each part of the rule on its own."""

import dataclasses

import numpy as np
import pytest

from sora_jax.toyworld import captions, families, oracle, render
from sora_jax.toyworld.scene import PALETTE, Event, Slots, Subject


def scenes(kind: str, count: int, split: str = "test", tier: str = "tw32") -> list:
    drawn = (families.scene(tier, split, i, {"change": 1.0}) for i in range(99))
    return [s for s in drawn if s.truth.events[0].kind == kind][:count]


def cover(scene, colour: str) -> np.ndarray:
    """Pixels of a colour in each frame, on plain grey: [T]."""
    flat = dataclasses.replace(scene.background, base=100.0, waves=())
    video = render.render(dataclasses.replace(scene, background=flat)).astype(float)
    hue = np.array(PALETTE[colour]) - 100.0
    return (np.abs(video - 100 - hue).max(-1) < 2).sum((1, 2))


@pytest.mark.parametrize("kind", ["grow", "shrink"])
def test_the_area_follows_the_square_of_the_scale(kind):
    for scene in scenes(kind, 4):
        (thing,) = scene.objects
        flat = dataclasses.replace(scene.background, base=100.0, waves=())
        video = render.render(dataclasses.replace(scene, background=flat)).astype(float)
        channel = int(np.argmax(np.abs(np.array(PALETTE[thing.colour]) - 100)))
        share = (video[..., channel] - 100) / (PALETTE[thing.colour][channel] - 100)
        wanted = render.AREA[thing.shape] * (thing.radius * scene.scale[:, 0]) ** 2
        np.testing.assert_allclose(share.sum((1, 2)), wanted, rtol=0.05)
        steps = np.diff(scene.scale[:, 0]) * (1 if kind == "grow" else -1)
        assert (steps >= 0).all() and (steps[[0, -1]] == 0).all()
        ratio = scene.scale[-1, 0] ** (1 if kind == "grow" else -1)
        assert 1.39 <= ratio <= 1.56


def test_a_new_colour_replaces_the_old_one_at_once_or_from_the_middle():
    lengths = set()
    for scene in scenes("recolour", 16):
        old, new = scene.objects
        value = scene.truth.events[0].value
        assert (old.colour, new.colour) == (scene.truth.subjects[0].colour, value)
        assert (old.shape, old.radius) == (new.shape, new.radius)
        before, after = cover(scene, old.colour), cover(scene, new.colour)
        assert before[0] > 0 == after[0] and after[-1] > 0 == before[-1]
        assert after[-1] == before[0]
        assert (np.diff(before) <= 0).all() and (np.diff(after) >= 0).all()
        lengths.add(int(((before > 0) & (after > 0)).sum()))
    assert 0 in lengths and max(lengths) >= 2


def test_beyond_the_range():
    for scene in scenes("grow", 4, "test_ood"):
        assert scene.scale[-1, 0] > 1.6
    for scene in scenes("recolour", 4, "test_ood"):
        assert scene.objects[0].radius > 5.5


def other_value(part: str, scene) -> Slots:
    """The facts of a scene with one of them changed."""
    truth = scene.truth
    (subject,), (event,) = truth.subjects, truth.events
    if part == "shape":
        shape = "circle" if subject.shape != "circle" else "square"
        subject = dataclasses.replace(subject, shape=shape)
    elif event.kind == "recolour":
        taken = {subject.colour, event.value}
        value = next(name for name in PALETTE if name not in taken)
        event = dataclasses.replace(event, value=value)
    else:
        event = Event("grow" if event.kind == "shrink" else "shrink")
    return dataclasses.replace(truth, subjects=(subject,), events=(event,))


@pytest.mark.parametrize("kind", ["recolour", "grow", "shrink"])
def test_each_part_is_judged_on_its_own(kind):
    (scene,) = scenes(kind, 1)
    reading = oracle.read(render.render(scene))
    assert all(oracle.score(scene, reading).values())
    verdict = oracle.score_slots(other_value("shape", scene), reading)
    assert not verdict["shape"] and sum(verdict.values()) == 4
    verdict = oracle.score_slots(other_value("change", scene), reading)
    assert not verdict["change"] and not verdict["pass"]
    assert verdict["colour"] and verdict["shape"]
    # Elsewhere in the end: another thing has come.
    pos = scene.pos.copy()
    way = np.where(pos[0, 0] < scene.size / 2, 4.0, -4.0)
    pos[-3:] += way
    verdict = oracle.score(scene, render.render(dataclasses.replace(scene, pos=pos)))
    assert not verdict["same"] and sum(verdict.values()) == 4
    # Back in between.
    scale = scene.scale.copy()
    scale[-4:-2] = scale[0]
    back = dataclasses.replace(scene, scale=scale)
    verdict = oracle.score(scene, render.render(back))
    assert not verdict["steady"] and sum(verdict.values()) == 4


def test_another_shape_in_the_end_is_another_thing():
    (scene,) = scenes("recolour", 1)
    old, new = scene.objects
    shape = "circle" if new.shape != "circle" else "cross"
    changed = (old, dataclasses.replace(new, shape=shape))
    video = render.render(dataclasses.replace(scene, objects=changed))
    verdict = oracle.score(scene, video)
    assert not verdict["same"] and not verdict["pass"]


@pytest.mark.parametrize("kind", ["recolour", "grow", "shrink"])
def test_the_order_of_the_frames_matters(kind):
    for scene in scenes(kind, 4):
        video = render.render(scene)
        orders = (
            video[::-1],
            video[:1].repeat(9, 0),
            video[[4, 0, 7, 2, 8, 1, 6, 3, 5]],
        )
        assert oracle.score(scene, video)["pass"]
        for changed in orders:
            assert not oracle.score(scene, changed)["pass"]


def test_what_shrinks_grows_in_the_other_order():
    for scene in scenes("shrink", 3):
        grows = dataclasses.replace(scene.truth, events=(Event("grow"),))
        assert oracle.score_slots(grows, render.render(scene)[::-1])["pass"]


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("a red circle turns blue", Slots((Subject("red", "circle"),), events=(Event("recolour", value="blue"),))),
        ("something cyan gets larger", Slots((Subject("cyan"),), events=(Event("grow"),))),
        ("a square shrinks", Slots((Subject(None, "square"),), events=(Event("shrink"),))),
        ("it grows", Slots()),
    ],
)  # fmt: skip
def test_free_prompts_are_understood(text, slots):
    assert captions.parse(text) == slots


def test_text_is_asked_only_for_what_it_states():
    for scene in scenes("recolour", 3):
        video = render.render(scene)
        value = scene.truth.events[0].value
        for text in (f"something turns {value}", f"a {scene.objects[0].shape} turns {value}"):  # fmt: skip
            assert oracle.score_slots(captions.parse(text), video)["pass"]


def test_no_pair_with_the_new_colour_is_held_out():
    for index in range(400):
        scene = families.scene("tw32", "train", index, {"change": 1.0})
        assert not scene.truth.held_out()
        for tier in captions.TIERS:
            assert not captions.parse(captions.caption(scene, tier)).held_out()
    turned = (Event("recolour", value="blue"),)
    assert Slots((Subject("red", "triangle"),), events=turned).held_out()
