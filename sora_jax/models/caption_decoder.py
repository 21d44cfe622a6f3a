"""Predicts a caption from the mean of the text encoder's states for another caption.

It trains a text encoder before any video: the encoder reads one caption of a clip, and
the decoder predicts another of the same clip, token by token. The decoder gets only the
mean of the states, so the mean must still say who does what: "red left of blue" must not
become a bag of words. Where the other caption always names the left object first, the
states must also say which object that is, for which the encoder needs both word order and
relation. The decoder is not used after that training.

Letters: b batch, l tokens of the caption that is predicted, d width, v vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.models import layers, text_encoder


class CaptionDecoder(nnx.Module):
    """One causal T5 block over the previous tokens of the caption."""

    def __init__(self, config: text_encoder.Config, *, rngs: nnx.Rngs):
        self.config = config
        d, v = config.dim, config.vocab_size
        self.embedding = layers.Embed(v, d, rngs=rngs)
        self.summary = layers.Linear(d, d, axes=("embed", None), bias=False, rngs=rngs)
        self.block = text_encoder.Block(config, rngs=rngs)
        self.norm_out = layers.RMSNorm(d, rngs=rngs)
        self.head = layers.Linear(
            d,
            v,
            axes=("embed", None),
            bias=False,
            init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, mean_bd: jax.Array, ids_bl: jax.Array) -> jax.Array:
        """Returns logits_blv of each token, float32.

        Args:
          mean_bd: the mean of the other caption's states.
          ids_bl: the caption; a token's logits depend on the tokens before it.
        """
        config, length = self.config, ids_bl.shape[1]
        ids_bl = sharding.reshard(ids_bl, "batch", None)
        before_bl = jnp.pad(ids_bl, ((0, 0), (1, 0)))[:, :-1]  # padding, 0, starts it
        x_bld = self.embedding(before_bl).astype(config.dtype)
        x_bld = x_bld + self.summary(mean_bd.astype(config.dtype))[:, None]
        buckets_lm = text_encoder.distance_buckets(
            length, config.num_buckets, config.max_distance
        )
        one_hot_lmr = jax.nn.one_hot(buckets_lm, config.num_buckets)
        later_1lm = jnp.triu(jnp.ones((length, length), bool), 1)[None]
        x_bld = self.block(x_bld, later_1lm, one_hot_lmr)
        return self.head(self.norm_out(x_bld)).astype(jnp.float32)
