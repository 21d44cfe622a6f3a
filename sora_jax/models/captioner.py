"""The captioner: reads a clip and writes a caption of a tier, token by token.

With `reads="text"` it reads a text instead: it rewrites prompts as captions.

An encoder of the clip, and a causal decoder that attends to it (arXiv 1706.03762), both of
pre-norm blocks with a gated GELU. Squares of pixels of single frames are encoded, then time
is folded into the channels: a place of the encoder sees its square in all frames, in order,
so that motion is read at once. The first input of the decoder is the caption's tier, so one
network writes short captions and dense ones.

`beam_search` and `sample` run the decoder one token at a time, until all captions have
ended; keys and values of earlier tokens are cached.

Letters: b clips, t frames, h height, w width, c channels, n places, d width, a heads,
e head size, l tokens (m: as keys), v vocabulary, k beams.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.models import layers, text_encoder

PAD, END = 0, 1  # ids of our tokenizers
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the default is about the toy's.

    Attributes:
      reads: "video" or "text".
      num_frames, size: what clips are sampled and scaled to; size in pixels a side.
      patch: pixels a side of the squares.
      frame_dim: width of a square of one frame, before time is folded.
      dim, num_heads, mlp_dim: of the blocks.
      num_layers, decoder_layers: of the encoder and of the decoder.
      tiers: caption tiers, in the order of their ids.
      vocab_size: of the tokenizer.
      length: most tokens of a caption, with the end mark.
      read_length: tokens of a text that is read, with the end mark; padding is read too.
    """

    reads: str = "video"
    num_frames: configs.Size = 9
    size: configs.Size = 32
    patch: configs.Size = 4
    frame_dim: configs.Size = 48
    dim: configs.Size = 160
    num_layers: configs.Size = 3
    decoder_layers: configs.Size = 3
    num_heads: configs.Size = 5
    mlp_dim: configs.Size = 320
    tiers: tuple[str, ...] = ("short", "dense")
    vocab_size: Annotated[int, configs.Range("[1, 1e7]", 0, "the tokenizer's")] = 640
    length: configs.Size = 96
    read_length: configs.Size = 40
    dtype: str = "float32"  # compute type; parameters are float32

    def __post_init__(self):
        configs.check(self)
        if self.reads not in ("video", "text"):
            raise ValueError(f"reads is 'video' or 'text', not {self.reads!r}")
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide size {self.size}")
        if self.dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide dim {self.dim}")
        if not self.tiers or len(set(self.tiers)) < len(self.tiers):
            raise ValueError(f"tiers must be one or more different ones: {self.tiers}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips."""
        return self.num_frames, self.size, self.size

    @property
    def places(self) -> int:
        """Number of the encoder's places."""
        if self.reads == "text":
            return self.read_length
        return (self.size // self.patch) ** 2

    @property
    def sharded_sizes(self) -> dict[str, tuple[str, int]]:
        """Sizes that a mesh shards, for `sharding.check_divisible`."""
        return {
            "num_heads": ("heads", self.num_heads),
            "mlp_dim": ("mlp", self.mlp_dim),
        }


class Attention(nnx.Module):
    """Multi-head attention of tokens x to the keys and values of `remember`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, self.heads = config.dim, config.num_heads
        into = {"axes": ("embed", "heads"), "bias": False, "rngs": rngs}
        self.q, self.k, self.v = (layers.Linear(d, d, **into) for _ in range(3))
        self.norm_q = layers.RMSNorm(d // self.heads, rngs=rngs)
        self.norm_k = layers.RMSNorm(d // self.heads, rngs=rngs)
        self.o = layers.Linear(
            d,
            d,
            axes=("heads", "embed"),
            bias=False,
            init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def _split(self, x_bld) -> jax.Array:
        return x_bld.reshape(*x_bld.shape[:2], self.heads, -1)

    def remember(self, y_bmd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys_baem and values_bame of tokens, as products read them."""
        k_bmae = self.norm_k(self._split(self.k(y_bmd)))
        v_bmae = self._split(self.v(y_bmd))
        return k_bmae.transpose(0, 2, 3, 1), v_bmae.transpose(0, 2, 1, 3)

    def __call__(self, x_bld, memory, hidden_lm=None) -> jax.Array:
        """hidden_lm: True where token l must not attend to token m; or None."""
        k_baem, v_bame = memory
        q_blae = self.norm_q(self._split(self.q(x_bld)))
        scores_balm = jnp.einsum(
            "blae,baem->balm", q_blae, k_baem, preferred_element_type=jnp.float32
        )
        scores_balm = scores_balm * q_blae.shape[-1] ** -0.5
        if hidden_lm is not None:
            scores_balm = jnp.where(hidden_lm, _NEVER, scores_balm)
        weights_balm = jax.nn.softmax(scores_balm, axis=-1).astype(x_bld.dtype)
        y_blae = jnp.einsum("balm,bame->blae", weights_balm, v_bame)
        return self.o(y_blae.reshape(*x_bld.shape[:2], -1))


class EncoderBlock(nnx.Module):
    """Self-attention and MLP, each after a norm, with residual connections."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.dim, rngs=rngs)
        self.mlp = text_encoder.Mlp(config, rngs=rngs)

    def __call__(self, x_bnd) -> jax.Array:
        y_bnd = self.norm1(x_bnd)
        x_bnd = x_bnd + self.attention(y_bnd, self.attention.remember(y_bnd))
        return x_bnd + self.mlp(self.norm2(x_bnd))


class DecoderBlock(nnx.Module):
    """Causal self-attention, attention to the clip, and MLP."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.dim, rngs=rngs)
        self.look = Attention(config, rngs=rngs)
        self.norm3 = layers.RMSNorm(config.dim, rngs=rngs)
        self.mlp = text_encoder.Mlp(config, rngs=rngs)

    def __call__(self, x_bld, clip_bnd, later_lm) -> jax.Array:
        y_bld = self.norm1(x_bld)
        memory = self.attention.remember(y_bld)
        x_bld = x_bld + self.attention(y_bld, memory, later_lm)
        x_bld = x_bld + self.look(self.norm2(x_bld), self.look.remember(clip_bnd))
        return x_bld + self.mlp(self.norm3(x_bld))

    def step(self, x_b1d, clip, cache, place, later_m) -> tuple[jax.Array, tuple]:
        """The same for the token at `place`, whose keys and values join the cache.

        Args:
          x_b1d: the token.
          clip: keys and values of the clip's places.
          cache: those of the tokens.
          place: of the token.
          later_m: True at the tokens behind it.
        """
        y_b1d = self.norm1(x_b1d)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, place, axis)
            for old, new, axis in zip(
                cache, self.attention.remember(y_b1d), (3, 2), strict=True
            )
        )
        x_b1d = x_b1d + self.attention(y_b1d, cache, later_m[None])
        x_b1d = x_b1d + self.look(self.norm2(x_b1d), clip)
        return x_b1d + self.mlp(self.norm3(x_b1d)), cache


class Captioner(nnx.Module):
    """Encoder and decoder. See the head of this file; `Config` holds its sizes."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config, d = config, config.dim
        small = nnx.initializers.normal(0.02)
        if config.reads == "video":
            linear = functools.partial(layers.Linear, axes=(None, None), rngs=rngs)
            self.square1 = linear(3 * config.patch**2, 2 * config.frame_dim)
            self.square2 = linear(2 * config.frame_dim, config.frame_dim)
            inside = config.num_frames * config.frame_dim
            self.fold = layers.Linear(inside, d, rngs=rngs)
        self.place = layers.param(rngs, small, (config.places, d), (None, "embed"))
        self.encoder = layers.stack(
            lambda r: EncoderBlock(config, rngs=r), config.num_layers, rngs
        )
        self.norm_clip = layers.RMSNorm(d, rngs=rngs)
        self.words = layers.Embed(config.vocab_size, d, rngs=rngs)
        self.tier = layers.Embed(len(config.tiers), d, rngs=rngs)
        self.position = layers.param(rngs, small, (config.length, d), (None, "embed"))
        self.decoder = layers.stack(
            lambda r: DecoderBlock(config, rngs=r), config.decoder_layers, rngs
        )
        self.norm_out = layers.RMSNorm(d, rngs=rngs)
        self.head = layers.Linear(
            d, config.vocab_size, init=nnx.initializers.zeros, rngs=rngs
        )

    def encode(self, read: jax.Array) -> jax.Array:
        """Returns what the decoder attends to, [b, n, d].

        Args:
          read: a video in [-1, 1], [b, t, h, w, c], or the ids of a text, int [b, n].

        Raises:
          ValueError: it is not of the configured shape.
        """
        config = self.config
        shape = (*config.shape, 3) if config.reads == "video" else (config.places,)
        if read.shape[1:] != shape:
            raise ValueError(
                f"the captioner takes {config.reads} of {shape}, not {read.shape[1:]}"
            )
        if config.reads == "video":
            x_bnd = self._squares(read)
        else:
            x_bnd = self.words(sharding.reshard(read, "batch", None))
        x_bnd = (x_bnd + _table(self.place)).astype(config.dtype)

        def body(x_bnd, block):
            return block(x_bnd), None

        x_bnd, _ = jax.lax.scan(body, x_bnd, self.encoder)
        return self.norm_clip(x_bnd)

    def _squares(self, video_bthwc) -> jax.Array:
        """Returns the encoder's input, of squares of pixels with all their frames."""
        config = self.config
        (b, t, h, _, c), p = video_bthwc.shape, config.patch
        rows = sharding.out_sharding("batch", None, None)
        x = jnp.reshape(
            video_bthwc.astype(config.dtype),
            (b, t, h // p, p, h // p, p, c),
            out_sharding=sharding.out_sharding("batch", *[None] * 6),
        ).transpose(0, 2, 4, 1, 3, 5, 6)
        x_bmp = jnp.reshape(x, (b, config.places * t, p * p * c), out_sharding=rows)
        x_bmf = jax.nn.gelu(self.square2(jax.nn.gelu(self.square1(x_bmp))))
        return self.fold(jnp.reshape(x_bmf, (b, config.places, -1), out_sharding=rows))

    def _inputs(self, tier_b, ids_bl, hidden_bl=None) -> jax.Array:
        """The decoder's inputs: the tier, and the tokens but the last."""
        if hidden_bl is not None:
            ids_bl = jnp.where(hidden_bl, PAD, ids_bl)
        before_bl = sharding.reshard(ids_bl, "batch", None)[:, :-1]
        x_bld = jnp.concatenate([self.tier(tier_b[:, None]), self.words(before_bl)], 1)
        x_bld = x_bld + _table(self.position)[: ids_bl.shape[1]]
        return x_bld.astype(self.config.dtype)

    def __call__(self, read, tier_b, ids_bl, hidden_bl=None) -> jax.Array:
        """Returns logits_blv of each token given those before it, float32.

        Args:
          read: see `encode`.
          tier_b: int, index of `Config.tiers`.
          ids_bl: the caption.
          hidden_bl: bool, tokens that later ones do not see: padding stands for them.
        """
        clip_bnd, length = self.encode(read), ids_bl.shape[1]
        later_lm = jnp.triu(jnp.ones((length, length), bool), 1)

        def body(x_bld, block):
            return block(x_bld, clip_bnd, later_lm), None

        x_bld, _ = jax.lax.scan(
            body, self._inputs(tier_b, ids_bl, hidden_bl), self.decoder
        )
        return self.head(self.norm_out(x_bld)).astype(jnp.float32)

    # -- one token at a time -----------------------------------------------------------

    def begin(self, read, beams: int = 1) -> list[tuple[DecoderBlock, tuple]]:
        """Returns each layer, with the keys and values of what is read.

        The layers are taken apart here, outside of the loop over tokens: a scan would
        copy all caches at every token.

        Args:
          read: see `encode`.
          beams: rows for each of what is read.
        """
        clip_bnd = jnp.repeat(self.encode(read), beams, 0)
        blocks = (
            jax.tree.map(lambda leaf, index=index: leaf[index], self.decoder)
            for index in range(self.config.decoder_layers)
        )
        return [(block, block.look.remember(clip_bnd)) for block in blocks]

    def empty_cache(self, rows: int) -> list[tuple[jax.Array, jax.Array]]:
        """Returns room for the keys and values of captions, for each layer."""
        c, e = self.config, self.config.dim // self.config.num_heads
        k_baem = jnp.zeros((rows, c.num_heads, e, c.length), c.dtype)
        return [(k_baem, k_baem.transpose(0, 1, 3, 2))] * c.decoder_layers

    def step(self, tier_b, token_b, place, layers, cache) -> tuple[jax.Array, list]:
        """Returns logits_bv of the token at `place`, and the cache.

        Args:
          tier_b: of the captions.
          token_b: at the place before; ignored at place 0.
          place: int, traced.
          layers: from `begin`, with as many rows.
          cache: from `empty_cache`, or from the step before.
        """
        x_b1d = jnp.where(
            place == 0, self.tier(tier_b[:, None]), self.words(token_b[:, None])
        )
        x_b1d = (x_b1d + _table(self.position)[place]).astype(self.config.dtype)
        later_m = jnp.arange(self.config.length) > place
        caches = []
        for (block, of_clip), of_layer in zip(layers, cache, strict=True):
            x_b1d, of_layer = block.step(x_b1d, of_clip, of_layer, place, later_m)
            caches.append(of_layer)
        logits_b1v = self.head(self.norm_out(x_b1d)).astype(jnp.float32)
        return logits_b1v[:, 0], caches


def _table(param: nnx.Param) -> jax.Array:
    return sharding.gather_weight(param[...], (None, "embed"))


def sample(
    captioner: Captioner,
    read: jax.Array,
    tier_b: jax.Array,
    key_b: jax.Array,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Draws captions token by token.

    Args:
      read: see `Captioner.encode`.
      tier_b: int, index of `Config.tiers`.
      key_b: of the draws of each caption, which do not depend on the other rows.
      temperature: divides the logits; above 0.

    Returns:
      ids_bl, padded behind the end mark; and the sum of the tokens' log-probabilities
      at temperature 1, float32 [b].
    """
    b, length = len(tier_b), captioner.config.length
    vocabulary = captioner.config.vocab_size
    layers_of = captioner.begin(read)

    def goes_on(carry):
        place, _, ended_b, *_ = carry
        return (place < length) & ~jnp.all(ended_b)

    def body(carry):
        place, ids_bl, ended_b, total_b, cache = carry
        token_b = jax.lax.dynamic_index_in_dim(
            ids_bl, jnp.maximum(place - 1, 0), 1, keepdims=False
        )
        logits_bv, cache = captioner.step(tier_b, token_b, place, layers_of, cache)
        noise_bv = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, place), (vocabulary,))
        )(key_b)
        drawn_b = jnp.argmax(logits_bv / temperature + noise_bv, -1)
        nats_bv = jax.nn.log_softmax(logits_bv)
        log_b = jnp.take_along_axis(nats_bv, drawn_b[:, None], 1)[:, 0]
        token_b = jnp.where(ended_b, PAD, drawn_b).astype(jnp.int32)
        ids_bl = jax.lax.dynamic_update_index_in_dim(ids_bl, token_b, place, 1)
        total_b = total_b + jnp.where(ended_b, 0.0, log_b)
        return place + 1, ids_bl, ended_b | (drawn_b == END), total_b, cache

    start = jnp.zeros((b, length), jnp.int32), jnp.zeros(b, bool), jnp.zeros(b)
    start = 0, *start, captioner.empty_cache(b)
    _, ids_bl, _, total_b, _ = jax.lax.while_loop(goes_on, body, start)
    return ids_bl, total_b


def beam_search(
    captioner: Captioner, read: jax.Array, tier_b: jax.Array, beams: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Finds likely captions: the best of `beams`, by the mean log-probability of a token.

    With one beam, the most likely token is taken at every place.

    Returns:
      ids_bl, padded behind the end mark, and the sum of their log-probabilities,
      float32 [b].
    """
    (b, k), v = (len(tier_b), beams), captioner.config.vocab_size
    length = captioner.config.length
    layers_of = captioner.begin(read, k)
    tier_r = jnp.repeat(tier_b, k)
    first_k = jnp.where(jnp.arange(k) == 0, 0.0, _NEVER)  # all beams begin alike
    # An ended caption goes on with padding, at no cost.
    only_pad_v = jnp.where(jnp.arange(v) == PAD, 0.0, _NEVER)

    def goes_on(carry):
        place, _, ended_bk, *_ = carry
        return (place < length) & ~jnp.all(ended_bk)

    def body(carry):
        place, ids_bkl, ended_bk, total_bk, cache = carry
        before = jnp.maximum(place - 1, 0)
        token_bk = jax.lax.dynamic_index_in_dim(ids_bkl, before, 2, keepdims=False)
        logits_rv, cache = captioner.step(
            tier_r, token_bk.reshape(-1), place, layers_of, cache
        )
        nats_bkv = jax.nn.log_softmax(logits_rv).reshape(b, k, v)
        nats_bkv = jnp.where(ended_bk[..., None], only_pad_v, nats_bkv)
        joint_bm = (total_bk[..., None] + nats_bkv).reshape(b, k * v)
        total_bk, chosen_bk = jax.lax.top_k(joint_bm, k)
        parent_bk, token_bk = chosen_bk // v, (chosen_bk % v).astype(jnp.int32)
        ids_bkl = jnp.take_along_axis(ids_bkl, parent_bk[..., None], 1)
        ids_bkl = jax.lax.dynamic_update_index_in_dim(ids_bkl, token_bk, place, 2)
        ended_bk = jnp.take_along_axis(ended_bk, parent_bk, 1) | (token_bk == END)
        rows_r = (jnp.arange(b)[:, None] * k + parent_bk).reshape(-1)
        if k > 1:
            cache = jax.tree.map(lambda x: x[rows_r], cache)
        return place + 1, ids_bkl, ended_bk, total_bk, cache

    start = (
        0,
        jnp.zeros((b, k, length), jnp.int32),
        jnp.zeros((b, k), bool),
        jnp.zeros((b, k)) + first_k,
        captioner.empty_cache(b * k),
    )
    _, ids_bkl, _, total_bk, _ = jax.lax.while_loop(goes_on, body, start)
    tokens_bk = jnp.maximum(jnp.sum(ids_bkl != PAD, -1), 1)
    best_b = jnp.argmax(total_bk / tokens_bk, 1)
    ids_bl = jnp.take_along_axis(ids_bkl, best_b[:, None, None], 1)[:, 0]
    return ids_bl, jnp.take_along_axis(total_bk, best_b[:, None], 1)[:, 0]
