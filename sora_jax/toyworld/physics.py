"""Families that obey mechanics: a fall onto the ground, and an elastic collision.

Letters: T frames, K objects. Speeds are in pixels a frame, accelerations in pixels per
frame squared. The ground is one pixel above the frame's bottom edge. What captions do not
state is still one constant for a tier (gravity), or follows from what is seen: masses are
squared radii.
"""

import dataclasses
import functools
import math

import numpy as np

from sora_jax.toyworld import rules, wordings
from sora_jax.toyworld.generators import (
    MARGIN,
    TRIES,
    Layout,
    one_subject,
    thing_of,
    two_subjects,
)
from sora_jax.toyworld.grammar import Wording
from sora_jax.toyworld.reading import Reading, Track, cover
from sora_jax.toyworld.render import AREA, SQUARE, TRIANGLE, distance
from sora_jax.toyworld.rules import MOVING, Verdict, passed
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    OPPOSITE,
    PALETTE,
    Draws,
    Event,
    Range,
    Slots,
    Subject,
    Tier,
)

GROUND = 1.0  # Pixels between the ground and the frame's bottom edge.
RESTITUTION = 0.6  # Speed after a bounce as a share of the speed before it.
_LAST_HOP = 0.25  # A hop that is lower than this, in pixels, is left out.


@dataclasses.dataclass(frozen=True)
class Fall:
    """How things fall in a tier: gravity, and ranges of what is drawn.

    The heights are long enough that no first bounce ends within a clip of the usual
    length, and short enough that the ground is reached in time.
    """

    gravity: float
    height: Range
    ood_height: Range
    speed: Range  # Sideways, of what is thrown.
    ood_speed: Range


FALLS = {
    "tw32": Fall(1.6, (11.0, 16.0), (17.0, 20.0), (1.1, 1.5), (1.9, 2.4)),
    "tw64": Fall(0.9, (25.0, 36.0), (38.0, 44.0), (0.9, 1.4), (1.8, 2.6)),
}


@dataclasses.dataclass(frozen=True)
class Approach:
    """How fast two things come closer in a tier: one alone, or both.

    Beyond the range they are faster.
    """

    alone: Range
    ood_alone: Range
    both: Range
    ood_both: Range


APPROACHES = {
    "tw32": Approach((1.2, 1.5), (1.55, 1.8), (1.8, 2.3), (2.4, 3.0)),
    "tw64": Approach((1.0, 1.35), (1.45, 1.85), (1.6, 2.2), (2.4, 3.0)),
}
MEETING = (0.4, 0.6)  # When two things meet, as a share of the clip.
SHARES = (0.4, 0.6)  # The first thing's share of the speed at which both come closer.


# -- Gravity: the scene ----------------------------------------------------------------


def choose_gravity(draws: Draws, tier: Tier, split: str) -> Slots:
    """One thing, dropped or thrown to a side; it bounces or lies where it lands."""
    way = draws.choice(("dropped", "thrown"))
    subject = one_subject(draws, tier, split, moving=way == "thrown")
    while (way == "thrown" and subject.direction not in ("left", "right")) or (
        split != "test_comp" and (subject.colour, "down") in HELD_OUT_DIRECTIONS
    ):
        subject = one_subject(draws, tier, split, moving=way == "thrown")
    events = Event("fall", value=way), Event("bounce", happens=draws.chance(0.5))
    return Slots((subject,), camera="static", total=1, events=events)


def below(shape: str) -> float:
    """How far a shape of radius 1 reaches downwards, and `_above` upwards."""
    return {"triangle": 0.5 * TRIANGLE, "square": SQUARE}.get(shape, 1.0)


def _above(shape: str) -> float:
    return {"triangle": TRIANGLE, "square": SQUARE}.get(shape, 1.0)


def heights(
    height: float, gravity: float, restitution: float, num_frames: int
) -> tuple[np.ndarray, float]:
    """Heights above the ground, float64[T], of a thing that falls from rest.

    Also returns when it first lands, in frames.
    """
    t = np.arange(num_frames, dtype=np.float64)
    lands = math.sqrt(2 * height / gravity)
    speed, begins = gravity * lands, lands
    found = np.where(t < lands, height - 0.5 * gravity * t * t, 0.0)
    while begins < num_frames:
        speed *= restitution
        if speed * speed / (2 * gravity) < _LAST_HOP:
            break
        since, lasts = t - begins, 2 * speed / gravity
        hop = speed * since - 0.5 * gravity * since * since
        found = np.where((since >= 0) & (since < lasts), hop, found)
        begins += lasts
    return found, lands


def lay_out_gravity(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    subject, fall = slots.subjects[0], FALLS[tier.name]
    frames = tier.frames(split)
    thing = thing_of(0, subject, draws.uniform(*tier.small_radius))
    beyond = split == "test_ood"
    low, high = fall.ood_height if beyond else fall.height
    ground = tier.size - GROUND - below(thing.shape) * thing.radius
    room = ground - _above(thing.shape) * thing.radius - MARGIN
    bounces = slots.events[1].happens
    above, lands = heights(
        draws.uniform(low, min(high, room)),
        fall.gravity,
        RESTITUTION if bounces else 0.0,
        frames,
    )
    t = np.arange(frames, dtype=np.float64)
    # What does not bounce lies still where it lands.
    sideways = t if bounces else np.minimum(t, lands)
    free = tier.size - 2 * (thing.radius + MARGIN)
    speed = 0.0
    if subject.direction is not None:
        low, high = fall.ood_speed if beyond else fall.speed
        speed = draws.uniform(low, min(high, free / sideways[-1]))
        speed *= DIRECTIONS[subject.direction][0]
    shift = speed * sideways
    low, high = thing.radius + MARGIN, tier.size - thing.radius - MARGIN
    x = draws.uniform(low - min(0.0, shift[-1]), high - max(0.0, shift[-1]))
    path = np.stack([x + shift, ground - above], axis=1)
    return Layout((thing,), path=path[:, None])


# -- Sizes and places ------------------------------------------------------------------

EDGE = 2.5  # Pixels beyond an edge in which blur may leave some of the colour.


def measured(
    reading: Reading, track: Track, other: Track | None = None
) -> tuple[float, Track]:
    """The radius of a track of a known shape, and the track with finer centres.

    Both are taken from all coverage up to some pixels beyond the edge, faint pixels too,
    so that blur and noise hardly change them. Pixels that are nearer to another thing are
    left out, and the area is that of the frames in which it is farthest.
    """
    frames = np.flatnonzero(track.seen if other is None else track.seen & other.seen)
    pixel = np.arange(reading.tier.size) + 0.5

    def away(thing: Track) -> np.ndarray:
        """Distance of each pixel from the thing, [frames, H, W]."""
        dx = pixel - thing.centre[frames, :1]
        dy = pixel - thing.centre[frames, 1:]
        radius = np.sqrt(thing.area[frames] / AREA[thing.shape])
        dx, dy = np.broadcast_arrays(dx[:, None], dy[:, :, None])
        return distance(thing.shape, dx, dy, radius[:, None, None])

    own = away(track)
    window, clear = own <= EDGE, np.ones(len(frames), bool)
    if other is not None:
        others = away(other)
        window &= own <= others
        gap = (own + others).min(axis=(1, 2))
        clear = gap >= min(2 * EDGE, np.quantile(gap, 0.75))
    rgb = np.array([PALETTE[track.colour]], np.float32)
    shown = np.where(window, cover(reading.video[frames], rgb)[..., 0], 0)
    shown = shown.astype(np.float64)
    area = np.maximum(shown.sum(axis=(1, 2)), 1.0)
    x = shown.sum(axis=1) @ pixel / area
    y = shown.sum(axis=2) @ pixel / area
    centre = track.centre.copy()
    centre[frames] = np.stack([x, y], axis=1)
    radius = math.sqrt(float(np.median(area[clear])) / AREA[track.shape])
    return radius, dataclasses.replace(track, centre=centre)


# -- Gravity: the rule -----------------------------------------------------------------

GRAVITY_ERROR = 0.25  # Of the measured acceleration, as a share.
STARTS = 0.75  # Most of the vertical speed at the start, in units of gravity a frame.
OFF = 0.6  # Most RMS distance from the path of a free fall, in units of gravity.
BENT = 0.35  # Most RMS distance from a straight path, pixels.
LYING = 1.5  # Most distance of something on the ground from it, pixels,
SLIDES = 0.35  # and most speed of what lies still.
BOUNCES = (0.25, 1.0)  # Speed after as a share of the speed before; never more energy.


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A track as a fall: heights above the ground float64[T], and the first landing.

    The first `before` frames are those before contact.
    """

    time: np.ndarray
    side: np.ndarray
    above: np.ndarray
    before: int

    def bent(self, chosen: slice) -> float:
        """RMS distance sideways from uniform motion in some frames, pixels."""
        time, side = self.time[chosen], self.side[chosen]
        if len(time) < 3:
            return 0.0
        rest = side - np.polyval(np.polyfit(time, side, 1), time)
        return math.sqrt((rest * rest).mean())

    def speed(self, chosen: slice) -> float:
        """Least-squares speed sideways in some frames."""
        time, side = self.time[chosen], self.side[chosen]
        if len(time) < 2:
            return 0.0
        return float(np.polyfit(time, side, 1)[0])


def _flight(reading: Reading, track: Track | None, gravity: float) -> _Flight | None:
    """None without an object of a known shape in the first frame."""
    if track is None or track.shape is None or not track.seen[0]:
        return None
    radius, track = measured(reading, track)
    ground = reading.tier.size - GROUND - below(track.shape) * radius
    time = np.flatnonzero(track.seen).astype(np.float64)
    above = ground - track.centre[track.seen, 1]
    steps = -np.diff(above) / np.diff(time)  # downwards
    before = 0
    # A frame within one step of gravity of the ground may already be a contact, and a
    # fall that gets slower is one.
    while before < len(above) and above[before] >= gravity:
        if before > 1 and steps[before - 1] < steps[before - 2]:
            break
        before += 1
    return _Flight(time, track.centre[track.seen, 0], above, before)


def _falls(flight: _Flight, gravity: float) -> tuple[bool, float]:
    """Whether it falls freely from rest onto the ground, and its speed there."""
    n = flight.before
    if not 3 <= n < len(flight.above):
        return False, 0.0
    time, above = flight.time[:n], flight.above[:n]
    bend, speed, _ = np.polyfit(time, above, 2)
    # With the speed at the start known to be zero, the acceleration is sharper.
    square = 0.5 * time * time
    slope, start = np.polyfit(square, above, 1)
    rest = above - start - slope * square
    meets = math.sqrt(max(0.0, 2 * gravity * start))
    falls = bool(
        bend < 0
        and abs(speed) <= STARTS * gravity
        and abs(-slope / gravity - 1) < GRAVITY_ERROR
        and math.sqrt((rest * rest).mean()) <= OFF * gravity
        # Of two frames around a contact, one is as near to the ground as this.
        and flight.above[n - 1 :].min() <= max(LYING, 0.45 * meets)
    )
    return falls, meets


def _way(subject: Subject, event: Event | None, flight: _Flight) -> bool:
    """Whether it is thrown to the stated side, or dropped straight."""
    if flight.before < 3 or flight.bent(slice(0, flight.before)) > BENT:
        return False
    speed = flight.speed(slice(0, flight.before))
    thrown = abs(speed) > MOVING
    if event is not None and event.value is not None:
        if thrown != (event.value == "thrown"):
            return False
    if subject.direction in (None, "down"):  # all of them fall down
        return True
    ux = DIRECTIONS[subject.direction][0]
    return thrown and abs(ux) == 1 and ux * speed > 0


def _rebounds(flight: _Flight, gravity: float, meets: float, bounces: bool) -> bool:
    """Whether the first landing ends as stated: a hop in free flight, or lying still."""
    n = flight.before
    time, above = flight.time[n:], flight.above[n:]
    if not len(time) or not meets:
        return False
    if not bounces:
        lies = np.abs(above) <= LYING
        # In the first of these frames it may still fall.
        speed = flight.speed(slice(n + 1, None))
        return bool(lies[1:].all()) and len(lies) > 1 and abs(speed) <= SLIDES
    if flight.bent(slice(None)) > BENT:  # nothing pushes it sideways
        return False
    # The time of contact follows from the fall before it.
    square = 0.5 * flight.time[:n] ** 2
    start = (flight.above[:n] + gravity * square).mean()
    since = time - math.sqrt(2 * start / gravity)
    flying = since > 0.1  # frames
    # The first hop is the highest, so its height gives how long it lasts.
    peak = max(0.0, float(above.max()))
    flying &= since < 0.95 * 2 * math.sqrt(2 * peak / gravity)
    if flying.sum() < 2:
        return False
    since, above = since[flying], above[flying]
    lifted = above + 0.5 * gravity * since * since
    speed = float(since @ lifted / (since @ since))
    rest = lifted - speed * since
    low, high = BOUNCES
    return (
        low * meets <= speed <= high * meets
        and math.sqrt((rest * rest).mean()) <= OFF * gravity
    )


def gravity(slots: Slots, reading: Reading) -> Verdict:
    """The stated colour and shape; it falls from rest onto the ground, thrown as stated.

    It gets faster by the tier's gravity, and bounces or lies still, as stated.
    """
    subject = slots.subjects[0] if slots.subjects else Subject()
    said = {event.kind: event for event in slots.events}
    track = rules.find(reading, subject, 1)
    constants = FALLS.get(reading.tier.name)
    flight = None
    if constants is not None:
        flight = _flight(reading, track, constants.gravity)
    parts = {
        "colour": track is not None,
        "shape": rules.has_shape(reading, subject, track),
        "falls": False,
        "way": False,
        "bounce": False,
    }
    if flight is None:
        return passed(parts)
    falls, meets = _falls(flight, constants.gravity)
    bounce = said.get("bounce")
    return passed(
        parts
        | {
            "falls": falls,
            "way": _way(subject, said.get("fall"), flight),
            "bounce": bounce is None
            or _rebounds(flight, constants.gravity, meets, bounce.happens),
        }
    )


# -- Gravity: the words ----------------------------------------------------------------

# Templates that fit every scene: the number of things, the background and the camera.
_AROUND = wordings.MOTION.extras[1:]

GRAVITY = Wording(
    short=(
        "{a0} {fall0} and {bounce0}",
        "{n0} {fall0}, {bounce0}",
        "{the0} {fall0} and {bounce0}",
        "{n0} {fall0}, then {bounce0}",
        "{n0} {fall0} and {bounce0}",
        "{the0} {fall0}, {bounce0}",
        "{a0} {fall0}, {bounce0}",
        "{n0}: {fall0}, {bounce0}",
    ),
    medium=(
        "{a0} {fall0} and {bounce0}",
        "{a0} {fall0} and then {bounce0}",
        "a video of {a0} that {fall0} and {bounce0}",
        "there is {a0} that {fall0} and {bounce0}",
        "we see that {a0} {fall0} and {bounce0}",
        "the scene shows how {a0} {fall0} and {bounce0}",
        "{a0} {fall0}, and in the end it {bounce0}",
        "first {a0} {fall0}, then it {bounce0}",
    ),
    main=(
        "in this clip {a0} {fall0} and then {bounce0}",
        "the video shows how {a0} {fall0} and {bounce0}",
        "we see {a0} that {fall0} and {bounce0}",
        "{a0} {fall0}, gets to the ground and {bounce0}",
        "{a0} {fall0} through the air and {bounce0}",
        "the scene shows {a0} that {fall0} and then {bounce0}",
        "there is {a0} that {fall0} and at last {bounce0}",
        "first {a0} {fall0}, and once on the ground it {bounce0}",
    ),
    extras=(
        (
            "it gets faster on its way",
            "its weight pulls it to the ground",
            "it starts from rest in the air",
            "the ground is the end of the frame",
            "its pace rises with every frame",
            "nothing holds it in the air",
            "it stays inside the frame",
            "the way through the air is short",
        ),
        *_AROUND,
    ),
    structured=(
        "subject: {n0}, event: {fall0}, then: {bounce0}",
        "{key_camera}",
        "background: {tone}",
    ),
    alt=(
        "{n0} {fall0}",
        "{a0} {fall0} and {bounce0}",
        "my clip of {a0}",
        "cool video {n0} {fall0}",
        "{n0} {bounce0} test footage",
        "look at this {n0}, it {bounce0}",
        "{n0} {fall0}, {bounce0} hd",
        "some {n0} {fall0}",
    ),
)


# -- Collision: the scene --------------------------------------------------------------


def choose_collision(draws: Draws, tier: Tier, split: str) -> Slots:
    """Two things that move towards each other, or one that moves towards one at rest."""
    resting = draws.chance(0.5)
    event = Event("collide", of=1, by=0, value="resting" if resting else None)
    while True:
        first, second = two_subjects(draws, tier, split, moving=True)
        if resting:
            second = dataclasses.replace(second, direction=None)
        slots = Slots((first, second), camera="static", total=2, events=(event,))
        # Held-out combinations of a direction may be gone with it.
        if slots.held_out() != (split == "test_comp") or not _face(first, second):
            continue
        if split == "test_comp" or not _may_be_held_out(first, second):
            return slots


def _may_be_held_out(first: Subject, second: Subject) -> bool:
    """Whether one of them, pushed to and fro, could move in a held-out combination."""
    return any(
        (subject.colour, way) in HELD_OUT_DIRECTIONS
        for subject in (first, second)
        for way in (first.direction, OPPOSITE[first.direction])
    )


def _face(first: Subject, second: Subject) -> bool:
    """Whether the first moves along an axis, and the second towards it or not at all."""
    ux, uy = DIRECTIONS[first.direction]
    if ux * uy:
        return False
    return second.direction in (None, OPPOSITE[first.direction])


_STEP = 0.01
_OFFSETS = np.round(np.arange(-1.25, 1.25 + _STEP / 2, _STEP), 2)


@functools.cache
def _outline(shape: str, way: str) -> np.ndarray:
    """How far a shape of radius 1 reaches one way, at each of `_OFFSETS` across it."""
    ux, uy = DIRECTIONS[way]
    across, along = _OFFSETS[:, None], _OFFSETS[None]
    inside = distance(shape, along * ux - across * uy, along * uy + across * ux, 1.0)
    reach = np.where(inside <= 1e-9, along, -np.inf).max(axis=1)
    return np.maximum(reach, -10.0)  # finite, so that it can be interpolated


def touching(one: tuple[str, float], other: tuple[str, float], way: str) -> float:
    """The distance at which two shapes (with their radii) touch, the second `way` of it.

    Both centres are on one line along `way`.
    """
    across = np.linspace(-1.2, 1.2, 241) * max(one[1], other[1])
    # Offsets across are mirrored for the other way, and so is its outline.
    near = np.interp(across / one[1], _OFFSETS, _outline(one[0], way))
    outline = _outline(other[0], OPPOSITE[way])[::-1]
    far = np.interp(across / other[1], _OFFSETS, outline)
    both = one[1] * near + other[1] * far
    return float(both[(near > -1) & (far > -1)].max())


def elastic(masses: tuple[float, float], before: np.ndarray) -> np.ndarray:
    """Velocities [2, ...] of two bodies after an elastic collision along a line."""
    first, second = masses
    middle = (first * before[0] + second * before[1]) / (first + second)
    return 2 * middle - before


def lay_out_collision(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    """Drawn until both stay inside the frame."""
    frames, approach = tier.frames(split), APPROACHES[tier.name]
    first, second = slots.subjects
    way = first.direction
    alone = second.direction is None
    if split == "test_ood":
        speeds = approach.ood_alone if alone else approach.ood_both
    else:
        speeds = approach.alone if alone else approach.both
    pace = (tier.num_frames - 1) / (frames - 1)  # in twice the time, half as fast
    along = np.array(DIRECTIONS[way])
    time = np.arange(frames, dtype=np.float64)[:, None]
    for _ in range(TRIES):
        pair = tuple(
            thing_of(k, subject, draws.uniform(*tier.small_radius))
            for k, subject in enumerate(slots.subjects)
        )
        closing = pace * draws.uniform(*speeds)
        share = 1.0 if alone else draws.uniform(*SHARES)
        meets = draws.uniform(*MEETING) * (frames - 1)
        before = closing * np.array([share, share - 1.0])
        after = elastic(tuple(thing.radius**2 for thing in pair), before)
        apart = touching(*((thing.shape, thing.radius) for thing in pair), way)
        since = time - meets
        at = since * np.where(since < 0, before, after) + [0.0, apart]  # [T, 2]
        path = at[:, :, None] * along
        place = _placed(draws, tier, pair, path)
        if place is not None:
            return Layout(pair, path=path + place)
    raise RuntimeError(f"no room for {slots} in tier {tier.name}")


def _placed(draws: Draws, tier: Tier, pair: tuple, path: np.ndarray) -> list | None:
    """A shift that keeps the things of path[T, 2, 2] inside the frame, if there is one."""
    shift = []
    for axis in (0, 1):
        reach = [
            (t.radius, t.radius)
            if axis == 0
            else (t.radius * _above(t.shape), t.radius * below(t.shape))
            for t in pair
        ]
        less, more = np.array(reach).T
        low = MARGIN - (path[:, :, axis] - less).min()
        high = tier.size - MARGIN - (path[:, :, axis] + more).max()
        if low > high:
            return None
        shift.append(draws.uniform(low, high))
    return shift


# -- Collision: the rule ---------------------------------------------------------------

LEAST = 2  # frames before, and after, a contact
MEETS_STEP = 0.1  # of the times that are tried for a contact, frames
TOUCH = 0.03  # Most gap or overlap at the contact, as a share of the frame's size,
TOUCH_PIXELS = 0.9  # plus this.
MOMENTUM_ERROR = 0.15  # Of the sum of both things' momenta.
VELOCITY_ERROR = 0.2  # Of a velocity after contact, as a share of the closing speed.


@dataclasses.dataclass(frozen=True)
class _Contact:
    """Two tracks as two straight paths each, before and after a contact.

    Velocities are [2 things, 2]; `gap` is the offset of the second at the contact, `stray`
    the RMS distance from the paths.
    """

    before: np.ndarray
    after: np.ndarray
    gap: np.ndarray
    stray: float


def _contact(tracks: list[Track]) -> _Contact | None:
    """The best fit of a path each with one bend; None where there are too few frames."""
    both = tracks[0].seen & tracks[1].seen
    time = np.flatnonzero(both).astype(np.float64)
    at = np.concatenate([track.centre[both] for track in tracks], axis=1)  # [T, 4]
    if both.mean() < rules.PRESENT or len(time) < 2 * LEAST + 1:
        return None
    best, least = None, np.inf
    for meets in np.arange(time[LEAST - 1], time[-LEAST] + MEETS_STEP, MEETS_STEP):
        since = time - meets
        basis = [np.ones_like(since), np.minimum(since, 0), np.maximum(since, 0)]
        basis = np.stack(basis, axis=1)
        fit, *_ = np.linalg.lstsq(basis, at, rcond=None)
        rest = float(np.square(at - basis @ fit).sum())
        if rest < least:
            best, least = fit, rest
    place, before, after = best.reshape(3, 2, 2)
    stray = math.sqrt(least / (2 * len(time)))
    return _Contact(before, after, place[1] - place[0], stray)


def _approach(slots: Slots, contact: _Contact) -> list[bool]:
    """Whether each thing moves before the contact as stated, one entry a statement."""
    event = next((e for e in slots.events if e.kind == "collide"), Event("collide"))
    right = []
    for k, subject in enumerate(slots.subjects):
        velocity = contact.before[k]
        speed = math.hypot(*velocity)
        if subject.direction is not None:
            ux, uy = DIRECTIONS[subject.direction]
            along = ux * velocity[0] + uy * velocity[1]
            right.append(speed > MOVING and along > 0.9 * speed)
        if k == event.by:  # what hits another thing moves
            right.append(speed > MOVING)
        if k == event.of and event.value == "resting":
            right.append(speed <= MOVING)
    return right


def collision(slots: Slots, reading: Reading) -> Verdict:
    """Two stated things meet as stated, touch, and part by the laws of elastic bodies.

    Masses are squared radii, which follow from areas and shapes.
    """
    names = ("colours", "shapes", "approach", "meet", "separate", "momentum", "speeds")
    parts = dict.fromkeys(names, False)
    if len(slots.subjects) != 2:
        return passed(parts)
    tracks = rules._pair(slots, reading)
    parts["colours"] = all(track is not None for track in tracks)
    pairs = zip(slots.subjects, tracks, strict=True)
    parts["shapes"] = all(rules.has_shape(reading, *pair) for pair in pairs)
    if not parts["colours"] or any(track.shape is None for track in tracks):
        return passed(parts)
    found = [
        measured(reading, track, other)
        for track, other in zip(tracks, tracks[::-1], strict=True)
    ]
    bodies = [(track.shape, radius) for radius, track in found]
    tracks = [track for _, track in found]
    way = _side(tracks)
    axis = np.array(DIRECTIONS[way])
    contact = _contact(tracks)
    if contact is None:
        return passed(parts)
    parts["approach"] = all(_approach(slots, contact))
    closing, leaving = (
        float((v[1] - v[0]) @ axis) for v in (contact.before, contact.after)
    )
    near = TOUCH_PIXELS + TOUCH * reading.tier.size
    apart = float(contact.gap @ axis)
    parts["meet"] = (
        closing < -MOVING
        and contact.stray <= BENT
        and abs(apart - touching(*bodies, way)) <= near
    )
    masses = tuple(radius**2 for _, radius in bodies)
    weights = np.array(masses)[:, None]
    moved = np.hypot(*(weights * (contact.after - contact.before)).sum(axis=0))
    total = np.hypot(*(weights * contact.before).T).sum()
    lost = contact.after - elastic(masses, contact.before)
    parts["separate"] = apart > 0 and leaving > MOVING
    parts["momentum"] = bool(moved <= MOMENTUM_ERROR * total)
    parts["speeds"] = bool(np.hypot(*lost.T).max() <= VELOCITY_ERROR * abs(closing))
    return passed(parts)


def _side(tracks: list[Track]) -> str:
    """The way from the first to the second in the first frame with both."""
    first = int(np.argmax(tracks[0].seen & tracks[1].seen))
    offset = tracks[1].centre[first] - tracks[0].centre[first]
    axes = [name for name, unit in DIRECTIONS.items() if unit[0] * unit[1] == 0]
    return max(axes, key=lambda name: float(offset @ DIRECTIONS[name]))


# -- Collision: the words --------------------------------------------------------------

COLLISION = Wording(
    short=(
        "{a0} {verb} {way0} and {hit1}",
        "{n0} {verb} {way0}, {hit1}",
        "{n0} {ing} {way0} {hit1}",
        "{a0} {ing} {way0} {hit1}",
        "{the0} {verb} {way0} and {hit1}",
        "{n0} {verb} {way0} and {hit1}",
        "{a0} that {verb} {way0} {hit1}",
        "{the0} {ing} {way0} {hit1}",
    ),
    medium=(
        "{a0} {verb} {dir0} and {hit1}",
        "{a0} {verb} {dir0} until it {hit1}",
        "we see {a0} that {verb} {dir0} and {hit1}",
        "there is {a0} that {verb} {dir0} and {hit1}",
        "a video of {a0} that {verb} {dir0} and {hit1}",
        "as {a0} {verb} {dir0} it {hit1}",
        "{a0} {ing} {dir0} {hit1}",
        "the scene shows how {a0} {verb} {dir0} and {hit1}",
    ),
    main=(
        "{a0} {verb} {dir0} and {hit1}",
        "the video shows {a0} {ing} {dir0} until it {hit1}",
        "in this clip {a0} {verb} {dir0} and {hit1}",
        "we see {a0} {ing} {dir0}, and then it {hit1}",
        "as {a0} {verb} {dir0}, it {hit1}",
        "first {a0} {verb} {dir0}, then it {hit1}",
        "there is {a0} that {verb} {dir0} and {hit1}",
        "the scene shows {a0} that {verb} {dir0} until it {hit1}",
    ),
    extras=(
        (
            "then they move apart",
            "they touch only once and part again",
            "neither passes through the other",
            "after that they go apart",
            "their touch is short and clean",
            "no motion is lost when they touch",
            "both stay inside the frame",
            "their touch changes how both move",
        ),
        *_AROUND,
    ),
    structured=(
        "first: {n0}, motion: {key_dir0}, event: {hit1}",
        "{key_camera}",
        "background: {tone}",
    ),
    alt=(
        "{n0} {hit1}",
        "{a0} {verb} {way0} and {hit1}",
        "my clip of {a0} and {a1}",
        "cool video {n0} {ing} {way0} {hit1}",
        "{n0} and {n1} test footage",
        "look at this {n0}, it {hit1}",
        "{n0} {way0} {hit1} hd",
        "some {n0} {ing}, it {hit1}",
    ),
)
