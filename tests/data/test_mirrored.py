"""Captions of mirrored videos: side words change sides, or the text is refused."""

import pytest

from sora_jax.data import texts
from sora_jax.toyworld import captions, families
from sora_jax.toyworld import scene as scenes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a red circle moves left", "a red circle moves right"),
        ("Left of it, a dog turns RIGHT", "Right of it, a dog turns LEFT"),
        ("leftward, then rightwards", "rightward, then leftwards"),
        ("the leftmost cup; her right-hand", "the rightmost cup; her left-hand"),
        ("a bright light upright on a leftover shelf", None),
        ("it is to the left of a car", "it is to the right of a car"),
        ("he is right of the door", "he is left of the door"),
        ("a cat asleep", "a cat asleep"),
        ("", ""),
    ],
)
def test_sides_are_exchanged(text, wanted):
    """Words that only contain left or right stay as they are."""
    assert texts.mirrored(text) == (text if wanted is None else wanted)


@pytest.mark.parametrize(
    "text",
    [
        "right now a car stops",
        "one cup is left",
        "a bag left behind",
        "the dial turns clockwise",
        "it spins counter-clockwise",
        "a sign that reads OPEN",
        "walking east",
        "the sun is right in the middle",
        "all right",
    ],
)
def test_what_may_mean_something_else_is_refused(text):
    assert texts.mirrored(text) is None


SWAPPED = {"left": "right", "right": "left", "pan-left": "pan-right"}
SWAPPED |= {"pan-right": "pan-left", "top-left": "top-right", "top-right": "top-left"}
SWAPPED |= {"bottom-left": "bottom-right", "bottom-right": "bottom-left"}


def swapped(value):
    if isinstance(value, list):
        return [SWAPPED.get(one, one) for one in value]
    return SWAPPED.get(value, value)


@pytest.mark.parametrize("tier", ["short", "medium", "dense", "structured"])
def test_toy_captions_then_state_the_mirrored_scene(tier):
    refused = 0
    for index in range(300):
        scene = families.scene("tw32", "train", index)
        text, stated = captions.stated(scene, tier)
        if (other := texts.mirrored(text)) is None:
            refused += 1  # "a plus sign"
            continue
        found = captions.parse(other)
        wanted = {name: swapped(value) for name, value in stated.factors().items()}
        assert found == scenes.Slots.from_factors(wanted), text
    assert refused < 30
