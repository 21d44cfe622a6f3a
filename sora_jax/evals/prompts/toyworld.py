"""Prompt following on the toy world: suites of prompts, and verdicts on their clips.

A suite is a list of prompts of one family that are not captions of the training set. The
oracle reads the state of a scene from the frames of a clip, and each part of what the
prompt states (colour, direction, side, ...) is right or wrong. Parts that are not found,
and missing clips, count as wrong.

Letters: n clips, t frames, h height, w width, c channels.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sora_jax.evals import statistics
from sora_jax.toyworld import captions, families, oracle
from sora_jax.toyworld import scene as scenes

# As used for the figures in experiments/RESULTS.md.
SIZES = {
    "motion": 256,
    "relation": 128,
    "attribute": 96,
    "motion_held_out": 64,
    "relation_held_out": 64,
    "attribute_held_out": 48,
    "count": 64,
    "motion_binding": 64,
    "camera": 64,
}
HELD_OUT = "_held_out"
RELATIONS = ("left", "right")  # the sides that relation suites ask for
PASS = "pass"

# Part of a verdict -> the field that states it, of a subject or of the slots.
_SUBJECT_PARTS = {
    "colour": "colour",
    "colours": "colour",
    "shape": "shape",
    "shapes": "shape",
    "direction": "direction",
    "directions": "direction",
    "speed": "speed",
    "speeds": "speed",
}
_SLOT_PARTS = {"side": "relation", "count": "count", "camera": "camera"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text and what it states."""

    text: str
    slots: scenes.Slots


@dataclasses.dataclass(frozen=True)
class Suite:
    """Prompts of one family.

    Attributes:
      name: the family, with `_held_out` appended if the prompts combine attributes that
        no training clip combines.
      family: the family whose rule scores the clips.
      prompts: the prompts in order.
    """

    name: str
    family: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def held_out(self) -> bool:
        return self.name.endswith(HELD_OUT)

    def head(self, count: int) -> "Suite":
        """Returns the suite with its first prompts only."""
        return dataclasses.replace(self, prompts=self.prompts[:count])


Shares = dict[str, statistics.Estimate]  # part -> share of right clips


# -- prompts ---------------------------------------------------------------------------


def make_suites(
    sizes: Mapping[str, int],
    *,
    tier: str,
    exclude_texts: Iterable[str],
    seed: int = 0,
) -> list[Suite]:
    """Draws suites of distinct prompts that are not training captions.

    Args:
      sizes: suite name (a family, or a family with `_held_out`) -> number of prompts;
        zero leaves the suite out.
      tier: the toy world's tier.
      exclude_texts: the captions of the training set.
      seed: of the draw.

    Raises:
      ValueError: an unknown name, or the grammar has too few other texts.
    """
    exclude = frozenset(exclude_texts)
    suites = []
    for name, count in sizes.items():
        family = name.removesuffix(HELD_OUT)
        if family not in families.FAMILIES:
            possible = ", ".join(families.FAMILIES)
            raise ValueError(
                f"suite {name!r} is unknown: a suite is one of {possible}, or one of these "
                f"with {HELD_OUT} appended"
            )
        if count == 0:
            continue
        drawn = families.prompts(
            family,
            count,
            seed=seed,
            tier=tier,
            exclude_texts=exclude,
            held_out=name.endswith(HELD_OUT),
            relations=RELATIONS if family == "relation" else None,
        )
        prompts = tuple(Prompt(text, slots) for text, slots in drawn)
        suites.append(Suite(name, family, prompts))
    return suites


def suites_of_texts(texts: Sequence[str]) -> tuple[list[Suite], list[int], list[int]]:
    """Groups the prompts of samples into suites by what they state.

    Returns:
      The suites; the index of the text of each of their prompts, in order; and the
      indices of texts that state nothing that the oracle can measure.
    """
    members: dict[tuple[str, bool], list[int]] = collections.defaultdict(list)
    unmeasured = []
    parsed = [captions.parse(text) for text in texts]
    for index, slots in enumerate(parsed):
        if slots.family is None:
            unmeasured.append(index)
        else:
            members[slots.family, slots.held_out()].append(index)
    suites = [
        Suite(
            family + (HELD_OUT if held_out else ""),
            family,
            tuple(Prompt(texts[index], parsed[index]) for index in indices),
        )
        for (family, held_out), indices in sorted(members.items())
    ]
    order = [index for _, indices in sorted(members.items()) for index in indices]
    return suites, order, unmeasured


# -- scoring ---------------------------------------------------------------------------


def verdicts(
    suite: Suite, videos: Sequence[np.ndarray | oracle.Reading | None]
) -> list[dict[str, bool]]:
    """Returns for each clip: part that the prompt states -> whether the frames show it.

    Args:
      suite: the prompts.
      videos: uint8 [t, h, w, 3] for each prompt, or its reading; None for a missing
        clip, of which every part is wrong.
    """
    if len(videos) != len(suite):
        raise ValueError(
            f"suite {suite.name} has {len(suite)} prompts, but there are "
            f"{len(videos)} clips"
        )
    found = []
    for prompt, video in zip(suite.prompts, videos, strict=True):
        if video is None:
            asked = [part for part in _all_parts() if states(prompt.slots, part)]
            found.append(dict.fromkeys([*asked, PASS], False))
            continue
        verdict = oracle.score_slots(prompt.slots, video, suite.family)
        found.append({p: ok for p, ok in verdict.items() if states(prompt.slots, p)})
    return found


def states(slots: scenes.Slots, part: str) -> bool:
    """Returns whether the slots state a part; "pass" always is.

    The rules also give verdicts on parts that are not stated, which would be right.
    """
    if part in _SUBJECT_PARTS:
        field = _SUBJECT_PARTS[part]
        plural = part.endswith("s")
        return plural == (len(slots.subjects) > 1) and any(
            getattr(subject, field) is not None for subject in slots.subjects
        )
    if part in _SLOT_PARTS:
        return getattr(slots, _SLOT_PARTS[part]) is not None
    return part == PASS


def _all_parts() -> tuple[str, ...]:
    return (*_SUBJECT_PARTS, *_SLOT_PARTS)


def summarize(found: Sequence[Mapping[str, bool]]) -> Shares:
    """Returns the share of right clips by part, over clips whose prompt states it."""
    values: dict[str, list[bool]] = {}
    for verdict in found:
        for part, right in verdict.items():
            values.setdefault(part, []).append(bool(right))
    return {part: statistics.proportion(sum(v), len(v)) for part, v in values.items()}


def worst(rows: Sequence[Shares]) -> Shares:
    """Returns the lowest share of each part over rows (seeds)."""
    parts = dict.fromkeys(part for row in rows for part in row)
    return {
        part: min((row[part] for row in rows if part in row), key=lambda s: s.value)
        for part in parts
    }


def permuted(suite: Suite) -> Suite:
    """Returns the suite with its prompts moved along one random cycle.

    Scoring the clips of `suite` against it measures the chance level.
    """
    order = np.random.default_rng(0).permutation(len(suite))
    prompts: list[Prompt] = [suite.prompts[0]] * len(suite)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        prompts[here] = suite.prompts[there]
    return dataclasses.replace(suite, prompts=tuple(prompts))
