"""Captions of a scene in five tiers, and the way back from text to slots.

`alt` is as noisy as captions found on the web, `short` names the main thing in a few
words, `medium` says what it does, `dense` tells all there is to see, what matters
first, and `structured` is a list of keys and values. The first four tell a relation of
two objects from either one ("red left of blue", "blue right of red"); the last names
the one at the left, or above, first, so that who is where can be read off the order.
"""

from sora_jax.toyworld import grammar
from sora_jax.toyworld.families import FAMILIES
from sora_jax.toyworld.grammar import CAPTION_TIERS as TIERS
from sora_jax.toyworld.grammar import parse
from sora_jax.toyworld.scene import Draws, Scene, Slots

VERSION = 2  # raise it when any caption changes: shards of another are made anew

__all__ = ["TIERS", "VERSION", "caption", "captions", "parse", "stated"]


def stated(scene: Scene, tier: str, variant: int = 0) -> tuple[str, Slots]:
    """A caption and what it states (which for `alt` need not be true)."""
    label = f"caption/{scene.tier}/{scene.split}/{scene.family}/{tier}/{variant}"
    draws = Draws(scene.seed, label, scene.index)
    return grammar.compose(scene.truth, FAMILIES[scene.family].wording, tier, draws)


def caption(scene: Scene, tier: str, variant: int = 0) -> str:
    """One of a scene's captions in a tier; each variant has one fixed text."""
    return stated(scene, tier, variant)[0]


def captions(scene: Scene) -> dict[str, str]:
    """The scene's captions by tier."""
    return {tier: caption(scene, tier) for tier in TIERS}
