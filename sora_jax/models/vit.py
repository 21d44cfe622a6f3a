"""Vision transformers for features of video: VideoMAE, V-JEPA and CLIP, inference only.

One class implements all of them: pre-norm blocks over spacetime patches (arXiv
2010.11929). They differ in positions (a fixed sinusoid in VideoMAE, arXiv 2203.12602; a
stored table in V-JEPA, 2404.08471, and CLIP, 2103.00020; rotations in V-JEPA 2,
2506.09985), in the biases of projections, and in pooling: the mean of the tokens, a class
token, or a trained query that attends to them. CLIP's text half has the same blocks with
a causal mask.

Letters: b clips, t frames, h height, w width, c channels, n tokens, d width, a heads,
e head size, l text tokens, p width of CLIP's common space.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models import layers

POSITIONS = ("sinusoid", "table", "rotation")
POOLS = ("mean", "class", "query")
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options; the defaults are those of VideoMAE-v2-g.

    Attributes:
      num_frames, size: of the input clips; size in pixels.
      patch: frames, rows and columns of a patch.
      dim, num_layers, num_heads, mlp_dim: sizes of the blocks.
      positions: one of POSITIONS.
      key_bias: whether keys have a bias, as queries and values have.
      patch_bias: whether the patch embedding has one.
      norm_in: whether there is a norm before the blocks (CLIP).
      norm_out: whether there is a norm of each token after the blocks.
      pool: how tokens become features, one of POOLS. "class" adds a class token.
      pool_norm: whether there is a norm after the pooling (not with "query").
      pool_layers: blocks between encoder and query.
      pool_projection: whether the attention of the query has an output projection.
      projection: width p of a last linear map without bias; None: no such map.
      activation: one of ACTIVATIONS.
      eps, pool_eps: of the norms in and after the blocks, and of the pool's.
    """

    num_frames: int = 16
    size: int = 224
    patch: tuple[int, int, int] = (2, 14, 14)
    dim: int = 1408
    num_layers: int = 40
    num_heads: int = 16
    mlp_dim: int = 6144
    positions: str = "sinusoid"
    key_bias: bool = False
    patch_bias: bool = True
    norm_in: bool = False
    norm_out: bool = False
    pool: str = "mean"
    pool_norm: bool = True
    pool_layers: int = 0
    pool_projection: bool = True
    projection: int | None = None
    activation: str = "gelu"
    eps: float = 1e-6
    pool_eps: float = 1e-6

    def __post_init__(self):
        for name, known in (
            ("positions", POSITIONS),
            ("pool", POOLS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(known)}"
                )
        if self.dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width {self.dim}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of patches along time, height and width."""
        frames, rows, columns = self.patch
        return self.num_frames // frames, self.size // rows, self.size // columns


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """CLIP's text half; the defaults are those of CLIP-B/32.

    Attributes:
      vocab_size, length: size of the vocabulary, and the most tokens of a text.
      end: id of the token that ends a text; the feature is that token's.
    """

    vocab_size: int = 49408
    length: int = 77
    dim: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    projection: int = 512
    end: int = 49407
    activation: str = "quick_gelu"
    eps: float = 1e-5


class Attention(nnx.Module):
    """Multi-head attention; queries from one sequence, keys and values from another."""

    def __init__(self, d: int, heads: int, *, key_bias=True, out=True, rngs: nnx.Rngs):
        self.heads = heads
        kind = {"axes": (None, None), "rngs": rngs}
        self.q = layers.Linear(d, d, **kind)
        self.k = layers.Linear(d, d, bias=key_bias, **kind)
        self.v = layers.Linear(d, d, **kind)
        self.o = layers.Linear(d, d, **kind) if out else None

    def __call__(self, x_bnd, y_bmd, rotate=None, causal=False) -> jax.Array:
        """rotate: applied to queries and to keys [b, n, a, e]."""

        def heads(x):
            return x.reshape(*x.shape[:2], self.heads, -1)

        q_bnae, k_bmae = heads(self.q(x_bnd)), heads(self.k(y_bmd))
        v_bmae = heads(self.v(y_bmd))
        if rotate:
            q_bnae, k_bmae = rotate(q_bnae), rotate(k_bmae)
        y_bnae = jax.nn.dot_product_attention(q_bnae, k_bmae, v_bmae, is_causal=causal)
        y_bnd = y_bnae.reshape(x_bnd.shape[0], x_bnd.shape[1], -1)
        return self.o(y_bnd) if self.o else y_bnd


class Mlp(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, d: int, f: int, activation: str, rngs: nnx.Rngs):
        self.up = layers.Linear(d, f, axes=(None, None), rngs=rngs)
        self.down = layers.Linear(f, d, axes=(None, None), rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each after a norm, with residual connections."""

    def __init__(self, config, *, key_bias=True, eps=None, rngs: nnx.Rngs):
        eps = eps or config.eps
        self.norm1 = layers.LayerNorm(config.dim, eps=eps, rngs=rngs)
        self.attention = Attention(
            config.dim, config.num_heads, key_bias=key_bias, rngs=rngs
        )
        self.norm2 = layers.LayerNorm(config.dim, eps=eps, rngs=rngs)
        self.mlp = Mlp(config.dim, config.mlp_dim, config.activation, rngs)

    def __call__(self, x_bnd, rotate=None, causal=False) -> jax.Array:
        normed_bnd = self.norm1(x_bnd)
        x_bnd = x_bnd + self.attention(normed_bnd, normed_bnd, rotate, causal)
        return x_bnd + self.mlp(self.norm2(x_bnd))


class Query(nnx.Module):
    """V-JEPA's attentive pooler: a trained query attends to normed tokens, then an MLP."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        d, eps = config.dim, config.pool_eps
        self.query = layers.param(rngs, nnx.initializers.normal(0.02), (d,), (None,))
        self.blocks = (
            layers.stack(
                lambda r: Block(config, eps=eps, rngs=r), config.pool_layers, rngs
            )
            if config.pool_layers
            else None
        )
        self.norm1 = layers.LayerNorm(d, eps=eps, rngs=rngs)
        self.attention = Attention(
            d, config.num_heads, out=config.pool_projection, rngs=rngs
        )
        self.norm2 = layers.LayerNorm(d, eps=eps, rngs=rngs)
        self.mlp = Mlp(d, config.mlp_dim, config.activation, rngs)

    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        if self.blocks is not None:
            x_bnd = _run(self.blocks, x_bnd)
        q_b1d = jnp.broadcast_to(self.query[...], (len(x_bnd), 1, x_bnd.shape[-1]))
        q_b1d = q_b1d + self.attention(q_b1d, self.norm1(x_bnd))
        return (q_b1d + self.mlp(self.norm2(q_b1d)))[:, 0]


class VisionTransformer(nnx.Module):
    """The encoder and its pool. See the head of this file."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config, d = config, config.dim
        fan_in = 3 * int(np.prod(config.patch))
        self.patches = layers.Linear(
            fan_in, d, axes=(None, None), bias=config.patch_bias, rngs=rngs
        )
        init = nnx.initializers.normal(0.02)
        has_class = config.pool == "class"
        self.token = layers.param(rngs, init, (d,), (None,)) if has_class else None
        count = int(np.prod(config.grid)) + has_class
        has_table = config.positions == "table"
        self.table = (
            layers.param(rngs, init, (count, d), (None, None)) if has_table else None
        )

        def norm(enabled: bool, eps: float):
            return layers.LayerNorm(d, eps=eps, rngs=rngs) if enabled else None

        self.norm_in = norm(config.norm_in, config.eps)
        self.blocks = layers.stack(
            lambda r: Block(config, key_bias=config.key_bias, rngs=r),
            config.num_layers,
            rngs,
        )
        self.norm_out = norm(config.norm_out, config.eps)
        query = config.pool == "query"
        self.pool = Query(config, rngs) if query else None
        self.pool_norm = norm(config.pool_norm and not query, config.pool_eps)
        width = config.projection
        self.projection = (
            layers.Linear(d, width, axes=(None, None), bias=False, rngs=rngs)
            if width
            else None
        )

    def tokens(self, video_bthwc: jax.Array) -> jax.Array:
        """Returns the states of the tokens [b, n, d], a class token first.

        Args:
          video_bthwc: clips of the configured size, normalised as the weights expect.

        Raises:
          ValueError: they have another size.
        """
        config = self.config
        expected = (config.num_frames, config.size, config.size, 3)
        if video_bthwc.shape[1:] != expected:
            raise ValueError(
                f"the network takes clips of {expected}, not {video_bthwc.shape[1:]}"
            )
        x_bnd = self.patches(_patchify(video_bthwc, config.patch))
        if self.token is not None:
            token_b1d = jnp.broadcast_to(
                self.token[...], (len(x_bnd), 1, x_bnd.shape[-1])
            )
            x_bnd = jnp.concatenate([token_b1d, x_bnd], axis=1)
        if self.table is not None:
            x_bnd = x_bnd + self.table[...]
        elif config.positions == "sinusoid":
            x_bnd = x_bnd + sinusoid(x_bnd.shape[1], config.dim)
        rotate = None
        if config.positions == "rotation":
            rotate = rotation(config.grid, config.dim // config.num_heads)
        if self.norm_in:
            x_bnd = self.norm_in(x_bnd)
        x_bnd = _run(self.blocks, x_bnd, rotate)
        return self.norm_out(x_bnd) if self.norm_out else x_bnd

    def __call__(self, video_bthwc: jax.Array) -> jax.Array:
        """Returns features [b, d], or [b, p] with a projection; see `tokens`."""
        x_bnd = self.tokens(video_bthwc)
        if self.pool is not None:
            x_bd = self.pool(x_bnd)
        else:
            x_bd = x_bnd[:, 0] if self.token is not None else jnp.mean(x_bnd, axis=1)
        x_bd = self.pool_norm(x_bd) if self.pool_norm else x_bd
        return self.projection(x_bd) if self.projection else x_bd


class TextTransformer(nnx.Module):
    """CLIP's text half."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.config, d = config, config.dim
        init = nnx.initializers.normal(0.02)
        self.embedding = layers.param(rngs, init, (config.vocab_size, d), (None, None))
        self.table = layers.param(rngs, init, (config.length, d), (None, None))
        self.blocks = layers.stack(
            lambda r: Block(config, rngs=r), config.num_layers, rngs
        )
        self.norm_out = layers.LayerNorm(d, eps=config.eps, rngs=rngs)
        self.projection = layers.Linear(
            d, config.projection, axes=(None, None), bias=False, rngs=rngs
        )

    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        """Returns features [b, p] of texts, at the first end token of each.

        Args:
          ids_bl: token ids; those after the end token have no effect.
        """
        length = ids_bl.shape[1]
        x_bld = self.embedding[...][ids_bl] + self.table[...][:length]
        x_bld = self.norm_out(_run(self.blocks, x_bld, causal=True))
        end_b = jnp.argmax(ids_bl == self.config.end, axis=1)
        return self.projection(x_bld[jnp.arange(len(x_bld)), end_b])


def _run(blocks: Block, x_bnd, rotate=None, causal: bool = False) -> jax.Array:
    def body(x_bnd, block):
        return block(x_bnd, rotate, causal), None

    return jax.lax.scan(body, x_bnd, blocks)[0]


def _patchify(video_bthwc: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """Returns patches [b, n, pixels of a patch]: time, height, width, channel."""
    b, t, h, w, c = video_bthwc.shape
    pt, ph, pw = patch
    x = video_bthwc.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, -1, pt * ph * pw * c)


def sinusoid(count: int, d: int) -> np.ndarray:
    """Returns sinusoidal positions, interleaved: float32 [n, d] (1706.03762, 3.5)."""
    power = 2 * (np.arange(d) // 2) / d
    angle_nd = np.arange(count)[:, None] / 10000.0**power
    wave_nd = np.where(np.arange(d) % 2, np.cos(angle_nd), np.sin(angle_nd))
    return wave_nd.astype(np.float32)


def rotation(grid: tuple[int, int, int], e: int):
    """Returns V-JEPA 2's rotary positions: a third of a head each for t, h and w.

    Adjacent channels are rotated as pairs, but the two channels of a pair have different
    frequencies, since the list of frequencies is repeated, not interleaved. The published
    weights were trained like that.
    """
    part = 2 * (e // 3 // 2)
    frequency = 10000.0 ** -(np.arange(part // 2, dtype=np.float32) / (part / 2))
    frequency = np.tile(frequency, 2)
    places_3n = np.indices(grid).reshape(3, -1)
    angle_ne = np.concatenate([p[:, None] * frequency for p in places_3n], axis=1)
    angle_ne = np.pad(angle_ne, ((0, 0), (0, e - 3 * part)))
    cos, sin = (wave(angle_ne).astype(np.float32)[:, None] for wave in (np.cos, np.sin))

    def rotate(x_bnae: jax.Array) -> jax.Array:
        pairs = x_bnae.reshape(*x_bnae.shape[:-1], e // 2, 2)
        rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
        return x_bnae * cos + rotated.reshape(x_bnae.shape) * sin

    return rotate
