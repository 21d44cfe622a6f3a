"""Captions: what they say, that it is true, and the way back."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sora_jax.toyworld import captions, families, lexicon
from sora_jax.toyworld.scene import SPLITS, TIERS, Event, Slots, Subject

KINDS = [(tier, name) for name, f in families.FAMILIES.items() for tier in f.tiers]


def usual_tier(family: str) -> str:
    tiers = families.FAMILIES[family].tiers
    return "tw32" if "tw32" in tiers else tiers[0]


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(SPLITS),
    st.integers(0, 10**9),
    st.sampled_from(captions.TIERS),
    st.integers(0, 5),
)
@example(("tw32", "relation"), "train", 0, "dense", 0)
def test_parsing_gives_back_what_a_caption_says(
    kind, split, index, caption_tier, variant
):
    tier, family = kind
    scene = families.scene(tier, split, index, {family: 1.0})
    text, stated = captions.stated(scene, caption_tier, variant)
    assert captions.parse(text) == stated, text
    assert text == captions.caption(scene, caption_tier, variant)
    assert "  " not in text and text == text.strip().lower()
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
    if caption_tier != "alt":
        assert stated.family == family
        by_place = caption_tier == "structured"
        assert_true(stated, scene.truth.by_place() if by_place else scene.truth)


def assert_true(stated: Slots, truth: Slots) -> None:
    """All that is stated is true."""
    assert len(stated.subjects) <= len(truth.subjects)
    for said, real in zip(stated.subjects, truth.subjects, strict=False):
        for name, value in dataclasses.asdict(said).items():
            assert value is None or value == getattr(real, name)
    for name in ("count", "relation", "camera", "tone", "total"):
        value = getattr(stated, name)
        assert value is None or value == getattr(truth, name)
    left = [*truth.events]
    for said in stated.events:  # in the order of the truth's
        while not agrees(said, left.pop(0)):
            pass


def agrees(said: Event, real: Event) -> bool:
    """Whether what is stated of an event is true; None is not stated."""
    pairs = zip(dataclasses.astuple(said), dataclasses.astuple(real), strict=True)
    return all(value in (None, truth) for value, truth in pairs)


MAIN = {
    "attribute": ("colour", "shape"),
    "count": ("colour", "shape"),
    "relation": ("colour", "shape"),
    "motion": ("colour", "shape", "direction"),
    "motion_binding": ("colour", "shape", "direction"),
    "camera": (),
}


@pytest.mark.parametrize("family", sorted(MAIN))
def test_main_attributes_are_always_stated(family):
    for index in range(150):
        scene = families.scene("tw32", "train", index, {family: 1.0})
        for tier in ("short", "medium", "dense", "structured"):
            stated = captions.stated(scene, tier)[1]
            for subject in stated.subjects:
                assert all(getattr(subject, name) for name in MAIN[family])
            if family != "camera" or tier != "short":
                assert len(stated.subjects) == len(scene.truth.subjects)
            told = scene.truth.by_place() if tier == "structured" else scene.truth
            for name in ("count", "relation"):
                assert getattr(stated, name) == getattr(told, name)
            if family == "motion" and tier != "short":
                assert stated.subjects[0].speed == scene.truth.subjects[0].speed
        dense = captions.stated(scene, "dense")[1]
        assert dense.tone == scene.truth.tone


def test_structured_captions_name_the_object_at_the_left_or_above_first():
    same_order = set()
    for index in range(100):
        scene = families.scene("tw32", "train", index, {"relation": 1.0})
        told = captions.stated(scene, "structured")[1]
        looks = [(thing.colour, thing.shape) for thing in scene.objects]
        first, second = (
            scene.pos[0, looks.index((subject.colour, subject.shape))]
            for subject in told.subjects
        )
        axis = {"left": 0, "above": 1}[told.relation]
        assert first[axis] < second[axis]
        short = captions.stated(scene, "short")[1]
        same_order.add(told.subjects[0].colour == short.subjects[0].colour)
    assert same_order == {True, False}


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_lengths_by_tier(family):
    lengths = {tier: [] for tier in captions.TIERS}
    for index in range(200):
        scene = families.scene(usual_tier(family), "train", index, {family: 1.0})
        for tier, text in captions.captions(scene).items():
            lengths[tier].append(len(text.split()))
    two = len(scene.truth.subjects) > 1 or scene.truth.events  # more to say
    assert np.mean(lengths["short"]) <= (13 if two else 8)
    assert 6 <= np.mean(lengths["medium"]) <= (20 if two else 13)
    assert 25 <= min(lengths["dense"]) and max(lengths["dense"]) <= 70
    assert 30 <= np.mean(lengths["dense"]) <= 60


def test_everything_has_eight_phrases():
    tables = (
        lexicon.COLOURS,
        lexicon.SHAPES,
        lexicon.DIRECTION_PHRASES,
        lexicon.SPEEDS,
        lexicon.RELATIONS,
        lexicon.NUMBERS,
        lexicon.CAMERA_PHRASES,
        lexicon.TONES,
        lexicon.PLACE_PHRASES,
        lexicon.FALLS,
        lexicon.BOUNCES,
        lexicon.HITS,
        lexicon.SECONDS,
        lexicon.TURNS,
        lexicon.NEXT_CAMERA,
        {"cut": lexicon.CUTS, "wait": lexicon.WAITS},
        lexicon.CHANGES,
    )
    for table in tables:
        for value, phrases in table.items():
            assert len(set(phrases)) >= 8, value
    for entry in families.FAMILIES.values():
        for tier in ("alt", "short", "medium", "main"):
            assert len(set(getattr(entry.wording, tier))) >= 8


def test_vocabulary_is_small():
    mix = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}
    words = set()
    for index in range(1500):
        scene = families.scene("tw32", "train", index, mix)
        for text in captions.captions(scene).values():
            words |= set(re.findall(r"\w+", text))
    assert len(words) <= 270


def test_variants_differ_and_captions_are_fixed():
    scene = families.scene("tw32", "train", 5, {"motion": 1.0})
    assert len({captions.caption(scene, "dense", v) for v in range(20)}) == 20
    again = families.scene("tw32", "train", 5, {"motion": 1.0})
    assert captions.captions(scene) == captions.captions(again)
    assert tuple(captions.captions(scene)) == captions.TIERS


def test_alt_captions_are_as_noisy_as_specified():
    scenes = [families.scene("tw32", "train", i, {"motion": 1.0}) for i in range(3000)]
    stated = [captions.stated(scene, "alt")[1] for scene in scenes]
    unrelated = np.mean([slots == Slots() for slots in stated])
    assert unrelated == pytest.approx(0.10, abs=0.025)
    related = [
        (slots.subjects[0].colour, scene.truth.subjects[0].colour)
        for slots, scene in zip(stated, scenes, strict=True)
        if slots.subjects
    ]
    missing = np.mean([said is None for said, _ in related])
    wrong = np.mean([said is not None and said != real for said, real in related])
    # What would be a held-out pair by mistake is left out in place of it.
    assert missing == pytest.approx(0.31, abs=0.04)
    assert wrong == pytest.approx(0.08, abs=0.03)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("a red circle moves left", Slots((Subject("red", "circle", "left"),))),
        (
            "A blue square to the left of a yellow cross.",
            Slots(
                (Subject("blue", "square"), Subject("yellow", "cross")),
                relation="left",
            ),
        ),
        (
            "to the right of an orange disc is a green triangle",
            Slots(
                (Subject("green", "triangle"), Subject("orange", "circle")),
                relation="right",
            ),
        ),
        ("three cyan squares", Slots((Subject("cyan", "square"),), count=3)),
        (
            "a circle moves quickly up while a red ring goes down",
            Slots(
                (
                    Subject(None, "circle", "up", "fast"),
                    Subject("red", "ring", "down"),
                )
            ),
        ),
        ("the camera pans left", Slots(camera="pan-left")),
        ("something red", Slots((Subject("red"),))),
        ("a walk through the old town", Slots()),
        ("", Slots()),
    ],
)
def test_free_prompts_are_understood(text, slots):
    assert captions.parse(text) == slots


def test_families_of_texts():
    known = {
        "a red circle": "attribute",
        "two red circles": "count",
        "a red circle above a blue square": "relation",
        "a red circle moves up": "motion",
        "a red circle moves up and a blue square moves left": "motion_binding",
        "the camera zooms in, a red circle in view": "camera",
    }
    for text, family in known.items():
        assert captions.parse(text).family == family
    assert captions.parse("hello").family is None


# -- Prompts ---------------------------------------------------------------------------


def test_prompts_avoid_training_texts_and_held_out_pairs():
    mix = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}
    texts = {
        text
        for index in range(2500)
        for text in captions.captions(
            families.scene("tw32", "train", index, mix)
        ).values()
    }
    motion = families.prompts("motion", 256, 0, "tw32", texts)
    sides = families.prompts(
        "relation", 128, 0, "tw32", texts, relations=("left", "right")
    )
    for found, family, count in ((motion, "motion", 256), (sides, "relation", 128)):
        assert len({text for text, _ in found}) == count
        assert not {text for text, _ in found} & texts
        for text, slots in found:
            assert captions.parse(text) == slots
            assert slots.family == family and not slots.held_out()
    assert {slots.relation for _, slots in sides} == {"left", "right"}
    directions = [slots.subjects[0].direction for _, slots in motion]
    counts = [directions.count(name) for name in TIERS["tw32"].directions]
    assert min(counts) >= 40
    assert motion == families.prompts("motion", 256, 0, "tw32", texts)
    assert motion != families.prompts("motion", 256, 1, "tw32", texts)
    other = families.prompts("motion", 64, 0, "tw32", texts, held_out=True)
    assert all(slots.held_out() for _, slots in other)


def test_too_few_prompts_is_an_error():
    with pytest.raises(ValueError, match="only 0 of 20 distinct prompts"):
        families.prompts("camera", 20, tier="tw16", relations=("left",))
    with pytest.raises(ValueError, match="no toy-world family"):
        families.prompts("smoke", 1)
    with pytest.raises(ValueError, match="no caption tier"):
        captions.caption(families.scene("tw32", "train", 0), "long")


def facts(slots: Slots, first: Slots) -> dict[str, object]:
    """All that slots state, with the subjects in the order of `first`."""
    colours = [[s.colour for s in x.subjects] for x in (slots, first)]
    if len(slots.subjects) == 2 and colours[0] == colours[1][::-1]:
        relation = slots.relation and captions.CONVERSE[slots.relation]
        slots = dataclasses.replace(
            slots, subjects=slots.subjects[::-1], relation=relation
        )
    values = {"side": slots.relation, "count": slots.count, "camera": slots.camera}
    for name in ("colour", "shape", "direction", "speed", "place"):
        values[name] = [getattr(subject, name) for subject in slots.subjects]
    return values | {"tone": slots.tone}


@pytest.fixture(scope="module")
def scenes():
    return [families.scene("tw32", "train", index) for index in range(300)]


@pytest.mark.parametrize("caption_tier", captions.TIERS[1:])
def test_an_exchanged_caption_differs_in_that_attribute_alone(scenes, caption_tier):
    found = dict.fromkeys(captions.ATTRIBUTES, 0)
    for scene, attribute in itertools.product(scenes, captions.ATTRIBUTES):
        text = captions.exchanged(scene, caption_tier, attribute)
        if text is None:
            continue
        found[attribute] += 1
        was, stated = captions.stated(scene, caption_tier)
        assert text == captions.exchanged(scene, caption_tier, attribute)
        is_now = captions.parse(text)
        assert not is_now.held_out()
        before, after = facts(stated, stated), facts(is_now, stated)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"direction" if attribute == "binding" else attribute}, text
        # The words around the value stay.
        assert abs(len(text.split()) - len(was.split())) <= 6
    if caption_tier == "short":
        assert found.pop("speed") == 0
    assert min(found.values()) >= 10, found


def test_what_a_scene_lacks_cannot_be_exchanged():
    scene = families.scene("tw32", "train", 0, {"attribute": 1.0})
    for attribute in ("direction", "speed", "side", "count", "camera", "binding"):
        assert captions.exchanged(scene, "dense", attribute) is None
