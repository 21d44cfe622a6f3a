"""Clips that belong together, clips that repeat themselves, and other frame rates.

All are scenes of the toy world with one thing changed, and pure functions of their index.
"""

import dataclasses
import math

import numpy as np

from sora_jax.toyworld import families, generators, grammar
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    Draws,
    Scene,
    Slots,
    Subject,
    find_tier,
)

ALONE = ("attribute", "motion", "camera")  # families with one thing in the frame
EDITS = ("colour", "shape", "background")


def one_thing(tier: str, split: str, index: int, seed: int = 0) -> Scene:
    """A scene with one thing: still, moving, or under a moving camera."""
    return families.scene(tier, split, index, dict.fromkeys(ALONE, 1.0), seed)


def edited(scene: Scene, what: str, seed: int = 0) -> Scene:
    """The same scene of one thing with another colour, shape or background.

    Args:
      scene: of one thing.
      what: one of `EDITS`.
      seed: of the choice.

    Raises:
      ValueError: the scene has several things, or `what` is unknown.
    """
    if len(scene.objects) != 1:
        raise ValueError(
            f"a scene of one thing is edited, not of {len(scene.objects)} things"
        )
    draws = Draws(scene.seed + seed, f"edit/{scene.tier}/{scene.split}", scene.index)
    truth, tier = scene.truth, find_tier(scene.tier)
    if what == "background":
        tone, background = families.background(draws, tier)
        while tone == truth.tone:
            tone, background = families.background(draws, tier)
        factors = scene.factors | {"tone": tone}
        return dataclasses.replace(scene, background=background, factors=factors)
    if what not in EDITS:
        raise ValueError(f"an edit is of {', '.join(EDITS)}, not of {what!r}")
    (subject,), (thing,) = truth.subjects, scene.objects
    values = tier.colours if what == "colour" else tier.shapes
    choices = [
        dataclasses.replace(subject, **{what: value})
        for value in values
        if value != getattr(subject, what)
    ]
    allowed = [
        other
        for other in choices
        if Slots((other,)).held_out() == (scene.split == "test_comp")
    ]
    chosen = draws.choice(allowed or choices)
    changed = dataclasses.replace(thing, **{what: getattr(chosen, what)})
    facts = dataclasses.replace(truth, subjects=(chosen,)).factors()
    return dataclasses.replace(scene, objects=(changed,), factors=scene.factors | facts)


def sibling(scene: Scene, number: int = 0) -> Scene:
    """Another scene with the thing of this one: elsewhere, on another background.

    Args:
      scene: of one thing.
      number: which sibling.
    """
    tier = find_tier(scene.tier)
    label = f"sibling/{number}/{scene.tier}/{scene.split}"
    draws = Draws(scene.seed, label, scene.index)
    tone, background = families.background(draws, tier)
    subject = scene.truth.subjects[0]
    while True:
        name = draws.choice(ALONE)
        slots = families.FAMILIES[name].choose(draws, tier, scene.split)
        own = dataclasses.replace(
            slots.subjects[0], colour=subject.colour, shape=subject.shape
        )
        if Slots((own,)).held_out() == scene.truth.held_out():
            break
    slots = dataclasses.replace(slots, subjects=(own,))
    return families.realised(scene, name, slots, draws, tone, background)


def fits(tier: str, period: int) -> bool:
    """Whether the fastest and largest thing has room for a loop of so many frames."""
    size_class = find_tier(tier)
    free = size_class.size - 2 * (size_class.radius[1] + generators.MARGIN)
    return size_class.fast[0] * period / 2 <= free


def looping(
    tier: str, split: str, index: int, period: int, laps: int = 2, seed: int = 0
) -> Scene:
    """A thing that moves to and fro at constant speed, and is back after `period` frames.

    It has 1 + `laps` * `period` frames, and the path of a triangle wave. Its caption is
    that of a thing that moves one way: it does so in one half of the time.

    Raises:
      ValueError: the way there is longer than the frame.
    """
    if not fits(tier, period):
        raise ValueError(f"period {period} is too long for tier {tier}")
    size_class = find_tier(tier)
    drawn = families.scene(tier, split, index, {"motion": 1.0}, seed)
    draws = Draws(seed, f"loop/{period}/{tier}/{split}", index)
    (thing,), (subject,) = drawn.objects, drawn.truth.subjects
    room = thing.radius + generators.MARGIN
    way = np.array(DIRECTIONS[subject.direction])
    low, high = size_class.fast if subject.speed == "fast" else size_class.slow
    free = (size_class.size - 2 * room) / np.abs(way).max()
    speed = draws.uniform(low, min(high, 2 * free / period))
    reach = speed * period / 2
    lows = room + np.maximum(0, -way * reach)
    highs = size_class.size - room - np.maximum(0, way * reach)
    start = [draws.uniform(a, b) for a, b in zip(lows, highs, strict=True)]
    t = np.arange(1 + laps * period)
    phase = (t + draws.uniform(0, period)) % period
    along = speed * np.where(phase < period / 2, phase, period - phase)
    pos = np.asarray(start) + along[:, None] * way
    forth = np.where(phase < period / 2, speed, -speed)
    camera = np.repeat(drawn.camera[:1], len(t), axis=0)
    return dataclasses.replace(
        drawn,
        pos=np.round(pos[:, None], 4),
        vel=np.round((forth[:, None] * way)[:, None], 4),
        camera=camera,
    )


def at_rate(scene: Scene, fps: float) -> Scene:
    """The same scene at another frame rate; its paths are straight.

    Args:
      scene: at the rate of its tier, of 1 + n frames.
      fps: that rate times or divided by a whole number that divides n.
    """
    if scene.scale is not None or scene.later or scene.truth.events:
        raise ValueError(
            f"scenes of {scene.family} have other paths than straight ones"
        )
    ratio = fps / find_tier(scene.tier).fps
    steps = (scene.num_frames - 1) * ratio
    if not math.isclose(steps, round(steps)):
        raise ValueError(f"{scene.num_frames} frames do not become whole ones at {fps}")
    t = np.arange(round(steps) + 1) / ratio

    def sampled(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1)
        places = np.arange(len(x))
        found = [np.interp(t, places, column) for column in flat.T]
        return np.round(np.stack(found, -1).reshape(-1, *x.shape[1:]), 4)

    vel = np.round(scene.vel[:1].repeat(len(t), 0) / ratio, 4)
    return dataclasses.replace(
        scene, pos=sampled(scene.pos), vel=vel, camera=sampled(scene.camera)
    )


def unnamed(scene: Scene, tier: str) -> tuple[str, Slots]:
    """A caption of a scene of one thing that does not say which thing it is.

    Args:
      scene: of one thing.
      tier: of the caption, as of `captions.caption`.

    Returns:
      The caption, and what it states.
    """
    subject = scene.truth.subjects[0]
    seen = Subject(direction=subject.direction, speed=subject.speed)
    slots = Slots((seen,), camera=scene.truth.camera)
    label = f"unnamed/{scene.tier}/{scene.split}/{scene.family}/{tier}"
    draws = Draws(scene.seed, label, scene.index)
    wording = families.FAMILIES[scene.family].wording
    return grammar.compose(slots, wording, tier, draws)
