"""Which of a clip's captions an example uses, how it varies, and if it is cut.

A caption may be varied in two ways, both off by default. Its parts may come in another
order (`texts.shuffled`), so that a network does not learn one order by heart. And scores
of the clip may follow as tags, such as "; motion: high", each kept with some probability:
a prompt with such a tag then asks for it, and one without leaves it open.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from sora_jax.data import records, texts

# The tier that is reported for an example without text.
NO_CAPTION = "none"
# What an example's text can be of; batches hold places in this list.
REALISED = (*records.TIERS, NO_CAPTION)


# How the parts of a tier's captions can be reordered; others are single sentences.
_SHUFFLED = {
    "dense": texts.sentences,
    "model_dense": texts.sentences,
    "structured": texts.entries,
}


@dataclasses.dataclass(frozen=True)
class Tag:
    """A score in words: "motion: high".

    Attributes:
      score: its name in the records; spaces stand for its underscores in captions.
      limits: ascending; a score on a limit belongs above it.
      words: one more than limits, from the lowest scores to the highest.

    Raises:
      ValueError: they do not fit together, or could not be told apart in a caption.
    """

    score: str
    limits: tuple[float, ...]
    words: tuple[str, ...]

    def __post_init__(self):
        where = f"tags: {self.score!r}"
        if len(self.words) != len(self.limits) + 1 or not self.limits:
            raise ValueError(
                f"{where} has {len(self.limits)} limits and {len(self.words)} words; "
                "there must be a limit or more, and one word more than limits"
            )
        if any(not a < b for a, b in zip(self.limits, self.limits[1:], strict=False)):
            raise ValueError(f"{where} has limits that do not ascend: {self.limits}")
        for word in (self.score, *self.words):
            if texts.normalise(word) != word or not word or set(word) & set(":;"):
                raise ValueError(
                    f"{where} has the word {word!r}; words are text without : and ;"
                )
        if len({*self.words}) < len(self.words):
            raise ValueError(f"{where} has equal words: {self.words}")

    def of(self, scores: Mapping[str, float]) -> str | None:
        """Returns the tag of a clip with these scores; None if it lacks this one."""
        value = scores.get(self.score, float("nan"))
        if not np.isfinite(value):
            return None
        word = self.words[int(np.searchsorted(self.limits, value, side="right"))]
        return f"{self.score.replace('_', ' ')}: {word}"


@dataclasses.dataclass(frozen=True)
class Variation:
    """How captions vary from one time that a clip is seen to the next.

    Attributes:
      tags: that follow a caption.
      keep: probability of each tag of a clip, independently.
      shuffle: share of the captions of several parts whose parts come in another order.

    Raises:
      ValueError: two tags of one score.
    """

    tags: tuple[Tag, ...] = ()
    keep: float = 0.5
    shuffle: float = 0.0

    def __post_init__(self):
        if len({tag.score for tag in self.tags}) < len(self.tags):
            raise ValueError(f"tags: two of one score in {self.tags}")

    @property
    def is_on(self) -> bool:
        """Whether any caption can change."""
        return bool(self.tags or self.shuffle)

    def tags_of(self, scores: Mapping[str, float]) -> list[str]:
        """Returns all tags of a clip, in their order."""
        return [text for tag in self.tags if (text := tag.of(scores)) is not None]

    def vary(
        self, text: str, tier: str, scores: Mapping[str, float], number: float
    ) -> str:
        """Returns a caption as one example has it; an empty one stays empty.

        Args:
          text: the caption.
          tier: that it belongs to.
          scores: of its clip.
          number: uniform in [0, 1), a multiple of 2^-53: the source of all chance here.
        """
        if not text or not self.is_on:
            return text
        random = np.random.default_rng(int(number * 2**53))
        kept = random.random(len(self.tags)) < self.keep
        if random.random() < self.shuffle and tier in _SHUFFLED:
            text = texts.shuffled(text, _SHUFFLED[tier], random)
        shown = [
            tag.of(scores)
            for tag, is_kept in zip(self.tags, kept, strict=True)
            if is_kept
        ]
        return tagged(text, [tag for tag in shown if tag is not None])


def tagged(text: str, tags: Sequence[str]) -> str:
    """Appends tags to a caption: "a cat; motion: low", "A cat. motion: low"."""
    if not tags:
        return text
    between = " " if text.endswith((".", "!", "?")) else "; "
    return f"{text}{between}{'; '.join(tags)}"


def variation(
    tags: Sequence[tuple[str, tuple[float, ...], tuple[str, ...]]],
    keep: float,
    shuffle: float,
) -> Variation:
    """Returns what the fields `text.tags`, `tag_keep` and `shuffle` of a config say.

    Raises:
      ValueError: see `Tag` and `Variation`.
    """
    made = (Tag(score, tuple(limits), tuple(words)) for score, limits, words in tags)
    return Variation(tuple(made), keep, shuffle)


class CaptionSampler:
    """Draws one of a clip's captions by the probabilities of their tiers.

    If a clip lacks some tiers, the probabilities of its other tiers are scaled up. A clip
    with none of these tiers is trained without text.

    Args:
      probabilities: weight of each tier, such as {"short": 0.2, "dense": 0.8}.
      variation: of the captions that are drawn.

    Raises:
      ValueError: an unknown tier, a negative weight, or no weight above zero.
    """

    def __init__(
        self,
        probabilities: Mapping[str, float],
        variation: Variation = Variation(),
    ):
        if unknown := sorted(set(probabilities) - set(records.TIERS)):
            raise ValueError(f"caption tiers {unknown} are not in {records.TIERS}")
        if any(not weight >= 0 for weight in probabilities.values()):
            raise ValueError(f"caption weights are not negative: {probabilities}")
        self.probabilities = {
            tier: float(probabilities[tier])
            for tier in records.TIERS
            if probabilities.get(tier, 0) > 0
        }
        if not self.probabilities:
            raise ValueError("no caption tier has a weight above zero")
        self.variation = variation

    def pick(
        self,
        captions: Mapping[str, str],
        rng: np.random.Generator,
        scores: Mapping[str, float] | None = None,
    ) -> tuple[str, str]:
        """Returns (text, tier); ("", "none") where the clip has no such caption.

        The captions of a tier are equally likely. Draws exactly one number, so that the
        rest of the example's randomness does not depend on its captions, nor on how
        they vary: the numbers for that come from a generator that this number seeds.

        Args:
          captions: of the clip, by tier.
          rng: of the example.
          scores: of the clip, for its tags.
        """
        number = drawn = rng.random()
        there = [tier for tier in self.probabilities if captions.get(tier)]
        if not there:
            return "", NO_CAPTION
        drawn *= sum(self.probabilities[tier] for tier in there)
        for tier in there:
            drawn -= self.probabilities[tier]
            if drawn < 0:
                break
        several = records.variants(captions[tier])
        within = 1 + drawn / self.probabilities[tier]  # uniform in [0, 1)
        text = several[min(int(within * len(several)), len(several) - 1)]
        return self.variation.vary(text, tier, scores or {}, number), tier

    def has(self, captions: Mapping[str, str]) -> bool:
        """Whether a clip has a caption of these tiers."""
        return any(captions.get(tier) for tier in self.probabilities)

    def check(self, counts: Mapping[str, int], option: str = "text.tiers") -> None:
        """Refuses data without any caption of these tiers.

        Args:
          counts: number of captions by tier, `manifest["captions"]` of the shards.
          option: that names the tiers, for the message.

        Raises:
          ValueError: every example would be trained without text.
        """
        if not any(counts.get(tier) for tier in self.probabilities):
            available = (
                ", ".join(f"{tier} ({n})" for tier, n in counts.items()) or "none"
            )
            raise ValueError(
                f"no clip has a caption of the tiers {sorted(self.probabilities)} that "
                f"{option} asks for; there are: {available}"
            )

    def check_scores(self, counts: Mapping[str, int]) -> None:
        """Refuses tags of scores that no clip has.

        Args:
          counts: number of clips by score, `manifest["scores"]` of the latents.

        Raises:
          ValueError: names them.
        """
        wanted = [tag.score for tag in self.variation.tags]
        if lacking := [score for score in wanted if not counts.get(score)]:
            available = ", ".join(f"{name} ({n})" for name, n in counts.items())
            raise ValueError(
                f"no clip has the scores {lacking} that text.tags asks for; there are: "
                f"{available or 'none'}. Scores come from prepare --curate or the files "
                "beside videos, and latents that were made before have none: encode them "
                "again, into another folder"
            )


def warn_of_cut(tokens: Sequence[int], length: int, option: str) -> None:
    """Warns on stderr if more than 1 % of captions are cut.

    Args:
      tokens: of each caption, with the end mark.
      length: tokens that are kept.
      option: that sets the length.
    """
    ascending = sorted(tokens)
    cut = sum(count > length for count in ascending)
    if cut > 0.01 * len(ascending):
        most, longest = ascending[int(0.99 * (len(ascending) - 1))], ascending[-1]
        wanted = f"{option}={most} cuts 1 % of them at most, {option}={longest} none"
        print(
            f"captions: {cut / len(ascending):.1%} of {len(ascending)} have more than "
            f"{length} tokens and are cut; {wanted}",
            file=sys.stderr,
        )
