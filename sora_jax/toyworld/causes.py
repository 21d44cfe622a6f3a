"""Scenes in which one thing changes by itself: its colour, or its size.

Letters: T frames, K objects, S shapes.
"""

import dataclasses

import numpy as np

from sora_jax.toyworld import wordings
from sora_jax.toyworld.generators import MARGIN, Layout, one_subject, thing_of
from sora_jax.toyworld.grammar import Wording
from sora_jax.toyworld.reading import PRESENT, Reading
from sora_jax.toyworld.render import AREA
from sora_jax.toyworld.rules import Verdict, passed
from sora_jax.toyworld.scene import (
    SHAPES,
    Draws,
    Event,
    Range,
    Slots,
    Subject,
    Tier,
)

CHANGES = ("recolour", "grow", "shrink")
GROWN = 1.2  # Least radius of what has grown, as a multiple of that before.
PLACE = 0.3  # How far it may be from where it was, as a share of its radius.
MONOTONE = 0.15  # Most that a share, or a radius as a share of it, may go back.
AS_LARGE = 0.3  # Most change of the area of what does not change its size.


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Radii of a tier's things that grow or shrink."""

    smallest: Range  # At its smallest, in pixels.
    grown: Range  # The larger radius as a multiple of the smaller one,
    far_grown: Range  # and beyond the range.


_SIZES = {
    "tw32": _Sizes((4.0, 4.4), (1.4, 1.55), (1.65, 1.75)),
    "tw64": _Sizes((5.0, 6.5), (1.4, 1.7), (1.85, 2.1)),
}


def choose_change(draws: Draws, tier: Tier, split: str) -> Slots:
    while True:  # until the new colour makes no pair that is held out
        subject, kind = one_subject(draws, tier, split), draws.choice(CHANGES)
        value = None
        if kind == "recolour":
            others = [name for name in tier.colours if name != subject.colour]
            value = draws.choice(others)
        events = (Event(kind, value=value),)
        slots = Slots((subject,), camera="static", total=1, events=events)
        if split == "test_comp" or not slots.held_out():
            return slots


def lay_out_change(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    """At rest; half of the new colours come at once, half spread from the middle."""
    event, beyond = slots.events[0], split == "test_ood"
    frames = tier.frames(split)
    start = round((frames - 1) * draws.uniform(0.2, 0.35))
    end = round((frames - 1) * draws.uniform(0.6, 0.8))
    if event.kind == "recolour":
        low, high = tier.ood_radius if beyond else tier.radius
        if draws.chance(0.5):
            start = end = round(draws.uniform(start, end))
        now, new = _recoloured(frames, start, end)
        thing = thing_of(0, slots.subjects[0], draws.uniform(low, high))
        things = (thing, dataclasses.replace(thing, id=1, colour=event.value))
        scale = np.stack([now, new], axis=1)
    else:
        radius, factor = _sizes_of(draws, tier, event.kind, beyond)
        things = (thing_of(0, slots.subjects[0], radius),)
        scale = _ramp(frames, start, end, factor)[:, None]
    room = things[0].radius * scale.max() + MARGIN
    spot = [draws.uniform(room, tier.size - room) for _ in range(2)]
    return Layout(things, path=np.tile(spot, (frames, len(things), 1)), scale=scale)


def _ramp(frames: int, start: int, end: int, factor: float) -> np.ndarray:
    """From 1 up to frame `start`, evenly to `factor` from frame `end` on: [T]."""
    return np.interp(np.arange(frames), [start, end], [1.0, factor])


def _recoloured(frames: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales [T] of a thing and of the one of the new colour that covers it.

    If `start` is `end`, that is the first frame of the new colour.
    """
    t = np.arange(frames)
    new = 1.0 * (t >= end)
    if start < end:
        new = np.clip((t - start) / (end - start), 0, 1)
    return 1.0 * (new < 1), new


def _sizes_of(draws: Draws, tier: Tier, kind: str, beyond: bool) -> tuple[float, float]:
    """The radius before, and that after as a multiple of it."""
    sizes = _SIZES[tier.name]
    small = draws.uniform(*sizes.smallest)
    factor = draws.uniform(*(sizes.far_grown if beyond else sizes.grown))
    if kind == "grow":
        return round(small, 3), factor
    return round(small * factor, 3), 1 / factor


# -- What is seen of it --------------------------------------------------------------


def _colour(reading: Reading, subject: Subject, other: str | None) -> str | None:
    """The subject's colour: as stated, else that of the largest thing of its shape."""
    if subject.colour is not None:
        return subject.colour
    early = reading.frame < max(1, reading.num_frames // 4)
    best, most = None, 0.0
    for c in np.unique(reading.colour[early]):
        rows = early & (reading.colour == c)
        name = reading.colours[c]
        area = float(reading.area[rows].sum())
        shape = SHAPES[int(reading.overlap[rows].mean(axis=0).argmax())]
        if name != other and area > most and subject.shape in (None, shape):
            best, most = name, area
    return best


@dataclasses.dataclass(frozen=True)
class _Blob:
    """One blob of one frame."""

    area: float
    centre: np.ndarray  # float64[2]
    overlap: np.ndarray  # float32[S]


def _blobs(reading: Reading, colour: str) -> list[list[_Blob]]:
    """The blobs of a colour by frame, largest first."""
    found: list[list[_Blob]] = [[] for _ in range(reading.num_frames)]
    index = reading.colours.index(colour)
    for row in np.flatnonzero(reading.colour == index):
        blob = _Blob(reading.area[row], reading.centre[row], reading.overlap[row])
        found[reading.frame[row]].append(blob)
    return found


def _shape_of(seen: list[_Blob]) -> str:
    """The shape that fits best on average."""
    return SHAPES[int(np.mean([blob.overlap for blob in seen], axis=0).argmax())]


def change(slots: Slots, reading: Reading) -> Verdict:
    """The stated colour and shape before; the stated change, in one direction.

    "change" is that it looks as stated in the end, "steady" that it never goes back,
    "same" that its place and shape stay, and with a new colour its size.
    """
    names = ("colour", "shape", "change", "steady", "same")
    parts = dict.fromkeys(names, False)
    event = slots.events[0]
    if event.of >= len(slots.subjects):
        return passed(parts)
    subject = slots.subjects[event.of]
    colour = _colour(reading, subject, event.value)
    if colour is None or colour == event.value:
        return passed(parts)
    own = _blobs(reading, colour)
    new = own if event.value is None else _blobs(reading, event.value)
    few = max(2, reading.num_frames // 8)
    starts = [seen[0] for seen in own[:few] if seen]
    ends = [seen[0] for seen in new[-few:] if seen]
    others = () if new is own else (*new[:few], *own[-few:])
    parts["colour"] = len(starts) >= few / 2
    if not parts["colour"]:
        return passed(parts)
    # All frames that show it as it was, and as it is: half of them each if it grows.
    if new is own:
        shown = [seen[0] for seen in own if seen]
        was, is_now = shown[: len(shown) // 2 + 1], shown[len(shown) // 2 :]
    else:
        pairs = list(zip(own, new, strict=True))
        was = [old[0] for old, late in pairs if old and not late]
        is_now = [late[0] for old, late in pairs if late and not old]
    shape = _shape_of(was or starts)
    parts["shape"] = subject.shape in (None, shape)
    if not is_now or len(ends) < few / 2:
        return passed(parts)
    area, last = (float(np.median([b.area for b in seen])) for seen in (starts, ends))
    radius = np.sqrt(area / AREA[shape])
    places = np.stack([blob.centre for blob in (*starts, *was, *is_now, *ends)])
    moved = np.hypot(*(places - starts[0].centre).T).max()
    parts["same"] = bool(_shape_of(is_now) == shape and moved <= PLACE * radius)
    if new is own:
        factor = np.sqrt(last / area) ** (1 if event.kind == "grow" else -1)
        parts["change"] = bool(factor >= GROWN)
        course = np.array([np.sqrt(seen[0].area / area) for seen in own if seen])
        course = course if event.kind == "grow" else -course
    else:
        parts["change"] = not any(others)
        if abs(last / area - 1) > AS_LARGE:
            parts["same"] = False
        totals = [[sum(b.area for b in seen) for seen in both] for both in (own, new)]
        before, after = np.array(totals)
        course = (after / np.maximum(before + after, 1e-6))[before + after > 0]
    back = float((np.maximum.accumulate(course) - course).max())
    enough = len(course) >= PRESENT * reading.num_frames
    parts["steady"] = bool(back <= MONOTONE and enough)
    return passed(parts)


# -- Wording --------------------------------------------------------------------------

CHANGE = Wording(
    short=(
        "{a0} {changes}",
        "{n0} {changes}",
        "{the0} {changes}",
        "here {a0} {changes}",
        "{a0} that {changes}",
        "{n0} that {changes}",
        "view of {a0} that {changes}",
        "see {a0} that {changes}",
    ),
    medium=(
        "we see {a0} that {changes}",
        "a video of {a0} that {changes}",
        "in this clip {a0} {changes}",
        "the scene shows {a0} that {changes}",
        "there is {a0} that {changes}",
        "{a0} keeps its place and {changes}",
        "{a0} in the scene {changes}",
        "the clip shows how {a0} {changes}",
    ),
    main=(
        "the video shows {a0} that keeps its place and {changes}",
        "in this clip {a0} {changes} without moving",
        "we see how {a0} {changes} in its place",
        "there is {a0} that {changes} without moving",
        "the scene shows {a0} that {changes} in its place",
        "{a0} keeps its place in the frame and {changes}",
        "{a0} does not move and {changes} during the clip",
        "the clip shows how {a0} {changes} without moving",
    ),
    extras=(
        (
            "nothing else happens in the clip",
            "the rest of the scene is the same from start to end",
            "all else is the same from start to end",
            "nothing else changes",
        ),
        wordings._TOTAL,
        wordings._TONE,
        wordings._CAMERA,
    ),
    structured=(
        "subject: {n0}; change: it {changes}",
        "{key_camera}",
        "background: {tone}",
    ),
    alt=(
        "{n0} {changes}",
        "{a0} {changes}",
        "my clip of {a0}",
        "cool video {n0} {changes}",
        "{n0} {changes} test footage",
        "look at this {n0}",
        "{n0} {changes} hd",
        "some {n0} that {changes}",
    ),
)
