"""Captions of a scene in five tiers, and parsing of texts into slots.

`alt` is as noisy as captions of the web, `short` names the main object in a few words,
`medium` says what it does, `dense` describes everything, the most important first, and
`structured` is a list of keys and values. The first four describe a relation of two
objects from either one ("red left of blue", "blue right of red"); `structured` names the
left or upper object first, so that the order gives the positions.
"""

from sora_jax.toyworld import grammar
from sora_jax.toyworld.families import FAMILIES
from sora_jax.toyworld.grammar import CAPTION_TIERS as TIERS
from sora_jax.toyworld.grammar import parse
from sora_jax.toyworld.scene import Draws, Scene, Slots

VERSION = 2  # Raise it when any caption changes: shards of other versions are refused.

__all__ = ["TIERS", "VERSION", "caption", "captions", "parse", "stated"]


def stated(scene: Scene, tier: str, variant: int = 0) -> tuple[str, Slots]:
    """A caption and the slots that it states (which may be wrong for `alt`)."""
    label = f"caption/{scene.tier}/{scene.split}/{scene.family}/{tier}/{variant}"
    draws = Draws(scene.seed, label, scene.index)
    return grammar.compose(scene.truth, FAMILIES[scene.family].wording, tier, draws)


def caption(scene: Scene, tier: str, variant: int = 0) -> str:
    """One of a scene's captions in a tier; a variant always has the same text."""
    return stated(scene, tier, variant)[0]


def captions(scene: Scene) -> dict[str, str]:
    """The scene's captions by tier."""
    return {tier: caption(scene, tier) for tier in TIERS}
