"""Which of a clip's captions an example is trained with."""

from collections.abc import Mapping

import numpy as np

from sora_jax.data import records

# The tier that is reported for an example without text.
NO_CAPTION = "none"


class CaptionSampler:
    """Draws one of a clip's captions by the probabilities of their tiers.

    A clip seldom has all tiers: the probabilities of those that it has are scaled up.
    A clip that has none of the tiers asked for is trained without text.

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

        Draws exactly one number, so that the rest of the example's randomness does not
        depend on which captions there are.
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
        return captions[tier], tier

    def has(self, captions: Mapping[str, str]) -> bool:
        """Whether a clip has a caption of the tiers asked for."""
        return any(captions.get(tier) for tier in self.probabilities)

    def check(self, counts: Mapping[str, int], option: str = "text.tiers") -> None:
        """Refuses data that has captions, but none of the tiers asked for.

        Args:
          counts: number of captions by tier, `manifest["captions"]` of the shards.
          option: where the tiers are asked for, for the message.

        Raises:
          ValueError: every example would be trained without text.
        """
        if not any(counts.get(tier) for tier in self.probabilities):
            found = ", ".join(f"{tier} ({n})" for tier, n in counts.items()) or "none"
            raise ValueError(
                f"no clip has a caption of the tiers {sorted(self.probabilities)} that "
                f"{option} asks for; there are: {found}"
            )
