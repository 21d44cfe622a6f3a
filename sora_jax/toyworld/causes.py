"""Scenes in which something changes: one thing acts on another, or changes by itself.

Letters: T frames, K objects, N points of an outline. In family `cause`, an agent comes
straight up to a target that rests. From the frame after they touch on, the target lacks a
piece on that side, has the agent's colour, or is two smaller things. In a third of the
scenes the agent passes by and the target stays whole. In family `change`, one thing takes
another colour, grows or shrinks.
"""

import dataclasses
import functools

import numpy as np

from sora_jax.toyworld import wordings
from sora_jax.toyworld.generators import MARGIN, Layout, _one, _two
from sora_jax.toyworld.grammar import Wording
from sora_jax.toyworld.reading import PRESENT, Reading
from sora_jax.toyworld.render import AREA, distance, reach
from sora_jax.toyworld.rules import JITTER, MOVING, WANDER, Verdict, _passed
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    SHAPES,
    Draws,
    Event,
    Object,
    Range,
    Scene,
    Slots,
    Subject,
    Tier,
)

EFFECTS = ("bite", "paint", "split")
CHANGES = ("recolour", "grow", "shrink")
HITS = 2 / 3  # Share of the scenes in which the agent reaches the target.
PIECE = 0.65  # Radius of one of two pieces, as a share of the whole's.
SIDES = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What fits into a tier's frames; radii and gaps in pixels, speeds a frame."""

    agent: Range
    target: Range
    speed: Range
    fast: Range  # Beyond the range.
    miss: Range  # The gap at which an agent passes.
    back: float  # Least speed of going back.
    grown: Range  # The larger radius as a multiple of the smaller one,
    far_grown: Range  # and beyond the range.
    smallest: Range  # The radius of a thing at its smallest.


_SIZES = {
    "tw32": _Sizes(
        agent=(4.0, 4.6),
        target=(4.6, 5.2),
        speed=(1.8, 2.1),
        fast=(2.4, 2.8),
        miss=(2.6, 3.6),
        back=2.7,
        grown=(1.4, 1.55),
        far_grown=(1.65, 1.75),
        smallest=(4.0, 4.4),
    ),
    "tw64": _Sizes(
        agent=(5.0, 7.0),
        target=(6.5, 8.5),
        speed=(1.8, 2.3),
        fast=(2.7, 3.1),
        miss=(3.0, 5.0),
        back=2.7,
        grown=(1.4, 1.7),
        far_grown=(1.85, 2.1),
        smallest=(5.0, 6.5),
    ),
}


# -- When two shapes touch -------------------------------------------------------------


@functools.cache
def _outline(shape: str) -> np.ndarray:
    """Points on the outer edge of a shape of radius 1, float64[N, 2]."""
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)[:, None]
    far = np.linspace(1.6, 0.0, 801)
    x, y = np.cos(angle) * far, np.sin(angle) * far
    outermost = np.argmax(distance(shape, x, y, 1.0) <= 0, axis=1)
    rows = np.arange(len(angle))
    return np.stack([x[rows, outermost], y[rows, outermost]], axis=1)


def gap(
    one: tuple[str, float], other: tuple[str, float], offset_T2: np.ndarray
) -> np.ndarray:
    """Pixels between the edges of two shapes, float64[T]; negative where they overlap.

    Args:
      one, other: shape and radius.
      offset_T2: from the other's centre to the one's.
    """
    points = offset_T2[:, None] + one[1] * _outline(one[0])
    return distance(other[0], points[..., 0], points[..., 1], other[1]).min(axis=1)


def _touching(one: tuple[str, float], other: tuple[str, float], side: str) -> float:
    """The distance of the centres at which the one, at that side, touches the other."""
    apart = np.arange(0, 2.4, 0.002) * (one[1] + other[1])
    away = gap(one, other, apart[:, None] * np.array(DIRECTIONS[side]))
    return float(apart[np.flatnonzero(away <= 0).max()])


# -- Cause and effect ------------------------------------------------------------------


def choose_cause(draws: Draws, tier: Tier, split: str) -> Slots:
    kind = draws.choice(EFFECTS)
    event = Event(kind, of=1, by=0, happens=draws.chance(HITS))
    while True:  # until paint makes no pair that is held out
        pair = tuple(_two(draws, tier, split))
        slots = Slots(pair, camera="static", events=(event,))
        painted = dataclasses.replace(event, happens=True)
        always = dataclasses.replace(slots, events=(painted,))
        if always.held_out() == slots.held_out() == (split == "test_comp"):
            return slots


def lay_out_cause(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    """The agent comes along an axis; hits and misses differ by where its path lies."""
    sizes, event = _SIZES[tier.name], slots.events[0]
    agent, target = (
        Object(k, subject.shape, subject.colour, round(draws.uniform(*radius), 3))
        for k, (subject, radius) in enumerate(
            zip(slots.subjects, (sizes.agent, sizes.target), strict=True)
        )
    )
    ways = [w for w in SIDES if (agent.colour, w) not in HELD_OUT_DIRECTIONS]
    way = draws.choice(ways)
    ahead = np.array(DIRECTIONS[way])
    aside = ahead[::-1] * draws.choice((-1, 1))
    steps = tier.frames(split) - 1
    longest = tier.size - 2 * MARGIN
    low, high = sizes.fast if split == "test_ood" else sizes.speed
    # As fast as a path through the whole clip may be: hits and misses are alike.
    high = min(high, 0.97 * (longest - 2.15 * agent.radius) / steps)
    low = min(low, 0.9 * high)
    share = (0.3, 0.38) if split == "test_len" else (0.38, 0.52)
    contact = round(steps * draws.uniform(*share))
    t = np.arange(steps + 1)[:, None]
    if not event.happens:
        speed = draws.uniform(low, high)
        between = draws.uniform(*sizes.miss)
        middle = steps * draws.uniform(0.42, 0.58)
        across = between + sum(
            max(reach(thing.shape, side) for side in SIDES) * thing.radius
            for thing in (agent, target)
        )
        path = ahead * speed * (t - middle) + aside * across
        return _placed(draws, tier, (agent, target), np.stack([path, 0 * path], 1))
    apart = _touching((agent.shape, agent.radius), (target.shape, target.radius), SIDES[way])  # fmt: skip
    room = longest - 2.15 * (agent.radius + target.radius)
    speed = draws.uniform(low, max(low, min(high, 0.97 * room / contact)))
    apart += draws.uniform(-0.2, 0.2)
    before = -apart - speed * (contact - t)
    stops = event.kind != "paint" and draws.chance(0.5)
    back = 0.0 if stops else max(speed, sizes.back)
    after = np.maximum(-apart - back * (t - contact), before[0])
    agent_path = ahead * np.where(t <= contact, before, after)
    rest = 0 * agent_path
    ends, end_paths = [dataclasses.replace(target, id=2)], [rest]
    if event.kind == "bite":
        ends[0] = dataclasses.replace(ends[0], bite=SIDES[way])
    elif event.kind == "paint":
        ends[0] = dataclasses.replace(ends[0], colour=agent.colour)
    else:
        piece = dataclasses.replace(ends[0], radius=round(PIECE * target.radius, 3))
        ends = [piece, dataclasses.replace(piece, id=3)]
        # They move apart for a moment.
        clear = 1.0 * piece.radius + 1.7 + 0.25 * np.clip(t - contact - 1, 0, 3)
        end_paths = [aside * clear, -aside * clear]
    things = (agent, target, *ends)
    path = np.stack([agent_path, rest, *end_paths], axis=1)
    scale = np.ones(path.shape[:2])
    scale[contact + 1 :, 1] = 0
    scale[: contact + 1, 2:] = 0
    return _placed(draws, tier, things, path, scale)


def _placed(
    draws: Draws,
    tier: Tier,
    things: tuple[Object, ...],
    path: np.ndarray,
    scale: np.ndarray | None = None,
) -> Layout:
    """Somewhere in the frame; `path` float64[T, K, 2] is around any point."""
    size = 1.0 if scale is None else np.maximum(scale.max(axis=0), 1e-6)
    room = (np.array([thing.radius for thing in things]) * size + MARGIN)[:, None]
    low = (path - room).min(axis=(0, 1))
    high = (path + room).max(axis=(0, 1))
    spot = [draws.uniform(-a, tier.size - b) for a, b in zip(low, high, strict=True)]
    return Layout(things, path=path + np.array(spot), scale=scale)


# -- What is seen of them --------------------------------------------------------------

TOUCH = 1.3  # Most pixels between two things that touch.
WHOLE = 0.88  # Least area of a thing that lacks nothing, as a share of its first area,
LACKS = 0.86  # and most area of one that lacks a piece.
STABLE = 0.15  # Most change of area, as a share of its median.
LASTS = 0.9  # Least share of the frames in which something must hold that lasts.


def _colour(reading: Reading, subject: Subject, taken: set[str | None]) -> str | None:
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
        if name not in taken and area > most and subject.shape in (None, shape):
            best, most = name, area
    return best


@dataclasses.dataclass(frozen=True)
class Blob:
    """One blob of one frame."""

    area: float
    centre: np.ndarray  # float64[2]
    overlap: np.ndarray  # float32[S]


def blobs(reading: Reading, colour: str) -> list[list[Blob]]:
    """The blobs of a colour by frame, largest first."""
    found: list[list[Blob]] = [[] for _ in range(reading.num_frames)]
    index = reading.colours.index(colour)
    for row in np.flatnonzero(reading.colour == index):
        blob = Blob(reading.area[row], reading.centre[row], reading.overlap[row])
        found[reading.frame[row]].append(blob)
    return found


def shape_of(seen: list[Blob]) -> str:
    """The shape that fits best on average."""
    return SHAPES[int(np.mean([blob.overlap for blob in seen], axis=0).argmax())]


def cause(slots: Slots, reading: Reading) -> Verdict:
    """An effect when the agent touches the target, which lasts; or a miss, and none.

    "effect" is that it begins within a frame of the contact, with a target that is whole
    before; "stays" that it lasts to the end. "whole" is that a miss leaves the target as
    it was. Those that are not stated hold.
    """
    names = ("colours", "shapes", "contact", "effect", "stays", "whole")
    parts = dict.fromkeys((*names, "pass"), False)
    event = slots.events[0]
    if event.by is None or max(event.by, event.of) >= len(slots.subjects):
        return parts
    subjects = slots.subjects[event.by], slots.subjects[event.of]
    stated = {subject.colour for subject in subjects}
    mine = _colour(reading, subjects[0], stated)
    its = _colour(reading, subjects[1], {mine, *stated})
    if mine is None or its is None or mine == its:
        return parts
    acting, acted = blobs(reading, mine), blobs(reading, its)
    frames = reading.num_frames
    first = max(2, frames // 5)  # In these frames nothing has happened yet.
    start = [seen[0] for seen in acted[:first] if len(seen) == 1]
    agents = [seen[0] for seen in acting[:first] if len(seen) == 1]
    if len(start) < first or len(agents) < first:
        return parts
    shapes = shape_of(agents), shape_of(start)
    spot = np.median([blob.centre for blob in start], axis=0)
    area = float(np.median([blob.area for blob in start]))
    radius = float(np.sqrt(area / AREA[shapes[1]]))
    own_area = float(np.median([blob.area for blob in agents]))

    # The agent, which is not what it has painted.
    seen, path = np.zeros(frames, bool), np.zeros((frames, 2))
    for t, found in enumerate(acting):
        away = [
            blob
            for blob in found
            if np.hypot(*(blob.centre - spot)) > 0.6 * radius
            and abs(blob.area / own_area - 1) < 0.35
        ]
        if away:
            seen[t], path[t] = True, away[0].centre
    whole = np.zeros(frames, bool)
    for t, found in enumerate(acted):
        whole[t] = (
            len(found) == 1
            and WHOLE < found[0].area / area < 2 - WHOLE
            and np.hypot(*(found[0].centre - spot)) < 0.25 * radius
        )
    apart = np.full(frames, np.inf)
    mine_shaped = shapes[0], float(np.sqrt(own_area / AREA[shapes[0]]))
    apart[seen] = gap(mine_shaped, (shapes[1], radius), path[seen] - spot)
    nearest = float(apart.min())

    parts["colours"] = bool(seen.mean() >= LASTS)
    parts["shapes"] = all(
        subject.shape in (None, shape)
        for subject, shape in zip(subjects, shapes, strict=True)
    )
    if not event.happens:
        parts["contact"] = nearest > TOUCH and _passes(reading, seen, path, spot)
        parts["whole"] = bool(whole.all())
        return _conclude(parts | {"effect": True, "stays": True})
    parts["whole"] = True
    comes = apart[: int(apart.argmin()) + 1]
    parts["contact"] = nearest <= TOUCH and apart[0] - nearest > 2 * TOUCH
    # The first frame within half of one frame's motion from the nearest.
    pace = float(np.median(-np.diff(comes))) if len(comes) > 1 else 0.0
    touched = int(np.argmax(apart <= nearest + 0.5 * max(pace, 0.0)))
    done = _done(event.kind, acting, acted, spot, radius, area, path[touched])
    if not np.isnan(done).all() and parts["contact"]:
        begins = int(np.argmax(~np.isnan(done)))
        before, after = whole[:begins], done[begins:]
        parts["effect"] = bool(
            abs(begins - touched) <= 1 and before.mean() >= LASTS and before[:touched].all()
        )
        usual = np.nanmedian(after)
        stable = np.abs(after / usual - 1) <= STABLE  # False where it is not seen
        parts["stays"] = bool(stable.mean() >= LASTS)
    return _conclude(parts)


def _conclude(parts: Verdict) -> Verdict:
    """The parts with "pass" as their conjunction."""
    return _passed({name: shown for name, shown in parts.items() if name != "pass"})


def _passes(reading: Reading, seen: np.ndarray, path: np.ndarray, spot: np.ndarray) -> bool:
    """Whether it moves evenly in a straight line, past a spot."""
    t = np.flatnonzero(seen).astype(float)
    if len(t) < reading.num_frames * LASTS:
        return False
    points = path[seen]
    slope, offset = np.polynomial.polynomial.polyfit(t, points, 1)[::-1]
    length = float(np.hypot(*slope)) * (reading.num_frames - 1)
    rest = points - offset - t[:, None] * slope
    stray = float(np.sqrt((rest**2).sum(axis=1).mean()))
    along = (points - spot) @ slope
    crosses = along[0] < 0 < along[-1]
    straight = stray <= JITTER * reading.tier.size + WANDER * length
    return bool(crosses and straight and np.hypot(*slope) > MOVING)


def _done(
    kind: str,
    acting: list[list[Blob]],
    acted: list[list[Blob]],
    spot: np.ndarray,
    radius: float,
    area: float,
    agent: np.ndarray,
) -> np.ndarray:
    """The area that shows the effect in each frame; NaN where it is not seen.

    Args:
      kind: of the effect.
      acting, acted: the blobs of the agent's and of the target's colour.
      spot, radius, area: of the whole target.
      agent: where the agent is when they touch.
    """
    away = (spot - agent) / max(float(np.hypot(*(spot - agent))), 1e-6)
    found = np.full(len(acted), np.nan)
    for t, (own, its) in enumerate(zip(acting, acted, strict=True)):
        if kind == "bite" and len(its) == 1:
            # What is missing is missing on the agent's side.
            moved = float((its[0].centre - spot) @ away)
            if 0.4 < its[0].area / area < LACKS and moved > 0.06 * radius:
                found[t] = its[0].area
        elif kind == "split" and len(its) == 2:
            large, small = its[0].area, its[1].area
            if small > 0.6 * large and 0.45 * area < large + small < 1.1 * area:
                found[t] = large + small
        elif kind == "paint" and not its:
            painted = [b for b in own if np.hypot(*(b.centre - spot)) < 0.4 * radius]
            if painted and abs(painted[0].area / area - 1) < 2 * STABLE:
                found[t] = painted[0].area
    return found


# -- Change ----------------------------------------------------------------------------

GROWN = 1.2  # Least radius of what has grown, as a multiple of that before.
PLACE = 0.3  # How far it may be from where it was, as a share of its radius.
MONOTONE = 0.1  # Most that a share, or a radius as a share of it, may go back.


def choose_change(draws: Draws, tier: Tier, split: str) -> Slots:
    while True:  # until the new colour makes no pair that is held out
        subject, kind = _one(draws, tier, split), draws.choice(CHANGES)
        value = None
        if kind == "recolour":
            others = [name for name in tier.colours if name != subject.colour]
            value = draws.choice(others)
        slots = Slots((subject,), camera="static", total=1, events=(Event(kind, value=value),))  # fmt: skip
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
        now, new = recoloured(frames, start, end)
        radius = round(draws.uniform(low, high), 3)
        thing = Object(0, slots.subjects[0].shape, slots.subjects[0].colour, radius)
        things = (thing, dataclasses.replace(thing, id=1, colour=event.value))
        scale = np.stack([now, new], axis=1)
    else:
        radius, factor = sizes_of(draws, tier, event.kind, beyond)
        thing = Object(0, slots.subjects[0].shape, slots.subjects[0].colour, radius)
        things = (thing,)
        scale = ramp(frames, start, end, factor)[:, None]
    return _placed(draws, tier, things, np.zeros((frames, len(things), 2)), scale)


def ramp(frames: int, start: int, end: int, factor: float) -> np.ndarray:
    """From 1 up to frame `start`, evenly to `factor` from frame `end` on: [T]."""
    return np.interp(np.arange(frames), [start, end], [1.0, factor])


def recoloured(frames: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales [T] of a thing and of the one of the new colour that covers it.

    If `start` is `end`, that is the first frame of the new colour.
    """
    t = np.arange(frames)
    new = np.clip((t - start) / (end - start), 0, 1) if end > start else 1.0 * (t >= end)
    return 1.0 * (new < 1), new


def sizes_of(draws: Draws, tier: Tier, kind: str, beyond: bool) -> tuple[float, float]:
    """The radius before, and that after as a multiple of it."""
    sizes = _SIZES[tier.name]
    small = draws.uniform(*sizes.smallest)
    factor = draws.uniform(*(sizes.far_grown if beyond else sizes.grown))
    if kind == "grow":
        return round(small, 3), factor
    return round(small * factor, 3), 1 / factor


def change(slots: Slots, reading: Reading) -> Verdict:
    """The stated colour and shape before; the stated change, in one direction.

    "change" is that it looks as stated in the end, "steady" that it never goes back,
    "same" that its place and shape stay, and with a new colour its size.
    """
    names = ("colour", "shape", "change", "steady", "same", "pass")
    parts = dict.fromkeys(names, False)
    event = slots.events[0]
    if event.of >= len(slots.subjects):
        return parts
    subject = slots.subjects[event.of]
    colour = _colour(reading, subject, {event.value})
    if colour is None or colour == event.value:
        return parts
    own = blobs(reading, colour)
    new = own if event.value is None else blobs(reading, event.value)
    few = max(2, reading.num_frames // 8)
    starts = [seen[0] for seen in own[:few] if seen]
    ends = [seen[0] for seen in new[-few:] if seen]
    others = () if new is own else (*new[:few], *own[-few:])
    parts["colour"] = len(starts) == few
    if not parts["colour"]:
        return parts
    shape = shape_of(starts)
    parts["shape"] = subject.shape in (None, shape)
    if len(ends) < few:
        return _conclude(parts)
    area, last = (float(np.median([b.area for b in seen])) for seen in (starts, ends))
    radius = np.sqrt(area / AREA[shape])
    moved = np.hypot(*(ends[-1].centre - starts[0].centre))
    parts["same"] = bool(shape_of(ends) == shape and moved <= PLACE * radius)
    if new is own:
        factor = np.sqrt(last / area) ** (1 if event.kind == "grow" else -1)
        parts["change"] = bool(factor >= GROWN)
        course = np.array([np.sqrt(seen[0].area / area) for seen in own if seen])
        course = course if event.kind == "grow" else -course
    else:
        parts["change"] = not any(others)
        parts["same"] &= abs(last / area - 1) <= 2 * STABLE
        parts["same"] = bool(parts["same"])
        totals = [[sum(b.area for b in seen) for seen in both] for both in (own, new)]
        before, after = np.array(totals)
        course = (after / np.maximum(before + after, 1e-6))[before + after > 0]
    back = float((np.maximum.accumulate(course) - course).max())
    parts["steady"] = back <= MONOTONE and len(course) >= PRESENT * reading.num_frames
    return _conclude(parts)


# -- Wording ---------------------------------------------------------------------------

CAUSE = Wording(
    short=(
        "{a0} {does} {a1}",
        "{n0} {does} {n1}",
        "{the0} {does} {the1}",
        "{a0} {does} {the1}",
        "{the0} {does} {a1}",
        "here {a0} {does} {a1}",
        "view: {a0} {does} {a1}",
        "{n0} {does} {a1}",
    ),
    medium=(
        "we see {a0} that {does} {a1}",
        "a video of {a0} that {does} {a1}",
        "in this clip {a0} {does} {a1}",
        "the scene shows {a0} that {does} {a1}",
        "there is {a0} that {does} {a1}",
        "{a0} comes near and {does} {a1}",
        "{a0} comes along and {does} {a1}",
        "the clip shows how {a0} {does} {a1}",
    ),
    main=(
        "the video shows {a0} that comes near and {does} {a1}",
        "in this clip {a0} comes along and {does} {a1}",
        "we see how {a0} comes near and {does} {a1}",
        "there is {a0} that comes along and {does} {a1}",
        "the scene shows {a0} that comes near and {does} {a1}",
        "{a0} comes straight along and {does} {a1}",
        "{a0} comes nearer and nearer and {does} {a1}",
        "the clip shows how {a0} comes along and {does} {a1}",
    ),
    extras=(
        (
            "{the1} {rest} in its place when the clip starts",
            "{the1} does not move by itself",
            "{the1} is in the scene from the start",
            "at the start {the1} is whole",
        ),
        wordings._TONE,
        wordings._CAMERA,
        ("{the0} keeps its look", "{the0} is the same from start to end"),
    ),
    structured=(
        "subject: {n0}; action: {does} {n1}",
        "{key_camera}",
        "background: {tone}",
    ),
    alt=(
        "{n0} {does} {n1}",
        "{a0} {does} {a1}",
        "my clip of {a0} and {a1}",
        "cool video {n0} {does} {n1}",
        "{n0} {does} {n1} test footage",
        "look at this {n0} and {a1}",
        "{n0} {does} {n1} hd",
        "some {n0} that {does} some {n1}",
    ),
)

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
