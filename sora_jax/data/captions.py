"""Which of a clip's captions an example uses, and warnings of captions that are cut."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from sora_jax.data import records

# The tier that is reported for an example without text.
NO_CAPTION = "none"
# What an example's text can be of; batches hold places in this list.
REALISED = (*records.TIERS, NO_CAPTION)


class CaptionSampler:
    """Draws one of a clip's captions by the probabilities of their tiers.

    If a clip lacks some tiers, the probabilities of its other tiers are scaled up. A clip
    with none of these tiers is trained without text.

    Args:
      probabilities: weight of each tier, such as {"short": 0.2, "dense": 0.8}.

    Raises:
      ValueError: an unknown tier, a negative weight, or no weight above zero.
    """

    def __init__(self, probabilities: Mapping[str, float]):
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

    def pick(
        self, captions: Mapping[str, str], rng: np.random.Generator
    ) -> tuple[str, str]:
        """Returns (text, tier); ("", "none") where the clip has no such caption.

        The captions of a tier are equally likely. Draws exactly one number, so that the
        rest of the example's randomness does not depend on its captions.
        """
        drawn = rng.random()
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
        return several[min(int(within * len(several)), len(several) - 1)], tier

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
