"""The registry of scene families, and everything that is drawn from it.

A family is one entry: which facts it draws (`choose`), which scene shows them (`lay_out`),
how captions state them (`wording`) and when a video shows them (`rule`). Those of `BASIC`
exist in every tier, and scenes are of them unless others are named.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from sora_jax.toyworld import (
    causes,
    generators,
    journeys,
    physics,
    rules,
    shots,
    wordings,
)
from sora_jax.toyworld.generators import Layout, background
from sora_jax.toyworld.grammar import Wording, compose
from sora_jax.toyworld.reading import Reading
from sora_jax.toyworld.scene import (
    SPLITS,
    TIERS,
    Background,
    Draws,
    Scene,
    Slots,
    Tier,
    find_tier,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of scene; `rule` returns a verdict for each part and for "pass".

    `tiers` are those whose frames show it well enough for the rule, `most_events` are
    those that the rule reads.
    """

    choose: Callable[[Draws, Tier, str], Slots]
    lay_out: Callable[[Draws, Tier, str, Slots], Layout]
    wording: Wording
    rule: Callable[[Slots, Reading], dict[str, bool]]
    tiers: tuple[str, ...] = tuple(TIERS)
    most_events: int = 0


_LARGE = ("tw32", "tw64")  # frames with room for what takes its course

FAMILIES: dict[str, Family] = {
    "attribute": Family(
        generators.choose_attribute,
        generators.lay_out_attribute,
        wordings.ATTRIBUTE,
        rules.attribute,
    ),
    "count": Family(
        generators.choose_count,
        generators.lay_out_count,
        wordings.COUNT,
        rules.count,
    ),
    "relation": Family(
        generators.choose_relation,
        generators.lay_out_relation,
        wordings.RELATION,
        rules.relation,
    ),
    "motion": Family(
        generators.choose_motion,
        generators.lay_out_motion,
        wordings.MOTION,
        rules.motion,
    ),
    "motion_binding": Family(
        generators.choose_motion_binding,
        generators.lay_out_motion_binding,
        wordings.MOTION_BINDING,
        rules.motion_binding,
    ),
    "camera": Family(
        generators.choose_camera,
        generators.lay_out_camera,
        wordings.CAMERA,
        rules.camera,
    ),
    "gravity": Family(
        physics.choose_gravity,
        physics.lay_out_gravity,
        physics.GRAVITY,
        physics.gravity,
        _LARGE,
        most_events=2,
    ),
    "collision": Family(
        physics.choose_collision,
        physics.lay_out_collision,
        physics.COLLISION,
        physics.collision,
        _LARGE,
        most_events=1,
    ),
    "shots": Family(shots.choose, shots.lay_out, shots.WORDING, shots.rule, _LARGE, 3),
    "to_and_fro": Family(
        journeys.choose_to_and_fro,
        journeys.lay_out_to_and_fro,
        journeys.TO_AND_FRO,
        journeys.to_and_fro,
        _LARGE,
        most_events=1,
    ),
    "camera_path": Family(
        journeys.choose_camera_path,
        journeys.lay_out_camera_path,
        journeys.CAMERA_PATH,
        journeys.camera_path,
        _LARGE,
        most_events=2,
    ),
    "change": Family(
        causes.choose_change,
        causes.lay_out_change,
        causes.CHANGE,
        causes.change,
        _LARGE,
        most_events=1,
    ),
}

BASIC = ("attribute", "count", "relation", "motion", "motion_binding", "camera")


def find_family(name: str) -> Family:
    """The family of that name; ValueError lists the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        known = ", ".join(FAMILIES)
        raise ValueError(f"no toy-world family {name!r}; there are {known}") from None


def _check_tier(tier: str, family: str) -> None:
    tiers = find_family(family).tiers
    if tier not in tiers:
        raise ValueError(
            f"tier {tier} has no family {family!r}; {', '.join(tiers)} have"
        )


@functools.lru_cache(maxsize=64)
def _shares(weights: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    """Cumulative shares in the registry's order."""
    by_name = dict(weights)
    for name, weight in by_name.items():
        find_family(name)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of family {name!r} is {weight}, not >= 0")
    total = sum(by_name.values())
    if total <= 0:
        raise ValueError(f"family weights {by_name} have no positive sum")
    shares, reached = [], 0.0
    for name in FAMILIES:
        if by_name.get(name, 0.0) > 0:
            reached += by_name[name] / total
            shares.append((name, reached))
    return tuple(shares)


def scene(
    tier: str,
    split: str,
    index: int,
    families: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Scene:
    """The scene at an index: a pure function of its arguments.

    Args:
      tier: "tw16", "tw32" or "tw64".
      split: one of `scene.SPLITS`. Train, val and test never contain held-out pairs;
        `test_comp` always does; `test_ood` exceeds the ranges of speed, number and
        size; `test_len` is twice as long.
      index: any number >= 0.
      families: weight by family, from which the family is drawn; those of `BASIC`
        equally by default.
      seed: of the scenes.

    Raises:
      ValueError: an unknown tier, split or family, a family that the tier lacks, or
        weights without a positive sum.
    """
    size_class = find_tier(tier)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    draws = Draws(seed, f"scene/{tier}/{split}", index)
    weights = families or dict.fromkeys(BASIC, 1.0)
    for asked, weight in weights.items():
        if weight > 0:
            _check_tier(tier, asked)
    at = draws.unit()
    shares = _shares(tuple(sorted(weights.items())))
    name = next((name for name, reached in shares if at < reached), shares[-1][0])
    tone, behind = background(draws, size_class)
    slots = FAMILIES[name].choose(draws, size_class, split)
    key = SceneKey(tier, split, index, seed)
    return realised(key, name, slots, draws, tone, behind)


class SceneKey(NamedTuple):
    """What a scene is drawn from, besides its family."""

    tier: str
    split: str
    index: int
    seed: int


def realised(
    key: SceneKey | Scene,
    family: str,
    slots: Slots,
    draws: Draws,
    tone: str,
    behind: Background,
) -> Scene:
    """A scene that shows these facts, with sizes, places and paths that are drawn."""
    size_class = find_tier(key.tier)
    layout = FAMILIES[family].lay_out(draws, size_class, key.split, slots)
    frames = size_class.frames(key.split)
    pos, vel, camera = generators.paths(layout, frames, size_class.size)
    truth = dataclasses.replace(slots, tone=tone).factors() | layout.truth
    return Scene(
        tier=key.tier,
        family=family,
        split=key.split,
        index=key.index,
        seed=key.seed,
        objects=layout.objects,
        pos=pos,
        vel=vel,
        camera=camera,
        background=behind,
        factors=truth,
        scale=None if layout.scale is None else np.round(layout.scale, 4),
        later=layout.later,
    )


def prompts(
    family: str,
    count: int,
    seed: int = 0,
    tier: str = "tw32",
    exclude_texts: AbstractSet[str] = frozenset(),
    held_out: bool = False,
    relations: Sequence[str] | None = None,
) -> list[tuple[str, Slots]]:
    """Prompts of one family: distinct texts and the slots that they state.

    They alternate between the wordings of short and medium captions and have the same
    distribution.

    Args:
      exclude_texts: texts that must not be used (the captions of the training set).
      held_out: use only held-out combinations; by default none of them.
      relations: allow only these (of "left", "right", "above", "below").

    Raises:
      ValueError: an unknown name, or the grammar has too few texts left.
    """
    size_class, entry = find_tier(tier), find_family(family)
    _check_tier(tier, family)
    split = "test_comp" if held_out else "train"
    result: dict[str, Slots] = {}
    for index in range(40 * count + 1000):
        if len(result) == count:
            return list(result.items())
        draws = Draws(seed, f"prompts/{tier}/{family}/{split}", index)
        slots = entry.choose(draws, size_class, split)
        if relations is not None and slots.relation not in relations:
            continue
        style = ("short", "medium")[len(result) % 2]
        text, stated = compose(slots, entry.wording, style, draws)
        if text not in exclude_texts and stated.family == family:
            result.setdefault(text, stated)
    raise ValueError(
        f"only {len(result)} of {count} distinct prompts of family {family!r} are not "
        f"among the {len(exclude_texts)} excluded texts; ask for fewer"
    )
