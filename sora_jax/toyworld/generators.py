"""Draws scenes, family by family.

`choose_*` draws the facts (the slots that captions may state), `lay_out_*` draws sizes,
positions and paths that realize them. Objects always stay inside the frame.
"""

import dataclasses
import functools
import math

import numpy as np

from sora_jax.toyworld.scene import (
    CAMERAS,
    DIRECTIONS,
    PLACES,
    RELATIONS,
    SPEEDS,
    TONES,
    Background,
    Draws,
    Object,
    Range,
    Slots,
    Subject,
    Tier,
)

MARGIN = 0.5  # Pixels between an object and the frame's edge.
GAP = 2.0  # Least distance between two objects that share a frame.
TRIES = 300  # To find two paths that keep their distance.
ZOOM_RADIUS = (0.35, 0.55)  # Within the radius range, so that zoomed sizes stay in it.
BASE, BASE_SPREAD = 128.0, 30.0
# Of each of three waves; their sum is as strong as one wave of amplitude 20 to 25, which
# an autoencoder cannot drop and still reach 30 dB.
AMPLITUDE = (20 / math.sqrt(3), 25 / math.sqrt(3))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Objects, their starts and velocities (pixels a frame), and the camera's rates.

    `path`, `camera`, `scale` and `later` are for what changes in other ways: `Scene.pos`
    in place of starts and velocities, `Scene.camera` in place of rates, and those fields
    of `Scene`. `truth` are more facts, as of `Slots.factors`.
    """

    objects: tuple[Object, ...]
    start: tuple[tuple[float, float], ...] = ()
    velocity: tuple[tuple[float, float], ...] = ()
    camera_rate: tuple[float, float, float] = (0.0, 0.0, 0.0)  # x, y, log zoom
    truth: dict[str, object] = dataclasses.field(default_factory=dict)
    path: np.ndarray | None = None
    camera: np.ndarray | None = None
    scale: np.ndarray | None = None
    later: tuple[Background, ...] = ()


# -- What is true ----------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _subjects(tier: Tier, held_out: bool, moving: bool) -> tuple[Subject, ...]:
    directions = tier.directions if moving else (None,)
    every = (
        Subject(colour, shape, direction)
        for colour in tier.colours
        for shape in tier.shapes
        for direction in directions
    )
    return tuple(s for s in every if Slots((s,)).held_out() == held_out)


def one_subject(draws: Draws, tier: Tier, split: str, moving: bool = False) -> Subject:
    return draws.choice(_subjects(tier, split == "test_comp", moving))


def two_subjects(
    draws: Draws, tier: Tier, split: str, moving: bool = False
) -> list[Subject]:
    """Two subjects of different colours; `test_comp` has a held-out pair in one."""
    pair = [one_subject(draws, tier, split, moving)]
    while len(pair) < 2 or pair[0].colour == pair[1].colour:
        pair[1:] = [one_subject(draws, tier, "train", moving)]
    return draws.shuffled(pair)


def choose_attribute(draws: Draws, tier: Tier, split: str) -> Slots:
    return Slots((one_subject(draws, tier, split),), total=1)


def choose_count(draws: Draws, tier: Tier, split: str) -> Slots:
    number = 5 if split == "test_ood" else draws.choice((1, 2, 3, 4))
    return Slots(
        (one_subject(draws, tier, split),), count=number, camera="static", total=number
    )


def choose_relation(draws: Draws, tier: Tier, split: str) -> Slots:
    pair = tuple(two_subjects(draws, tier, split))
    relation = draws.choice(tuple(RELATIONS))
    return Slots(pair, relation=relation, camera="static", total=2)


def _with_speed(subject: Subject, draws: Draws, split: str) -> Subject:
    """Beyond the range only fast is new; in twice the time only slow has room."""
    fixed = {"test_ood": "fast", "test_len": "slow"}.get(split)
    return dataclasses.replace(subject, speed=fixed or draws.choice(SPEEDS))


def choose_motion(draws: Draws, tier: Tier, split: str) -> Slots:
    subject = _with_speed(one_subject(draws, tier, split, moving=True), draws, split)
    return Slots((subject,), camera="static", total=1)


def choose_motion_binding(draws: Draws, tier: Tier, split: str) -> Slots:
    pair = two_subjects(draws, tier, split, moving=True)
    pair = [_with_speed(subject, draws, split) for subject in pair]
    if split == "test_ood":  # Two beyond the range would leave each other no room.
        pair[1] = dataclasses.replace(pair[1], speed="slow")
    return Slots(tuple(pair), camera="static", total=2)


def choose_camera(draws: Draws, tier: Tier, split: str) -> Slots:
    subject = one_subject(draws, tier, split)
    return Slots((subject,), camera=draws.choice(CAMERAS), total=1)


def background(draws: Draws, size_class: Tier) -> tuple[str, Background]:
    """Draws a background, and its tone."""
    level = draws.unit()
    waves = []
    turn = draws.uniform(0.0, math.pi)
    for k in range(3):
        # Three directions across the plane, so that every camera motion is visible.
        angle = turn + (k + draws.uniform(-0.25, 0.25)) * math.pi / 3
        number = 2 * math.pi / draws.uniform(*size_class.wavelength)
        wave = (
            number * math.cos(angle),
            number * math.sin(angle),
            draws.uniform(0.0, 2 * math.pi),
            draws.uniform(*AMPLITUDE),
        )
        waves.append(tuple(round(value, 4) for value in wave))
    base = round(BASE + BASE_SPREAD * (2 * level - 1), 2)
    return TONES[int(level * 3)], Background(base, tuple(waves))


# -- How it comes about ----------------------------------------------------------------


def thing_of(k: int, subject: Subject, radius: float) -> Object:
    # Rounded so that the state record is short; geometry uses the rounded value.
    return Object(k, subject.shape, subject.colour, round(radius, 3))


def _start(
    draws: Draws, tier: Tier, room: float, path: Range, outermost: bool = False
) -> tuple[float, float]:
    """Where to start so that a disc of `room` stays in the frame along `path`.

    Anywhere, or at the ends of where that is.
    """
    point = []
    for shift in path:
        low = room + max(0.0, -shift)
        high = tier.size - room - max(0.0, shift)
        draw = draws.unit()
        point.append(low + (high - low) * (round(draw) if outermost else draw))
    return point[0], point[1]


def placed(draws: Draws, tier: Tier, room: float, moved: np.ndarray) -> np.ndarray:
    """A path [T, 2] along which a disc of `room` stays in the frame.

    `moved` [T, 2] is how far from its start the disc is.
    """
    low, high = room - moved.min(0), tier.size - room - moved.max(0)
    return moved + [draws.uniform(*ends) for ends in zip(low, high, strict=True)]


def lay_out_attribute(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    low, high = tier.ood_radius if split == "test_ood" else tier.radius
    thing = thing_of(0, slots.subjects[0], draws.uniform(low, high))
    x, y = _start(draws, tier, thing.radius + MARGIN, (0.0, 0.0))
    third = tier.size / 3
    place = PLACES[int(y / third)][int(x / third)]
    return Layout((thing,), ((x, y),), ((0.0, 0.0),), truth={"places": [place]})


def lay_out_count(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    """Each object in a cell of its own: 2 x 2 cells, or the five of a die."""
    low, high = tier.small_radius
    number = slots.count
    cell = tier.size / 2
    high = min(high, (cell - GAP) / 2)
    spots = draws.shuffled([(i + 0.5, j + 0.5) for i in (0, 1) for j in (0, 1)])
    spots = [(x * cell, y * cell) for x, y in spots[:number]]
    if number == 5:
        high = low = min(low, tier.size / 8)
        near, far = low + MARGIN, tier.size - low - MARGIN
        spots = [(x, y) for x in (near, far) for y in (near, far)] + [(cell, cell)]
    things, start = [], []
    for k, (x, y) in enumerate(spots):
        thing = thing_of(k, slots.subjects[0], draws.uniform(low, high))
        free = 0.0 if number == 5 else cell / 2 - thing.radius - GAP / 2
        things.append(thing)
        start.append((x + draws.uniform(-free, free), y + draws.uniform(-free, free)))
    return Layout(tuple(things), tuple(start), ((0.0, 0.0),) * number)


def lay_out_relation(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    low, high = tier.small_radius if tier.name == "tw16" else tier.radius
    if split == "test_ood":
        low, high = tier.ood_radius
        high = min(high, (tier.size - GAP - 2 * MARGIN) / 4)
        low = min(low, high)
    pair = tuple(
        thing_of(k, subject, draws.uniform(low, high))
        for k, subject in enumerate(slots.subjects)
    )
    first, second = pair
    reach = first.radius + second.radius
    farthest = tier.size - reach - 2 * MARGIN
    apart = draws.uniform(max(12 * tier.size / 32, reach + GAP), farthest)
    # At most 0.4 of the distance to the side, as far as the frame allows.
    free = min(0.4 * apart, farthest)
    aside = draws.uniform(-free, free)
    ux, uy = RELATIONS[slots.relation]
    shift = (ux * apart - uy * aside, uy * apart + ux * aside)
    # `second` may be anywhere where `second + shift` is a place for `first`.
    x, y = (
        draws.uniform(
            max(second.radius + MARGIN, first.radius + MARGIN - d),
            tier.size - max(second.radius + MARGIN, first.radius + MARGIN + d),
        )
        for d in shift
    )
    start = ((x + shift[0], y + shift[1]), (x, y))
    return Layout(pair, start, ((0.0, 0.0),) * 2)


def _motion(
    draws: Draws,
    tier: Tier,
    split: str,
    subject: Subject,
    k: int,
    radius: Range,
    outermost: bool = False,
) -> tuple[Object, tuple[float, float], tuple[float, float]]:
    steps = tier.frames(split) - 1
    low, high = tier.fast if subject.speed == "fast" else tier.slow
    if split == "test_ood" and subject.speed == "fast":
        low, high = 1.3 * tier.fast[1], 2.0 * tier.fast[1]
        radius = radius[0], radius[0] * 1.05
    thing = thing_of(k, subject, draws.uniform(*radius))
    room = thing.radius + MARGIN
    ux, uy = DIRECTIONS[subject.direction]
    fits = (tier.size - 2 * room) / (steps * max(abs(ux), abs(uy)))
    speed = draws.uniform(low, min(high, fits))
    velocity = (ux * speed, uy * speed)
    path = (velocity[0] * steps, velocity[1] * steps)
    return thing, _start(draws, tier, room, path, outermost), velocity


def lay_out_motion(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    thing, start, velocity = _motion(
        draws, tier, split, slots.subjects[0], 0, tier.radius
    )
    return Layout((thing,), (start,), (velocity,))


def _nearest(a: Range, b: Range, steps: int) -> float:
    """The least distance of two centres whose offset goes evenly by b a frame."""
    length = b[0] ** 2 + b[1] ** 2
    when = 0.0 if length == 0 else -(a[0] * b[0] + a[1] * b[1]) / length
    when = min(max(when, 0.0), steps)
    return math.hypot(a[0] + when * b[0], a[1] + when * b[1])


def lay_out_motion_binding(
    draws: Draws, tier: Tier, split: str, slots: Slots
) -> Layout:
    """Two paths that never come closer than the gap: drawn until that is so."""
    steps = tier.frames(split) - 1
    for attempt in range(TRIES):
        one, two = (
            _motion(
                draws,
                tier,
                split,
                subject,
                k,
                tier.small_radius,
                # Where the frame is tight, only its far corners leave room for both.
                outermost=attempt >= TRIES // 10,
            )
            for k, subject in enumerate(slots.subjects)
        )
        offset = (two[1][0] - one[1][0], two[1][1] - one[1][1])
        drift = (two[2][0] - one[2][0], two[2][1] - one[2][1])
        if _nearest(offset, drift, steps) > one[0].radius + two[0].radius + GAP:
            return Layout((one[0], two[0]), (one[1], two[1]), (one[2], two[2]))
    raise RuntimeError(f"no two free paths for {slots} in tier {tier.name}")


_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def lay_out_camera(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    """The object rests in the world; the camera passes over it or closes in on it."""
    steps = tier.frames(split) - 1
    low, high = tier.radius
    base = low + (high - low) * draws.uniform(*ZOOM_RADIUS)
    thing = thing_of(0, slots.subjects[0], base)
    room = thing.radius + MARGIN
    if slots.camera == "static":
        return Layout((thing,), (_start(draws, tier, room, (0.0, 0.0)),), ((0.0, 0.0),))
    kind, way = slots.camera.split("-")
    stretch = 1.4 if split == "test_ood" else 1.0
    if split == "test_len":
        stretch = 0.7
    if kind == "zoom":
        rate = draws.uniform(*tier.zoom) * stretch
        total = rate * steps
        # Half of the zoom lies before the clip's middle, where the size is `radius`.
        largest = math.exp(total / 2)
        free = (tier.size / 2 - MARGIN) / largest - thing.radius
        middle = tier.size / 2
        spot = (
            middle + draws.uniform(-free, free),
            middle + draws.uniform(-free, free),
        )
        sign = 1 if way == "in" else -1
        return Layout((thing,), (spot,), ((0.0, 0.0),), (0.0, 0.0, sign * rate))
    speed = draws.uniform(*tier.pan) * stretch
    ux, uy = _WAYS[way]
    rate = (ux * speed, uy * speed)
    spot = _start(draws, tier, room, (-rate[0] * steps, -rate[1] * steps))
    return Layout((thing,), (spot,), ((0.0, 0.0),), (*rate, 0.0))


# -- From a layout to a path -----------------------------------------------------------


def paths(layout: Layout, num_frames: int, size: int) -> tuple[np.ndarray, ...]:
    """pos[T, K, 2], vel[T, K, 2] and camera[T, 4] of a layout, rounded to 1e-4."""
    t = np.arange(num_frames)[:, None]
    if layout.path is None:
        vel = np.asarray(layout.velocity)
        pos = np.asarray(layout.start) + t[..., None] * vel
        vel = np.broadcast_to(vel, pos.shape)
    else:  # the velocity with which an object has come to where it is
        pos = np.round(layout.path, 4)
        vel = np.diff(pos, axis=0)
        vel = np.concatenate([vel[:1], vel])
        if layout.later:  # it has not come from where it was in the shot before
            first = 1 + np.flatnonzero(np.diff(layout.camera[:, 3]))
            vel[first] = vel[first + 1]
    if layout.camera is not None:
        return np.round(pos, 4), np.round(vel, 4), np.round(layout.camera, 4)
    camera = np.zeros((num_frames, 4))
    camera[:, :2] = size / 2
    camera[:, :3] += t * np.asarray(layout.camera_rate)
    if layout.camera_rate[2]:
        camera[:, 2] -= 0.5 * camera[-1, 2]
    return np.round(pos, 4), np.round(vel, 4), np.round(camera, 4)
