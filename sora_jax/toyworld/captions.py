"""Captions of a scene in five tiers, and parsing of texts into slots.

`alt` is as noisy as captions of the web, `short` names the main object in a few words,
`medium` says what it does, `dense` describes everything, the most important first, and
`structured` is a list of keys and values. The first four describe a relation of two
objects from either one ("red left of blue", "blue right of red"); `structured` names the
left or upper object first, so that the order gives the positions.
"""

import dataclasses

from sora_jax.toyworld import grammar
from sora_jax.toyworld.families import FAMILIES
from sora_jax.toyworld.grammar import CAPTION_TIERS as TIERS
from sora_jax.toyworld.grammar import parse
from sora_jax.toyworld.scene import (
    CAMERAS,
    CONVERSE,
    OPPOSITE,
    SPEEDS,
    Draws,
    Scene,
    Slots,
    find_tier,
)

VERSION = 2  # Raise it when any caption changes: shards of other versions are refused.

# What a caption can state of a scene; "binding" is which of two subjects moves where.
ATTRIBUTES = (
    "colour",
    "shape",
    "direction",
    "speed",
    "side",
    "count",
    "camera",
    "binding",
)

__all__ = [
    "ATTRIBUTES",
    "TIERS",
    "VERSION",
    "caption",
    "captions",
    "exchanged",
    "parse",
    "stated",
]


def stated(scene: Scene, tier: str, variant: int = 0) -> tuple[str, Slots]:
    """A caption and the slots that it states (which may be wrong for `alt`)."""
    return _worded(scene, scene.truth, tier, variant)


def _worded(scene: Scene, slots: Slots, tier: str, variant: int) -> tuple[str, Slots]:
    """Words the slots as the scene's own are worded."""
    label = f"caption/{scene.tier}/{scene.split}/{scene.family}/{tier}/{variant}"
    draws = Draws(scene.seed, label, scene.index)
    return grammar.compose(slots, FAMILIES[scene.family].wording, tier, draws)


def caption(scene: Scene, tier: str, variant: int = 0) -> str:
    """One of a scene's captions in a tier; a variant always has the same text."""
    return stated(scene, tier, variant)[0]


def captions(scene: Scene) -> dict[str, str]:
    """The scene's captions by tier."""
    return {tier: caption(scene, tier) for tier in TIERS}


def exchanged(scene: Scene, tier: str, attribute: str, variant: int = 0) -> str | None:
    """A scene's caption with another value of one attribute in the same words.

    Args:
      scene: the scene, which the result describes wrongly.
      tier: of the caption, any but "alt".
      attribute: one of `ATTRIBUTES`.
      variant: of the caption.

    Returns:
      The caption; None where the caption does not state the attribute, or where any
      other value would make a held-out combination.
    """
    label = f"exchange/{scene.tier}/{scene.split}/{attribute}/{tier}/{variant}"
    draws = Draws(scene.seed, label, scene.index)
    others = [
        slots
        for slots in _others(scene, attribute)
        if slots.held_out() == scene.truth.held_out()
    ]
    if not others:
        return None
    text, _ = _worded(scene, draws.choice(others), tier, variant)
    return None if text == caption(scene, tier, variant) else text


def _others(scene: Scene, attribute: str) -> list[Slots]:
    """The scene's slots with each other value of one attribute."""
    slots, size_class = scene.truth, find_tier(scene.tier)
    if attribute == "side":
        if slots.relation is None:
            return []
        return [dataclasses.replace(slots, relation=CONVERSE[slots.relation])]
    if attribute == "count":
        if slots.count is None:
            return []
        numbers = {1, 2, 3, 4} - {slots.count}
        return [dataclasses.replace(slots, count=n, total=n) for n in sorted(numbers)]
    if attribute == "camera":
        if scene.family != "camera":
            return []
        names = [name for name in CAMERAS if name != slots.camera]
        return [dataclasses.replace(slots, camera=name) for name in names]
    if attribute == "binding":
        ways = [subject.direction for subject in slots.subjects]
        if len(ways) != 2 or None in ways or ways[0] == ways[1]:
            return []
        subjects = [
            dataclasses.replace(subject, direction=way)
            for subject, way in zip(slots.subjects, ways[::-1], strict=True)
        ]
        return [dataclasses.replace(slots, subjects=tuple(subjects))]
    values = {
        "colour": size_class.colours,
        "shape": size_class.shapes,
        "direction": size_class.directions,
        "speed": SPEEDS,
    }[attribute]
    found = []
    for k, subject in enumerate(slots.subjects):
        taken = {getattr(subject, attribute)}
        if None in taken:
            continue
        if attribute == "direction" and slots.events:  # along the same axis
            values = [OPPOSITE[subject.direction]]
        if attribute == "colour":  # which also tells subjects apart
            taken |= {other.colour for other in slots.subjects}
            taken |= {event.value for event in slots.events}
        for value in values:
            if value not in taken:
                subjects = list(slots.subjects)
                subjects[k] = dataclasses.replace(subject, **{attribute: value})
                found.append(dataclasses.replace(slots, subjects=tuple(subjects)))
    return found
