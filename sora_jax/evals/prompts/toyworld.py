"""Does the model do what the prompt says? Measured on the toy world, not judged.

A suite is a list of prompts of one family whose texts are in no caption of the training
set. The oracle reads the frames of a clip back into state, and each part of what the
prompt states (colour, direction, side, ...) is right or wrong. What is not found, and a
clip that is missing, counts as wrong.

Letters: n clips, t frames, h height, w width, c channels.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sora_jax.evals import statistics
from sora_jax.toyworld import captions, families, oracle
from sora_jax.toyworld import scene as scenes

# The sizes that the figures in experiments/RESULTS.md are measured with.
SIZES = {
    "motion": 256,
    "relation": 128,
    "attribute": 96,
    "motion_held_out": 64,
    "relation_held_out": 64,
    "attribute_held_out": 48,
}
HELD_OUT = "_held_out"
RELATIONS = ("left", "right")  # the sides that relation suites ask for
PASS = "pass"

# Part of a verdict -> the field of a subject, or of the slots, that states it.
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
      name: the family, with `_held_out` behind it where the prompts join what no
        training clip joins.
      family: the family whose rule is applied.
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
        """The suite's first prompts."""
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
    """Draws suites of distinct prompts that are in no training caption.

    Args:
      sizes: suite name (a family, or a family with `_held_out`) -> number of prompts;
        zero leaves the suite out.
      tier: the toy world's tier.
      exclude_texts: the captions of the training set.
      seed: another seed gives other prompts.

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
                f"suite {name!r} is unknown: a suite is one of {possible}, or that "
                f"with {HELD_OUT} behind it"
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
    """Sorts the prompts of finished samples into suites by what they state.

    Returns:
      The suites; for their prompts, one after the other, the index of the text; and
      the indices of texts that state nothing the oracle can measure.
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
    """For each clip, what the prompt states and whether the frames show it.

    Args:
      suite: the prompts.
      videos: uint8 [t, h, w, 3] for each prompt, or its reading; None for a clip that
        is missing, of which everything is wrong.
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
    """Whether the slots state a part; "pass" always is.

    The rules also give verdicts on what is not stated, which would count as right.
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
    """Shares of right clips by part, over all clips whose prompt states the part."""
    counts: dict[str, list[int]] = {}
    for verdict in found:
        for part, right in verdict.items():
            entry = counts.setdefault(part, [0, 0])
            entry[0] += bool(right)
            entry[1] += 1
    return {part: statistics.proportion(*pair) for part, pair in counts.items()}


def worst(rows: Sequence[Shares]) -> Shares:
    """The lowest share of each part over rows (seeds), with that row's interval."""
    parts = dict.fromkeys(part for row in rows for part in row)
    return {
        part: min((row[part] for row in rows if part in row), key=lambda s: s.value)
        for part in parts
    }


def permuted(suite: Suite, seed: int = 0) -> Suite:
    """The suite with every prompt at another clip's place: one random cycle.

    Scoring the clips of `suite` against it shows what is right by chance.
    """
    order = np.random.default_rng(seed).permutation(len(suite))
    prompts: list[Prompt] = [suite.prompts[0]] * len(suite)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        prompts[here] = suite.prompts[there]
    return dataclasses.replace(suite, prompts=tuple(prompts))
