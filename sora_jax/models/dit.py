"""The denoiser: a spacetime diffusion transformer over latent tokens.

Full 3D self-attention, text cross-attention, adaptive layer norm from one shared MLP with
offsets per block (arXiv 2212.09748, 2310.00426), RMS query/key norm, 3D rotary positions:
the block of Wan 2.1 / 2.2 (arXiv 2503.20314), whose weights load into it. Additions to
Wan, which are off or zero at first: a noise level for every token, an embedding of known
tokens, the pooled text in the modulation, additive positions.

Letters: b batch, n tokens, l text tokens, d width, c latent channels times the patch
volume, h heads, g heads of keys and values, e head size, k distinct noise levels of a row,
m key tokens; on video grids t, h, w time, height, width and c latent channels.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.models import (
    attention,
    encodings,
    layers,
    quantization,
    rows,
    text_encoder,
)

_INPUT = "block_input"
_TEXT = "text_attention"  # cheap to recompute, and as large as self-attention's
_policies = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(attention.SAVED),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[attention.SAVED],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": _policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of the denoiser; num_kv_heads: see arXiv 2305.13245."""

    in_channels: configs.Size = 16  # channels of the latent video
    out_channels: configs.Size = 16
    patch: configs.Grid = (1, 2, 2)  # latent voxels in a token: t, h, w
    dim: configs.Size = 1536
    num_layers: configs.Size = 30
    num_heads: configs.Size = 12
    num_kv_heads: Annotated[int, configs.Range("[1, 1e6]", 0, "num_heads")] = 0
    mlp_dim: configs.Size = 8960
    text_dim: configs.Size = 4096  # width of the text encoder's states
    freq_dim: configs.Size = 256  # width of the noise level's sinusoid
    cross_attn_norm: bool = True  # a layer norm before the text's attention
    mask_text: bool = True  # hide text padding (Wan: zero-padded and visible)
    known_embedding: bool = True
    context_embedding: bool = False  # of references and of the source of an edit
    pooled_text: bool = True
    additive_positions: bool = False
    input_skip: bool = False  # the network learns the residual of a linear guess
    rope_theta: Annotated[float, configs.Range("[1, 1e8]")] = 10_000.0
    # Scale of time in the rotary and additive positions: one unit is one latent frame
    # at time_scale latent frames a second. None counts latent frames, whatever the fps.
    time_scale: Annotated[float, configs.Range("(0, 1e4]")] | None = None
    temporal_stride: configs.Size = 4  # frames in a latent frame, except the first
    dtype: str = "float32"  # compute type; parameters are float32
    # What the backward pass recomputes: "none"; "full", all but each block's input;
    # "attention", all but the input and the result of self-attention; "offload", the
    # same, with inputs offloaded to host memory; "dots", all but the products with weights
    # (the fastest on CPU, where memory is slower than arithmetic).
    remat: str = "none"
    # Of the products with weights in the blocks: "int8" or "fp8"; "": none.
    quantization: str = ""

    def __post_init__(self):
        configs.check(self)
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}"
            )
        for name, size in (("freq_dim", self.freq_dim), ("head size", self.head_dim)):
            if size % 2:
                raise ValueError(f"{name} {size} must be even")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; it must be one of {[*REMAT]}")
        quantization.check(self.quantization)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def sharded_sizes(self) -> dict[str, tuple[str, int]]:
        """Sizes that a mesh shards, for `sharding.check_divisible`."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}
        sizes = {name: ("heads", size) for name, size in heads.items()}
        return sizes | {"mlp_dim": ("mlp", self.mlp_dim)}

    @property
    def token_dim(self) -> int:
        """Length of an input token."""
        return self.in_channels * self.patch[0] * self.patch[1] * self.patch[2]


def linear_guess(tau: jax.Array) -> jax.Array:
    """Returns g of the best linear guess g x_tau at the velocity, for data of variance 1.

    With x_tau = (1 - tau) x0 + tau noise, E[noise - x0 | x_tau] = g x_tau for
    g = (2 tau - 1) / (tau^2 + (1 - tau)^2) where x0 is normal. Near either end of the
    path the velocity is nearly a multiple of the input, which layer norms make hard to
    copy (compare arXiv 2206.00364, section 5).
    """
    return (2 * tau - 1) / (jnp.square(tau) + jnp.square(1 - tau))


class Reuse(NamedTuple):
    """The step cache at one evaluation; see `diffusion/step_cache.py`.

    residual_bnd: what the blocks added to their input when they last ran. now: bool
    scalar, whether to use it instead of running them. gain_b: its factor in each row.
    """

    residual_bnd: jax.Array
    now: jax.Array
    gain_b: jax.Array


class Attention(nnx.Module):
    """Multi-head attention with RMS norm of queries and keys over their full width."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, kv_dim = config.dim, config.kv_heads * config.head_dim
        options = {"kind": config.quantization, "rngs": rngs}
        into = {"axes": ("embed", "heads"), **options}
        self.to_q = layers.Linear(d, d, **into)
        self.to_k = layers.Linear(d, kv_dim, **into)
        self.to_v = layers.Linear(d, kv_dim, **into)
        self.norm_q = layers.RMSNorm(d, axis="heads", rngs=rngs)
        self.norm_k = layers.RMSNorm(kv_dim, axis="heads", rngs=rngs)
        self.to_out = layers.Linear(d, d, axes=("heads", "embed"), **options)
        self.head_dim = config.head_dim

    def __call__(self, x_bnd, context_bmd, *, rope=None, **masks):
        def heads(x):
            return x.reshape(*x.shape[:2], -1, self.head_dim)

        q_bnhe = heads(self.norm_q(self.to_q(x_bnd)))
        k_bmge = heads(self.norm_k(self.to_k(context_bmd)))
        v_bmge = heads(self.to_v(context_bmd))
        if rope is not None:
            q_bnhe = encodings.rotate(q_bnhe, rope)
            k_bmge = encodings.rotate(k_bmge, rope)
        y_bnhe = attention.attention(q_bnhe, k_bmge, v_bmge, **masks)
        return self.to_out(y_bnhe.reshape(x_bnd.shape))


class Mlp(nnx.Module):
    """Two matmuls with a tanh GELU in between."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, f = config.dim, config.mlp_dim
        options = {"kind": config.quantization, "rngs": rngs}
        self.up = layers.Linear(d, f, axes=("embed", "mlp"), **options)
        self.down = layers.Linear(f, d, axes=("mlp", "embed"), **options)

    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_bnd)))


def _open_gates(key, shape, dtype):
    """Initializes shifts and scales as Wan does, and gates near 1.

    Wan's gates, near 0, would pass almost nothing for the first hundreds of steps.
    """
    table = shape[-1] ** -0.5 * jax.random.normal(key, shape, dtype)
    return table.at[jnp.array([2, 5])].add(1.0)


class Block(nnx.Module):
    """Self-attention, text cross-attention and MLP; the first and last are modulated."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.scale_shift_table = layers.param(
            rngs, _open_gates, (6, config.dim), (None, None)
        )
        self.attn1 = Attention(config, rngs=rngs)
        self.norm2 = (
            layers.LayerNorm(config.dim, rngs=rngs) if config.cross_attn_norm else None
        )
        self.attn2 = Attention(config, rngs=rngs)
        self.ffn = Mlp(config, rngs=rngs)

    def __call__(self, x_bnd, modulation_bk6d, pick, text_bld, inputs):
        table = self.scale_shift_table[...] + modulation_bk6d
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            pick(table[:, :, i]) for i in range(6)
        )
        dtype = x_bnd.dtype
        h_bnd = (layers.layer_norm(x_bnd) * (1 + scale1) + shift1).astype(dtype)
        h_bnd = self.attn1(h_bnd, h_bnd, rope=inputs["rope"], **inputs["of_tokens"])
        x_bnd = (x_bnd + h_bnd * gate1).astype(dtype)
        x_bnd = x_bnd + self.attn2(
            x_bnd if self.norm2 is None else self.norm2(x_bnd),
            text_bld,
            **inputs["of_text"],
        )
        h_bnd = (layers.layer_norm(x_bnd) * (1 + scale2) + shift2).astype(dtype)
        return (x_bnd + self.ffn(h_bnd) * gate2).astype(dtype)


class TwoLayers(nnx.Module):
    """linear, activation, linear: the embedders of noise level and text."""

    def __init__(self, i: int, o: int, activation, *, precision=None, rngs: nnx.Rngs):
        options = {"precision": precision, "rngs": rngs}
        self.linear_1 = layers.Linear(i, o, **options)
        self.linear_2 = layers.Linear(o, o, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class DiT(nnx.Module):
    """The denoiser. See the head of this file; `Config` holds its sizes."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        d = config.dim
        zeros = nnx.initializers.zeros
        self.patch_embedding = layers.Linear(
            config.token_dim, d, axes=(None, "embed"), rngs=rngs
        )
        # Modulation is computed for a few levels only, so full precision is cheap.
        exact = {"precision": layers.EXACT, "rngs": rngs}
        self.time_embedder = TwoLayers(config.freq_dim, d, jax.nn.silu, **exact)
        self.time_proj = layers.Linear(d, 6 * d, init=zeros, **exact)
        self.text_embedder = TwoLayers(config.text_dim, d, jax.nn.gelu, rngs=rngs)
        self.known = (
            layers.param(rngs, zeros, (d,), (None,)) if config.known_embedding else None
        )
        self.context = (
            layers.param(rngs, zeros, (2, d), (None, None))
            if config.context_embedding
            else None
        )
        self.pooled_text = (
            layers.Linear(config.text_dim, d, init=zeros, **exact)
            if config.pooled_text
            else None
        )
        self.blocks = layers.stack(
            lambda r: Block(config, rngs=r), config.num_layers, rngs
        )
        self.scale_shift_table = layers.param(
            rngs, nnx.initializers.normal(d**-0.5), (2, d), (None, None)
        )
        patch_volume = config.patch[0] * config.patch[1] * config.patch[2]
        self.proj_out = layers.Linear(
            d, config.out_channels * patch_volume, init=zeros, rngs=rngs
        )

    def __call__(
        self, given: rows.Rows, reuse: Reuse | None = None, hidden_after: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predicts the velocity noise - clean of every token.

        Args:
          given: rows of tokens.
          reuse: a step cache, which may replace running the blocks.
          hidden_after: also return the hidden states after so many blocks; 0: do not.

        Returns:
          velocity_bnc, float32; with `reuse` also the residual of the blocks, for the
          next evaluation; with `hidden_after` also hidden_bnd.
        """
        config, n = self.config, given.tokens_bnc.shape[1]
        dtype = jnp.dtype(config.dtype)
        given = given.sharded()
        x_bnc, levels_bk = given.tokens_bnc, given.levels_bk
        text_bld, text_mask_bl = given.text_bld, given.text_mask_bl
        x_bnd = self.patch_embedding(x_bnc.astype(dtype))
        of_roles = {rows.Role.KNOWN: self.known}
        if self.context is not None:
            of_roles[rows.Role.REFERENCE] = self.context[0]
            of_roles[rows.Role.SOURCE] = self.context[1]
        for role, embedding in of_roles.items():
            if embedding is not None and given.roles_bn is not None:
                has_role = (given.roles_bn == role)[..., None].astype(jnp.float32)
                x_bnd = x_bnd + (has_role * embedding[...]).astype(dtype)
        if config.additive_positions:
            place_bnd = encodings.additive_positions(
                given.pos_bn3, config.dim, given.period_bn
            )
            x_bnd = x_bnd + place_bnd.astype(dtype)

        # Noise level and modulation in float32, for the k levels only.
        level_bkd = self.time_embedder(
            encodings.sinusoid(levels_bk * 1000, config.freq_dim)
        )
        mask_bl = text_mask_bl if config.mask_text else None
        if self.pooled_text is not None:
            if given.segments_bn is None:
                mean_bkd = text_encoder.mean_state(text_bld, text_mask_bl)[:, None]
            else:
                of_level_bk1 = given.level_segments_bk[:, :, None]
                same_bkl = of_level_bk1 == given.text_segments_bl[:, None]
                seen_bkl = same_bkl & text_mask_bl[:, None]
                mean_bkd = text_encoder.mean_states(text_bld, seen_bkl)
            level_bkd = level_bkd + self.pooled_text(mean_bkd)
        modulation_bk6d = self.time_proj(jax.nn.silu(level_bkd))
        modulation_bk6d = modulation_bk6d.reshape(*level_bkd.shape[:2], 6, config.dim)

        pick = layers.picker(given.level_index_bn, levels_bk.shape[1])
        text_bld = self.text_embedder(text_bld.astype(dtype))
        of_row = {"q_segments_bn": given.segments_bn}
        inputs = {
            "rope": encodings.rope_tables(
                given.pos_bn3, config.head_dim, config.rope_theta, given.period_bn
            ),
            "of_tokens": of_row | {"k_segments_bm": given.segments_bn},
            "of_text": of_row
            | {
                "mask_bm": mask_bl,
                "k_segments_bm": given.text_segments_bl,
                "name": _TEXT,
            },
        }

        def body(x_bnd, block):
            x_bnd = checkpoint_name(x_bnd, _INPUT)
            return block(x_bnd, modulation_bk6d, pick, text_bld, inputs), None

        if config.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[config.remat])

        def run(x_bnd):
            return jax.lax.scan(body, x_bnd, self.blocks)[0]

        def run_in_two(x_bnd):
            first = jax.tree.map(lambda leaf: leaf[:hidden_after], self.blocks)
            rest = jax.tree.map(lambda leaf: leaf[hidden_after:], self.blocks)
            hidden_bnd = jax.lax.scan(body, x_bnd, first)[0]
            return jax.lax.scan(body, hidden_bnd, rest)[0], hidden_bnd

        def run_and_store(x_bnd):
            y_bnd = run(x_bnd)
            return y_bnd, y_bnd - x_bnd

        def skip(x_bnd):
            residual_bnd = reuse.gain_b[:, None, None] * reuse.residual_bnd
            return x_bnd + residual_bnd.astype(dtype), reuse.residual_bnd

        hidden_bnd = None
        if hidden_after:
            x_bnd, hidden_bnd = run_in_two(x_bnd)
        elif reuse is None:
            x_bnd = run(x_bnd)
        else:
            x_bnd, residual_bnd = jax.lax.cond(reuse.now, skip, run_and_store, x_bnd)

        table_bk2d = self.scale_shift_table[...] + level_bkd[:, :, None, :]
        shift, scale = pick(table_bk2d[:, :, 0]), pick(table_bk2d[:, :, 1])
        x_bnd = layers.layer_norm(x_bnd) * (1 + scale) + shift
        velocity_bnc = self.proj_out(x_bnd)
        if config.input_skip:
            gain = pick(linear_guess(levels_bk)[..., None])
            velocity_bnc = velocity_bnc + gain * x_bnc

        def unfilled(x_bn):
            if x_bn.shape[1] == n:
                return x_bn
            return sharding.reshard(x_bn, "batch", None, None)[:, :n]

        velocity_bnc = unfilled(velocity_bnc)
        if hidden_after:
            return velocity_bnc, unfilled(hidden_bnd)
        return velocity_bnc if reuse is None else (velocity_bnc, residual_bnd)
