"""The text encoder: the encoder half of UMT5 (arXiv 2304.09151; T5 v1.1: 2002.05202).

Pre-norm blocks of self-attention and a gated GELU, with RMS norms. Attention scores are
not scaled; every layer has its own bias for each distance between two tokens (T5 shares
the first layer's). Absolute positions, which UMT5 lacks, can be added.

Letters: b batch, l tokens (m: as keys), d width, h heads, e head size, r buckets.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the default is about the toy's."""

    vocab_size: Annotated[int, configs.Range("[1, 1e7]", 0, "the tokenizer's")] = 512
    dim: configs.Size = 96
    num_layers: configs.Size = 2
    num_heads: configs.Size = 3
    head_dim: configs.Size = 32
    mlp_dim: configs.Size = 192
    # Distances up to num_buckets / 4 have a bucket each; larger ones, up to max_distance,
    # share logarithmic buckets.
    num_buckets: Annotated[int, configs.Range("[4, 1e6]")] = 32
    max_distance: configs.Size = 128
    # Add a sinusoid of a token's position to its embedding. With it, which object is named
    # first is learned in minutes, a time in which distances alone do not teach it.
    absolute_positions: bool = False
    dtype: str = "float32"  # compute type; parameters are float32

    def __post_init__(self):
        configs.check(self)
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} is not above a quarter of num_buckets "
                f"{self.num_buckets}"
            )

    @property
    def sharded_sizes(self) -> dict[str, tuple[str, int]]:
        """Sizes that a mesh shards, for `sharding.check_divisible`."""
        return {
            "num_heads": ("heads", self.num_heads),
            "mlp_dim": ("mlp", self.mlp_dim),
        }


UMT5_XXL = Config(
    vocab_size=256384,
    dim=4096,
    num_layers=24,
    num_heads=64,
    head_dim=64,
    mlp_dim=10240,
)


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each (query, key) pair: int32 [length, length].

    The upper half of the buckets is for keys behind the query. In either half, the
    first half has one bucket for each distance, and the rest grows logarithmically.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    place = np.arange(length)
    offset_lm = place[None, :] - place[:, None]
    distance = np.abs(offset_lm)
    # float32, and in this order, so that distances at an edge round as in T5.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    coarse = np.minimum(exact + ratio.astype(np.int32), half - 1)
    bucket_lm = np.where(distance < exact, distance, coarse) + half * (offset_lm > 0)
    return bucket_lm.astype(np.int32)


def _sinusoid(length: int, d: int) -> np.ndarray:
    """Returns a sinusoid of positions, with periods of 6 to 600 tokens: float32 [l, d]."""
    frequency = 100.0 ** -(np.arange(d // 2) / (d // 2))
    angle = np.arange(length)[:, None] * frequency
    wave = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return np.pad(wave, ((0, 0), (0, d % 2))).astype(np.float32)


# A new encoder does not mix words. With random attention a denoiser that is trained
# together with it needs twice as many clips to learn what a word means, since the state of
# a word then depends on all words around it.
_ZEROS = nnx.initializers.zeros


def mean_state(states_bld: jax.Array, mask_bl: jax.Array) -> jax.Array:
    """Returns the mean over a text's tokens, float32 [b, d]; zero without any token."""
    weight_bl1 = mask_bl[..., None].astype(jnp.float32)
    total_bd = jnp.sum(states_bld.astype(jnp.float32) * weight_bl1, axis=1)
    return total_bd / jnp.maximum(jnp.sum(weight_bl1, axis=1), 1)


def mean_states(states_bld: jax.Array, seen_bkl: jax.Array) -> jax.Array:
    """Returns `mean_state` of several sets of tokens of a row: [b, k, d]."""
    weight_bkl = seen_bkl.astype(jnp.float32)
    total_bkd = jnp.einsum(
        "bkl,bld->bkd",
        weight_bkl,
        states_bld.astype(jnp.float32),
        precision=layers.EXACT,
    )
    return total_bkd / jnp.maximum(jnp.sum(weight_bkl, -1, keepdims=True), 1)


class Attention(nnx.Module):
    """Multi-head self-attention with a bias for each bucket of distances."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, inner = config.dim, config.num_heads * config.head_dim
        normal = nnx.initializers.normal
        into = {"axes": ("embed", "heads"), "bias": False, "rngs": rngs}
        # Scores are not scaled, so the initial queries are smaller instead.
        self.q = layers.Linear(
            d, inner, init=normal((d * config.head_dim) ** -0.5), **into
        )
        self.k = layers.Linear(d, inner, **into)
        self.v = layers.Linear(d, inner, **into)
        self.o = layers.Linear(
            inner, d, axes=("heads", "embed"), bias=False, init=_ZEROS, rngs=rngs
        )
        self.distance_bias = layers.param(
            rngs,
            normal(d**-0.5),
            (config.num_buckets, config.num_heads),
            (None, "heads"),
        )
        self.num_heads = config.num_heads

    def __call__(self, x_bld, hidden_blm, one_hot_lmr) -> jax.Array:
        def heads(x):
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        q_blhe, k_bmhe, v_bmhe = (heads(f(x_bld)) for f in (self.q, self.k, self.v))
        scores_bhlm = jnp.einsum(
            "blhe,bmhe->bhlm", q_blhe, k_bmhe, preferred_element_type=jnp.float32
        )
        # A product with one-hot rows instead of a gather: it shards like any matmul.
        bias_hlm = jnp.einsum(
            "lmr,rh->hlm", one_hot_lmr, self.distance_bias[...], precision=layers.EXACT
        )
        scores_bhlm = scores_bhlm + bias_hlm[None]
        # Finite, so that a row without any token has no NaN.
        low = jnp.finfo(jnp.float32).min
        scores_bhlm = jnp.where(hidden_blm[:, None], low, scores_bhlm)
        weights_bhlm = jax.nn.softmax(scores_bhlm, axis=-1).astype(x_bld.dtype)
        y_blhe = jnp.einsum("bhlm,bmhe->blhe", weights_bhlm, v_bmhe)
        return self.o(y_blhe.reshape(*x_bld.shape[:2], -1))


class Mlp(nnx.Module):
    """down(gelu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, f = config.dim, config.mlp_dim
        into = {"axes": ("embed", "mlp"), "bias": False, "rngs": rngs}
        self.gate = layers.Linear(d, f, **into)
        self.up = layers.Linear(d, f, **into)
        self.down = layers.Linear(f, d, axes=("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, x_bld: jax.Array) -> jax.Array:
        gate_blf = jax.nn.gelu(self.gate(x_bld), approximate=True)
        return self.down(gate_blf * self.up(x_bld))


class Block(nnx.Module):
    """Self-attention and MLP, each after a norm, with residual connections."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.dim, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_bld, hidden_blm, one_hot_lmr) -> jax.Array:
        """hidden_blm: True where token l must not attend to token m; b and l may be 1."""
        x_bld = x_bld + self.attention(self.norm1(x_bld), hidden_blm, one_hot_lmr)
        return x_bld + self.mlp(self.norm2(x_bld))


class TextEncoder(nnx.Module):
    """The encoder. See the head of this file; `Config` holds its sizes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = layers.Embed(config.vocab_size, config.dim, rngs=rngs)
        self.blocks = layers.stack(
            lambda r: Block(config, rngs=r), config.num_layers, rngs
        )
        self.norm_out = layers.RMSNorm(config.dim, rngs=rngs)

    def __call__(self, ids_bl: jax.Array, mask_bl: jax.Array) -> jax.Array:
        """Returns states_bld in the compute dtype, zero at padding.

        Args:
          ids_bl: token ids below the vocabulary's size, padded at the end.
          mask_bl: True at real tokens. No token attends to the others.
        """
        config = self.config
        buckets_lm = distance_buckets(
            ids_bl.shape[1], config.num_buckets, config.max_distance
        )
        one_hot_lmr = jax.nn.one_hot(buckets_lm, config.num_buckets)
        ids_bl = sharding.reshard(ids_bl, "batch", None)
        mask_bl = sharding.reshard(mask_bl, "batch", None)
        x_bld = self.embedding(ids_bl)
        if config.absolute_positions:
            x_bld = x_bld + _sinusoid(ids_bl.shape[1], config.dim)
        x_bld = x_bld.astype(config.dtype)

        def body(x_bld, block):
            return block(x_bld, ~mask_bl[:, None, :], one_hot_lmr), None

        x_bld, _ = jax.lax.scan(body, x_bld, self.blocks)
        x_bld = self.norm_out(x_bld)
        return x_bld * mask_bl[..., None].astype(x_bld.dtype)
