"""Motions in several parts: things that turn back, and cameras that move twice.

Letters: T frames, D = T - 1 pairs of neighbouring frames, L legs.

`to_and_fro`: one thing goes somewhere and comes back, once or twice, or bounces off the
frame's edges. `camera_path`: two motions of the camera, one after the other.
"""

import dataclasses
import itertools
import math

import numpy as np

from sora_jax.toyworld import generators, rules, wordings
from sora_jax.toyworld.generators import MARGIN, Layout
from sora_jax.toyworld.grammar import Wording
from sora_jax.toyworld.reading import Reading, Track
from sora_jax.toyworld.render import AREA
from sora_jax.toyworld.scene import (
    CAMERAS,
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    OPPOSITE,
    Draws,
    Event,
    Slots,
    Subject,
    Tier,
)

LEGS = {"back": 2, "twice": 4}
BOUNCES = (0.3, 0.7)  # When a thing bounces, as a share of the clip.

TURNED = 1.0  # Least way back that makes a turn, pixels.
EVEN = 1.5  # Largest ratio of the speeds of two legs.
HOME = 0.15  # Farthest end from the start, as a share of the way out,
NEAR = 0.8  # plus these pixels.
EDGE = 3.0  # Farthest from the edge at a bounce, pixels.

LATE = 2  # Most frames between the change of a camera's motion and its stated time.
LEAST = 2  # Fewest pairs of frames of one motion of the camera.


# -- There and back --------------------------------------------------------------------


def choose_to_and_fro(draws: Draws, tier: Tier, split: str) -> Slots:
    """No thing goes in, or comes back from, a direction that its colour never has."""
    # Legs of two steps would be too short to compare their speeds.
    kinds = ("back", "twice")[: 1 + (tier.frames(split) > 16)]
    if len(tier.directions) > 4:  # there are diagonal ones
        kinds += ("bounce",)
    kind = draws.choice(kinds)
    subject = generators.choose_attribute(draws, tier, split).subjects[0]
    ways = [
        way
        for way in tier.directions
        if ("-" in way or kind != "bounce")
        and not {(subject.colour, way), (subject.colour, OPPOSITE[way])}
        & HELD_OUT_DIRECTIONS
    ]
    subject = dataclasses.replace(subject, direction=draws.choice(ways))
    event = Event("turn", value=kind)
    return Slots((subject,), camera="static", total=1, events=(event,))


def lay_out_to_and_fro(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    steps, subject = tier.frames(split) - 1, slots.subjects[0]
    low, high = tier.radius
    pace = (tier.slow[1], tier.fast[1])
    if split == "test_ood":
        high, pace = 1.05 * low, (1.3 * tier.fast[1], 2.0 * tier.fast[1])
    thing = generators.thing_of(0, subject, draws.uniform(low, high))
    room, t = thing.radius + MARGIN, np.arange(steps + 1)
    way, speed = np.array(DIRECTIONS[subject.direction]), draws.uniform(*pace)
    if slots.events[0].value == "bounce":
        # In one direction or in both; the two bounces are at times of their own.
        on = draws.choice(((True, False), (False, True), (True, True)))
        inside = (tier.size - 2 * room) / (steps * max(abs(way)))
        speed = min(speed, inside)
        start, velocity = np.zeros(2), way * speed
        for axis, bounces in enumerate(on):
            wall = tier.size - room if way[axis] > 0 else room
            when = BOUNCES if bounces else (1.0, inside / speed)
            start[axis] = wall - velocity[axis] * steps * draws.uniform(*when)
        straight = start + t[:, None] * velocity
        path = tier.size - room - abs(tier.size - room - straight)
        path = room + abs(path - room)
    else:
        leg = steps // LEGS[slots.events[0].value]
        speed = min(speed, (tier.size - 2 * room) / (leg * max(abs(way))))
        out = leg - abs(leg - t % (2 * leg))
        path = generators.placed(draws, tier, room, out[:, None] * way * speed)
    return Layout((thing,), path=path[:, None])


def turns(along: np.ndarray) -> list[int]:
    """The places of the turns of a series: extremes from which it goes back."""
    found, last, sign = [], 0, 0
    for t, value in enumerate(along):
        if sign == 0:
            if abs(value - along[0]) >= TURNED:
                sign, last = (1 if value > along[0] else -1), t
        elif sign * (value - along[last]) >= 0:
            last = t
        elif sign * (along[last] - value) >= TURNED:
            found.append(last)
            last, sign = t, -sign
    return found


@dataclasses.dataclass(frozen=True)
class Legs:
    """A path in parts: the turns in x and in y or along one line.

    `turned` are the places of the turns, `velocity` float64[L, 2] those of the legs,
    `stray` the largest RMS distance from a leg.
    """

    turned: list[int]
    velocity: np.ndarray
    stray: float


def _legs(centre: np.ndarray, turned: list[int]) -> Legs:
    """Straight lines fitted between turns; a turn itself belongs to short legs only."""
    velocity, stray = [], 0.0
    for start, stop in itertools.pairwise([0, *turned, len(centre) - 1]):
        t = np.arange(start, stop + 1)
        inner = t[(t != start) | (start == 0)]
        inner = inner[(inner != stop) | (stop == len(centre) - 1)]
        t = inner if len(inner) >= 3 else t
        points, t = centre[t] - centre[t].mean(axis=0), t - t.mean()
        rate = t @ points / max(t @ t, 1e-6)
        rest = points - t[:, None] * rate
        velocity.append(rate)
        stray = max(stray, float(np.sqrt((rest**2).sum(axis=1).mean())))
    return Legs(turned, np.array(velocity), stray)


def _way(velocity: np.ndarray, tier: Tier) -> str:
    along = [float(velocity @ DIRECTIONS[name]) for name in tier.directions]
    return tier.directions[int(np.argmax(along))]


def _even(speeds: np.ndarray) -> bool:
    return bool(speeds.min() > rules.MOVING and speeds.max() < EVEN * speeds.min())


def _straight(legs: Legs, tier: Tier) -> bool:
    length = np.linalg.norm(legs.velocity, axis=1).max()
    return bool(legs.stray <= rules.JITTER * tier.size + rules.WANDER * length)


def _back(
    track: Track, kind: str | None, tier: Tier
) -> tuple[rules.Verdict, np.ndarray]:
    """The parts of a way there and back, and the velocity of its first leg."""
    centre = track.centre[track.seen]
    spread = centre - centre.mean(axis=0)
    axis = np.linalg.svd(spread, full_matrices=False)[2][0]
    legs = _legs(centre, turns(spread @ axis))
    speeds = np.linalg.norm(legs.velocity, axis=1)
    signs = np.sign(legs.velocity @ axis)
    there = np.ptp(spread @ axis)
    wanted = None if kind is None else LEGS[kind] - 1
    parts = {
        "turns": len(legs.turned) > 0
        and wanted in (None, len(legs.turned))
        and bool((signs[1:] == -signs[:-1]).all())
        and _straight(legs, tier),
        "speeds": _even(speeds),
        "end": bool(np.linalg.norm(centre[-1] - centre[0]) <= NEAR + HOME * there),
    }
    return parts, legs.velocity[0]


def _bounces(track: Track, tier: Tier) -> tuple[rules.Verdict, np.ndarray]:
    """Every turn is at the edge, and nothing else changes there; and the first velocity."""
    centre = track.centre[track.seen]
    shape = track.shape or "circle"
    extent = np.sqrt(track.area[track.seen].mean() / AREA[shape])
    number, at_edge, even, straight, first = 0, True, True, True, np.zeros(2)
    for axis in range(2):
        legs = _legs(centre[:, axis : axis + 1], turns(centre[:, axis]))
        for t in legs.turned:
            gap = min(centre[t, axis], tier.size - centre[t, axis]) - extent
            at_edge &= bool(gap <= EDGE)
        number += len(legs.turned)
        even &= _even(abs(legs.velocity[:, 0]))
        straight &= _straight(legs, tier)
        first[axis] = legs.velocity[0, 0]
    return {"turns": number > 0 and straight, "speeds": even, "end": at_edge}, first


def to_and_fro(slots: Slots, reading: Reading) -> rules.Verdict:
    """The stated colour, shape and first direction, the turns, and equal speeds.

    "end" is that it ends where it began, or that it turns at the frame's edges.
    """
    subject = slots.subjects[0] if slots.subjects else Subject()
    tracks = reading.tracks(1)
    if not tracks:
        names = ("colour", "shape", "direction", "turns", "speeds", "end", "pass")
        return dict.fromkeys(names, False)
    track, tier, kind = tracks[0], reading.tier, slots.events[0].value
    if kind == "bounce":
        parts, first = _bounces(track, tier)
    else:
        parts, first = _back(track, kind, tier)
    speed = float(np.linalg.norm(first))
    parts = {
        "colour": subject.colour in (None, track.colour),
        "shape": subject.shape in (None, track.shape),
        "direction": speed > rules.MOVING
        and subject.direction in (None, _way(first, tier)),
    } | parts
    return rules.passed(parts)


# -- Two motions of the camera ---------------------------------------------------------


def choose_camera_path(draws: Draws, tier: Tier, split: str) -> Slots:
    subject = generators.choose_attribute(draws, tier, split).subjects[0]
    first = draws.choice(CAMERAS[1:])
    second = draws.choice([name for name in CAMERAS[1:] if name != first])
    when = None
    if draws.chance(0.5):  # Texts state quarters of a second.
        step = tier.fps // 4
        low, high = (math.ceil(end / step) for end in _changes(tier.frames(split)))
        when = draws.choice(range(low, high)) * step / tier.fps
    events = (Event("camera", value=first), Event("camera", value=second, second=when))
    return Slots((subject,), total=1, events=events)


def _changes(frames: int) -> tuple[int, int]:
    """The range (without its end) of the frame at which the second motion begins."""
    least = max(3, round(0.35 * (frames - 1)))
    return least, frames - least


def lay_out_camera_path(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    frames, subject = tier.frames(split), slots.subjects[0]
    first, second = slots.events
    if second.second is None:
        change = draws.choice(range(*_changes(frames)))
    else:
        change = round(second.second * tier.fps)
    stretch = {"test_ood": 1.4, "test_len": 0.7}.get(split, 1.0)
    rate = np.zeros((frames - 1, 3))  # as seen: pixels and log zoom a frame
    for event, part in ((first, slice(0, change)), (second, slice(change, None))):
        kind, way = event.value.split("-")
        if kind == "zoom":
            rate[part, 2] = draws.uniform(*tier.zoom) * (1 if way == "in" else -1)
        else:
            rate[part, :2] = draws.uniform(*tier.pan) * np.array(DIRECTIONS[way])
    rate *= stretch
    zoom = np.concatenate([[0.0], np.cumsum(rate[:, 2])])
    zoom -= 0.5 * (zoom.min() + zoom.max())
    camera = np.zeros((frames, 4))
    camera[1:, :2] = np.cumsum(rate[:, :2] * np.exp(-zoom[:-1, None]), axis=0)
    camera[:, :2] += tier.size / 2
    camera[:, 2] = zoom
    low, high = tier.radius
    radius = low + (high - low) * draws.uniform(*generators.ZOOM_RADIUS)
    thing = generators.thing_of(0, subject, radius)
    # Where the thing stays in the picture in every frame.
    free = (tier.size / 2 - MARGIN) * np.exp(-zoom)[:, None] - thing.radius
    near, far = (camera[:, :2] - free).max(axis=0), (camera[:, :2] + free).min(axis=0)
    spot = [draws.uniform(*ends) for ends in zip(near, far, strict=True)]
    return Layout(
        (thing,),
        path=np.tile(spot, (frames, 1, 1)),
        camera=camera,
    )


def change(reading: Reading) -> int:
    """The frame at which two even motions of the camera meet that explain it best."""
    pace = rules.paces(reading.camera, reading.tier)

    def rest(part: np.ndarray) -> float:
        return float(((part - part.mean(axis=0)) ** 2).sum())

    places = range(LEAST, len(pace) - LEAST + 1)
    return min(places, key=lambda d: rest(pace[:d]) + rest(pace[d:]))


def camera_path(slots: Slots, reading: Reading) -> rules.Verdict:
    """The two stated motions in their order (and when the second begins), and the thing."""
    subject = slots.subjects[0] if slots.subjects else Subject()
    first, second = slots.events[:2]
    found, when = [None, None], 0
    if reading.num_frames > 2 * LEAST:
        when = change(reading)
        path = reading.camera
        for k, part in enumerate((slice(0, when), slice(when, None))):
            some = dataclasses.replace(
                path,
                shift=path.shift[part],
                zoom=path.zoom[part],
                error=path.error[part],
            )
            found[k] = rules.path_class(some, reading.tier)
    time = second.second
    thing = rules.attribute(Slots((subject,)), reading)
    parts = {
        "first": found[0] == first.value,
        "second": found[1] == second.value,
        "time": time is None or abs(when - time * reading.tier.fps) <= LATE,
        "colour": thing["colour"],
        "shape": thing["shape"],
    }
    return rules.passed(parts)


# -- Words -----------------------------------------------------------------------------

_, _TOTAL, _TONE, _CAMERA = wordings.MOTION.extras

TO_AND_FRO = Wording(
    short=(
        "{a0} {verb} {way0} {turn}",
        "{n0} {verb} {way0} {turn}",
        "{the0} {verb} {way0} {turn}",
        "{a0} first {verb} {way0} {turn}",
        "{n0} first {verb} {way0} {turn}",
        "{the0} first {verb} {way0} {turn}",
        "here {a0} {verb} {way0} {turn}",
        "view: {n0} {verb} {way0} {turn}",
    ),
    medium=(
        "{a0} {verb} {dir0} {turn}",
        "{a0} first {verb} {dir0} {turn}",
        "there is {a0} that {verb} {dir0} {turn}",
        "we see {a0} that {verb} {dir0} {turn}",
        "a video of {a0} that {verb} {dir0} {turn}",
        "the scene shows {a0} that {verb} {dir0} {turn}",
        "the video shows {a0} that {verb} {dir0} {turn}",
        "in this clip {a0} {verb} {dir0} {turn}",
    ),
    main=(
        "{a0} {verb} {dir0} in a straight line {turn}",
        "the video shows {a0} that {verb} {dir0} {turn}",
        "in this clip {a0} {verb} {dir0} {turn}",
        "we see {a0} that first {verb} {dir0} {turn}",
        "the scene shows {a0} that {verb} {dir0} {turn}",
        "there is {a0} that first {verb} {dir0} {turn}",
        "at first {a0} {verb} {dir0} {turn}",
        "at the start {a0} {verb} {dir0} {turn}",
    ),
    extras=(
        (
            "every part of the path is a straight line",
            "it keeps to straight lines",
            "it never rests",
            "it never leaves the frame",
            "it keeps the same pace from start to end",
            "it stays inside the frame",
            "its motion is even from start to end",
            "each part of the path has the same pace",
        ),
        _TOTAL,
        _TONE,
        _CAMERA,
    ),
    structured=(
        "subject: {n0}, motion: {key_dir0}, {key_turn}",
        "{key_camera}",
        "background: {tone}",
    ),
    alt=(
        "{n0} {verb} {way0} {turn}",
        "{a0} {verb} {way0} {turn}",
        "my clip of {a0} that {verb} {turn}",
        "cool video {n0} {verb} {way0} {turn}",
        "{n0} test footage {verb} {way0} {turn}",
        "look at this {n0} that {verb} {way0} {turn}",
        "{n0} hd {verb} {way0} {turn}",
        "some {n0} that {verb} {turn}",
    ),
)

CAMERA_PATH = Wording(
    short=(
        "{moves}",
        "{moves}, {a0} in view",
        "{moves} past {a0}",
        "{n0}, {moves}",
        "{a0}: {moves}",
        "{a0} as {moves}",
        "{the0} as {moves}",
        "{moves}: {n0}",
    ),
    medium=(
        "{moves} while {a0} stays in view",
        "we see {a0} as {moves}",
        "{a0} is in view as {moves}",
        "{a0} {rest} still while {moves}",
        "there is {a0} in the scene and {moves}",
        "{moves}, and {a0} is in view",
        "a video of {a0} in which {moves}",
        "the scene shows {a0} while {moves}",
    ),
    main=(
        "{moves} while {a0} stays in view",
        "in this clip {moves} and {a0} {rest} still in the world",
        "the video shows {a0} at rest while {moves}",
        "we see {a0} that does not move as {moves}",
        "{a0} {rest} still in the scene and {moves}",
        "there is {a0} at rest in the scene while {moves}",
        "as {moves}, {a0} remains in view",
        "the scene shows {a0} while {moves}",
    ),
    extras=wordings.CAMERA.extras,
    structured=("{key_moves}; subject: {n0}", "action: none", "background: {tone}"),
    alt=(
        "{moves}",
        "my clip of {a0}, {moves}",
        "cool video {moves}",
        "{n0} test footage {moves}",
        "look at this {n0}, {moves}",
        "{n0} hd {moves}",
        "{moves}, some {n0}",
        "{moves} and {a0}",
    ),
)
