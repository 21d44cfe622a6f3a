"""Scenes of several shots: cuts to other backgrounds, with one thing in all of them.

Letters: T frames, S shots. In each shot the thing is elsewhere and does something else: it
moves in another direction, or waits.
"""

import functools
import itertools

import numpy as np

from sora_jax.toyworld import generators, rules, wordings
from sora_jax.toyworld.camera import LOW_CHROMA
from sora_jax.toyworld.generators import MARGIN, TRIES, Layout
from sora_jax.toyworld.grammar import Wording
from sora_jax.toyworld.reading import Reading, Track
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    HELD_OUT_DIRECTIONS,
    Draws,
    Event,
    Slots,
    Subject,
    Tier,
)

REST = "rest"  # What the thing does in a shot in which it does not move.
ELSEWHERE = 1 / 4  # Least distance across a cut, as a share of the frame's size,
JUMP = 1 / 6  # and what counts as a jump. No motion is as fast.
BLOCK = 4  # Side of the blocks whose mean grey is compared, pixels.
CHANGE = 8.0  # RMS change of the blocks' grey (of 255) at a cut; noise is below 4.
UNEXPLAINED = 0.15  # Least share of a cut's change that no camera motion explains.
LATE = 1  # Most frames between a cut and its stated time.

# -- What is true, and how it comes about ----------------------------------------------


@functools.lru_cache(maxsize=64)
def _starts(frames: int, shots: int, step: int) -> tuple[tuple[int, ...], ...]:
    """All choices of the first frames of the later shots, at multiples of `step`."""
    least = max(4, frames // 4)
    times = range(-(-least // step) * step, frames - least + 1, step)
    return tuple(
        starts
        for starts in itertools.combinations(times, shots - 1)
        if all(b - a >= least for a, b in itertools.pairwise(starts))
    )


def choose(draws: Draws, tier: Tier, split: str) -> Slots:
    frames = tier.frames(split)
    number = 2 if frames < 16 else 3 if split == "test_len" else draws.choice((2, 3))
    subject = generators.choose_attribute(draws, tier, split).subjects[0]
    ways = [
        way
        for way in tier.directions
        if (subject.colour, way) not in HELD_OUT_DIRECTIONS
    ]
    acts = draws.shuffled(ways)[:number]
    if draws.chance(0.5):
        acts[int(draws.unit() * number)] = REST
    seconds: list[float | None] = [None] * number
    if draws.chance(0.5):  # Texts state quarters of a second.
        starts = draws.choice(_starts(frames, number, tier.fps // 4))
        seconds[1:] = [start / tier.fps for start in starts]
    events = tuple(
        Event("shot", value=act, second=second)
        for act, second in zip(acts, seconds, strict=True)
    )
    return Slots((subject,), camera="static", total=1, events=events)


def lay_out(draws: Draws, tier: Tier, split: str, slots: Slots) -> Layout:
    frames, number = tier.frames(split), len(slots.events)
    stated = [event.second for event in slots.events[1:]]
    fitting = [
        starts
        for starts in _starts(frames, number, 1)
        if all(
            second in (None, start / tier.fps)
            for start, second in zip(starts, stated, strict=True)
        )
    ]
    if not fitting:
        raise ValueError(f"no shots of {frames} frames begin at seconds {stated}")
    starts = draws.choice(fitting)
    subject, (low, high) = slots.subjects[0], tier.radius
    pace = (tier.slow[1], tier.fast[1])
    if split == "test_ood":
        high, pace = 1.05 * low, (1.3 * tier.fast[1], 2.0 * tier.fast[1])
    else:  # In the few frames of a shot, only the shape of a larger thing is sure.
        low = 0.5 * (low + high)
    thing = generators.thing_of(0, subject, draws.uniform(low, high))
    room = thing.radius + MARGIN
    shot_T = np.searchsorted(starts, np.arange(frames), side="right")
    path = np.zeros((frames, 1, 2))
    last = None
    for shot, event in enumerate(slots.events):
        here = shot_T == shot
        way = np.array(DIRECTIONS.get(event.value, (0.0, 0.0)))
        steps = here.sum() - 1
        fits = (tier.size - 2 * room) / (steps * max(*abs(way), 0.1))
        speed = draws.uniform(pace[0], pace[1])
        moved = np.arange(steps + 1)[:, None] * way * min(speed, fits)
        path[here, 0] = _elsewhere(draws, tier, room, moved, last)
        last = path[here, 0][-1]
    camera = np.zeros((frames, 4))
    camera[:, :2] = tier.size / 2
    camera[:, 3] = shot_T
    return Layout(
        (thing,),
        path=path,
        camera=camera,
        later=tuple(generators.background(draws, tier)[1] for _ in starts),
    )


def _elsewhere(
    draws: Draws, tier: Tier, room: float, moved: np.ndarray, last: np.ndarray | None
) -> np.ndarray:
    """A path [T, 2] inside the frame that does not start near `last`."""
    for _ in range(TRIES):
        path = generators.placed(draws, tier, room, moved)
        if last is None or np.hypot(*(path[0] - last)) >= ELSEWHERE * tier.size:
            return path
    raise RuntimeError(f"no other place for a path of {moved[-1]} in tier {tier.name}")


# -- What frames show ------------------------------------------------------------------


def _change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """RMS change of the background's grey between pairs of frames, float64[N].

    Pixels that are coloured in either frame are left out; infinite without others.
    """
    before, after = before.astype(np.float32), after.astype(np.float32)
    both = np.ptp(before, axis=3) < LOW_CHROMA
    both &= np.ptp(after, axis=3) < LOW_CHROMA
    change = (after.mean(axis=3) - before.mean(axis=3)) * both
    frames, side = len(change), before.shape[1] // BLOCK

    def total(values: np.ndarray) -> np.ndarray:
        return values.reshape(frames, side, BLOCK, side, BLOCK).sum((2, 4))

    count = total(both)
    used = count >= BLOCK**2 / 2
    square = (total(change) / np.maximum(count, 1)) ** 2 * used
    number = used.sum((1, 2))
    mean = square.sum((1, 2)) / np.maximum(number, 1)
    return np.where(number > 0, np.sqrt(mean), np.inf)


def cuts(reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """The first frames int[S - 1] of later shots, and whether each has a new background.

    At a cut the background changes in a way that is no motion of the camera, or the
    largest thing jumps. A cut that a decoder has spread over two steps between frames is
    one cut, where the thing jumps or the background changes most.
    """
    if reading.num_frames == 1:
        return np.zeros(0, int), np.zeros(0, bool)
    video = reading.video
    change = _change(video[:-1], video[1:])
    new = change > CHANGE
    if new.any():
        new &= reading.camera.error > UNEXPLAINED
    centre = np.full((reading.num_frames, 2), np.nan)
    largest = reading.rank == 0
    centre[reading.frame[largest]] = reading.centre[largest]
    away = np.linalg.norm(np.diff(centre, axis=0), axis=1)
    jumps = away > JUMP * reading.tier.size
    steps: list[list[int]] = []
    for step in np.flatnonzero(new | jumps).tolist():
        if steps and steps[-1] == [step - 1]:
            steps[-1].append(step)
        else:
            steps.append([step])
    starts = [1 + max(cut, key=lambda d: (jumps[d], change[d])) for cut in steps]
    before, after = [cut[0] for cut in steps], [cut[-1] + 1 for cut in steps]
    other = _change(video[before], video[after]) > CHANGE
    moved = np.array([new[cut].any() for cut in steps], bool)
    return np.array(starts, int), other & moved


def _thing(shot: Reading) -> Track | None:
    tracks = shot.tracks(1)
    return tracks[0] if tracks else None


def _acts(shot: Reading, track: Track | None, value: str | None) -> bool:
    """Whether the thing does in the shot what is stated."""
    if track is None or track.seen.sum() < 2:
        return False
    if value is None:
        return True
    if value == REST:
        speed, wander = np.hypot(*track.line[0]), track.line[1]
        return bool(speed <= rules.MOVING and wander <= rules.JITTER * shot.tier.size)
    slots = Slots((Subject(track.colour, direction=value),))
    return rules.motion(slots, shot)["direction"]


def rule(slots: Slots, reading: Reading) -> rules.Verdict:
    """The stated number of cuts (and their times), and what happens in each shot.

    In all shots, the thing has the same colour and shape; each cut changes the background.
    """
    subject = slots.subjects[0] if slots.subjects else Subject()
    starts, new = cuts(reading)
    bounds = itertools.pairwise([0, *starts.tolist(), reading.num_frames])
    shots = [reading.part(*bound) for bound in bounds]
    tracks = [_thing(shot) for shot in shots]
    seconds = [event.second for event in slots.events[1:]]
    right_number = len(starts) == len(seconds)
    first = tracks[0]
    looks = {None if t is None else (t.colour, t.shape) for t in tracks}
    parts = {
        "colour": first is not None and subject.colour in (None, first.colour),
        "shape": first is not None and subject.shape in (None, first.shape),
        "same": len(looks) == 1 and None not in looks,
        "cuts": right_number
        and all(
            second is None or abs(start - second * reading.tier.fps) <= LATE
            for start, second in zip(starts.tolist(), seconds, strict=True)
        ),
        "backgrounds": bool(new.all()),
        "acts": right_number
        and all(
            _acts(shot, track, event.value)
            for shot, track, event in zip(shots, tracks, slots.events, strict=True)
        ),
    }
    return rules.passed(parts)


# -- Words -----------------------------------------------------------------------------

_, _TOTAL, _, _CAMERA = wordings.MOTION.extras

WORDING = Wording(
    short=(
        "{a0} {shots}",
        "{n0} {shots}",
        "{the0} {shots}",
        "{a0} first {shots}",
        "{n0} first {shots}",
        "{the0} first {shots}",
        "first {a0} {shots}",
        "first {n0} {shots}",
    ),
    medium=(
        "{a0} {shots}",
        "{a0} first {shots}",
        "first {a0} {shots}",
        "we see {a0} that {shots}",
        "there is {a0} that {shots}",
        "a video of {a0} that {shots}",
        "the video shows {a0} that {shots}",
        "in the first scene {a0} {shots}",
    ),
    main=(
        "the video shows {a0} that first {shots}",
        "in this clip {a0} first {shots}",
        "we see {a0} that first {shots}",
        "at first {a0} {shots}",
        "at the start {a0} {shots}",
        "in the first shot {a0} {shots}",
        "in the first scene {a0} {shots}",
        "there is {a0} that first {shots}",
    ),
    extras=(
        (
            "it looks the same in every shot",
            "it looks alike from start to end",
            "only its place and what is behind it are new",
            "its colour and form stay the same",
            "each shot shows the same subject",
            "the subject is the same in each shot",
            "it is the same subject from start to end",
            "its look does not change",
        ),
        (
            "at the start the background is {tone}",
            "the first background is {tone}",
            "the first wall is {tone}",
            "at first the wall behind is {tone}",
            "at first the backdrop is {tone}",
            "the first backdrop is {tone} and wavy",
            "the first wall is {tone} and wavy",
            "at the start the backdrop is {tone}",
        ),
        _TOTAL,
        _CAMERA,
    ),
    structured=(
        "subject: {n0}, {key_shots}",
        "{key_camera}",
        "first background: {tone}",
    ),
    alt=(
        "{n0} {shots}",
        "{a0} {shots}",
        "my clip of {a0} that {shots}",
        "cool video {n0} {shots}",
        "{n0} test footage {shots}",
        "look at this {n0} that {shots}",
        "some {n0} that {shots}",
        "hd {n0} {shots}",
    ),
)
