"""A second task of networks of the toy world: to say what their tokens show.

The exact state of a scene says which shape of which colour each token shows, if any, and
how it moves. A
linear layer must read that from a network's features, and is not used afterwards.

In a denoiser the features are the hidden states after a share of the blocks: the network
must carry what the text says to where the thing is. Compare REPA (arXiv 2410.06940),
which aligns hidden states with those of another network.

In a video VAE they are the latents themselves, under noise: what a caption says then has
a large share of the latents' variance, and a denoiser learns first what that share is
large of. Compare VA-VAE (arXiv 2501.01423), which aligns latents with those of another
network.

Letters: b rows, n tokens, c channels, k classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.models import layers, rows
from sora_jax.toyworld import tokens

NAME = "state_head"  # the linear layer among a run's networks


@dataclasses.dataclass(frozen=True)
class Config:
    """How much the second task weighs, and what the head is given."""

    weight: configs.Factor = 0.0  # of the cross entropies and motion's error; 0: off
    depth: configs.Share = 0.6  # of a denoiser's blocks, at least one
    # Weight of a denoiser's own error at tokens that show an object; of others: 1.
    focus: Annotated[float, configs.Range("[1, 1e6]")] = 1.0
    # Deviation of the noise on a video VAE's latents, whose own is 1.
    noise: configs.Factor = 1.0

    def after(self, num_layers: int) -> int:
        """The number of a denoiser's blocks that come before."""
        return max(1, round(self.depth * num_layers))


_SPLIT = (tokens.SHAPE_CLASSES, tokens.SHAPE_CLASSES + tokens.COLOUR_CLASSES)


def head(dim: int, rngs: nnx.Rngs) -> layers.Linear:
    """The layer from features of this width to logits and motion.

    It begins at zero, and so does its gradient to the features: networks that are
    trained already are not changed before it has learned something.
    """
    return layers.Linear(dim, _SPLIT[1] + 2, init=nnx.initializers.zeros, rngs=rngs)


def of_hidden(hidden_bnd: jax.Array) -> jax.Array:
    """Features of a denoiser's hidden states, float32, with a mean square of 1.

    Hidden states grow while a network is trained, and rates do not follow.
    """
    hidden_bnd = hidden_bnd.astype(jnp.float32)
    square_bn1 = jnp.mean(jnp.square(hidden_bnd), -1, keepdims=True)
    return hidden_bnd * jax.lax.rsqrt(square_bn1 + 1e-6)


def loss(
    found_bnc: jax.Array,
    shown: Mapping[str, jax.Array],
    of_clip_bnk: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """The loss summed over clips, and its metrics as (sum, weight).

    Tokens of a clip that show an object weigh as much together as those that show none.

    Args:
      found_bnc: what the head gives.
      shown: `shown_shape` and `shown_colour` int [b, n], the classes of each token, -1
        where unknown; `shown_motion` float32 [b, n, 2] in pixels per frame, nan where
        features cannot tell it.
      of_clip_bnk: which clip of its row each token belongs to, one-hot; None where a row
        is one clip.
    """
    shape_bn, motion_bn2 = shown["shown_shape"], shown["shown_motion"]
    shape_bnk, colour_bnk, found_bn2 = jnp.split(found_bnc, _SPLIT, -1)
    nats_bn = _nats(shape_bnk, shape_bn) + _nats(colour_bnk, shown["shown_colour"])
    told_bn2 = jnp.isfinite(motion_bn2)
    missed_bn2 = found_bn2 - jnp.where(told_bn2, motion_bn2, 0.0)
    error_bn = jnp.mean(jnp.square(missed_bn2) * told_bn2, -1)
    thing_bn = (shape_bn > tokens.NOTHING).astype(jnp.float32)
    none_bn = (shape_bn == tokens.NOTHING).astype(jnp.float32)
    weight_bn = sum(
        part_bn / jnp.maximum(_of_tokens(part_bn, of_clip_bnk), 1)
        for part_bn in (thing_bn, none_bn)
    )
    total = jnp.sum(weight_bn * (nats_bn + error_bn))
    things = jnp.sum(thing_bn)
    clips = jnp.sum(rows.by_clip(jnp.ones_like(thing_bn), of_clip_bnk) > 0)

    def right(logits_bnk, class_bn):
        return jnp.sum((jnp.argmax(logits_bnk, -1) == class_bn) * thing_bn), things

    return total, {
        "state_loss": (total, clips.astype(jnp.float32)),
        "shown_shape_right": right(shape_bnk, shape_bn),
        "shown_colour_right": right(colour_bnk, shown["shown_colour"]),
        "shown_motion_error": (
            jnp.sum(error_bn * thing_bn),
            jnp.sum(thing_bn * told_bn2[..., 0]),
        ),
    }


def _of_tokens(x_bn: jax.Array, of_clip_bnk: jax.Array | None) -> jax.Array:
    """The sum over the clip of each token, [b, n]; None: over the row, [b, 1]."""
    sum_bk = rows.by_clip(x_bn, of_clip_bnk)
    if of_clip_bnk is None:
        return sum_bk
    return jnp.einsum("bk,bnk->bn", sum_bk, of_clip_bnk, precision="highest")


def _nats(logits_bnk: jax.Array, class_bn: jax.Array) -> jax.Array:
    """The cross entropy of each token; 0 where the class is unknown."""
    chosen_bnk = jax.nn.one_hot(class_bn, logits_bnk.shape[-1])
    return -jnp.sum(jax.nn.log_softmax(logits_bnk) * chosen_bnk, -1)
