"""Attention with the scores of a few queries at a time, on one device.

Memory grows with the number of keys, not with the product of keys and queries, and the
scores are recomputed for the gradient (arXiv 2112.05682). CPUs use it, and GPUs and TPUs
where their kernels do not support the arguments.

Letters: b batch, n query tokens, m key tokens, h heads, e head size, g batch and heads
as one axis, k chunks, c queries of a chunk.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.models import visibility

# Bytes of scores that a device holds at a time; they fit a CPU's caches. See
# experiments/RESULTS.md, "Attention".
BYTES = 4 * 2**20
# Heads share a chunk where all scores of each fit into it, in the gradient into this
# share of it: two in one are up to 1.5 times as slow there as one by one.
_SHARED = 1 / 4
_LANES = 64  # a chunk has a multiple of so many queries where it can
_LONG = 1536  # keys of a row; see `_stored`
# For `_exp`: 2^x over [-1/2, 1/2] to a relative error of 9e-8, the least of any polynomial
# of this degree that has 2^0 = 1.
_POWER_OF_2 = (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264726)
_LOG2_E = 1 / math.log(2)
_WHOLE = 1.5 * 2**23


@functools.partial(jax.custom_vjp, nondiff_argnames=("chunk_bytes", "name"))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    masks: visibility.Masks,
    chunk_bytes: int,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; arguments as those of `attention.chunked`."""
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, chunk_bytes, name)[0]


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, chunk_bytes, name):
    results = _forward(q_bnhe, k_bmhe, v_bmhe, masks, chunk_bytes, q_bnhe.dtype)
    saved = tuple(checkpoint_name(x, name) for x in results)
    return saved[0], (q_bnhe, k_bmhe, v_bmhe, masks, saved)


def _attend_backward(chunk_bytes, name, saved, dy_bnhe):
    del name
    *qkv, masks, results = saved
    gradients = _backward((*qkv, *results, dy_bnhe), masks, chunk_bytes)
    return *(d.astype(x.dtype) for d, x in zip(gradients, qkv, strict=True)), None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q_bnhe, k_bmhe, v_bmhe, masks, chunk_bytes, dtype):
    run = functools.partial(_values, dtype=dtype)
    return _in_groups(run, (q_bnhe, k_bmhe, v_bmhe), masks, chunk_bytes, chunk_bytes)


def _backward(arrays, masks, chunk_bytes):
    shared = int(chunk_bytes * _SHARED)
    return _in_groups(_gradients, arrays, masks, chunk_bytes, shared)


def _in_groups(run, arrays, masks, chunk_bytes: int, shared_bytes: int):
    """Applies `run` to groups of rows and heads, one after the other.

    Args:
      run: function of arrays, masks and `num_chunks`, all with a group in place of batch
        and heads.
      arrays: queries, keys and others [b, tokens, h, ...].
      masks: a mask and segments [b, tokens], or None.
      chunk_bytes, shared_bytes: bytes of scores of a chunk, and of heads that share one.

    Returns:
      the results of `run`, [b, tokens, h, ...].
    """
    b, n, h, _ = arrays[0].shape
    query_bytes = 4 * arrays[1].shape[1]
    fitting = max(1, shared_bytes // (query_bytes * n))
    # Powers of two divide evenly over CPU cores.
    whole = fitting >= b * h
    group = b * h if whole else math.gcd(b * h, 1 << fitting.bit_length() - 1)
    size = max(1, chunk_bytes // (query_bytes * group))
    num_chunks = -(-n // (size // _LANES * _LANES or size))

    def heads_first(x_bnh):
        x = x_bnh.swapaxes(1, 2)
        return x.reshape(-1, group, *x.shape[2:])

    def heads_last(x_gn):
        return x_gn.reshape(b, h, *x_gn.shape[2:]).swapaxes(1, 2)

    def by_head(x_bn):
        if x_bn is None:
            return None
        return jnp.repeat(x_bn, h, axis=0).reshape(-1, group, x_bn.shape[1])

    inputs = (*map(heads_first, arrays), tuple(map(by_head, masks)))
    run = functools.partial(run, num_chunks=num_chunks)
    if group == b * h:
        results = run(*jax.tree.map(lambda x: x[0], inputs))
        results = jax.tree.map(lambda x: x[None], results)
    else:
        results = jax.lax.map(lambda one: run(*one), inputs)
    return jax.tree.map(heads_last, results)


def _split(x_gn: jax.Array | None, num_chunks: int) -> jax.Array | None:
    """Splits queries into chunks of equal size, padded: [g, n, ...] to [k, g, c, ...]."""
    if x_gn is None:
        return None
    g, n, *rest = x_gn.shape
    size = -(-n // num_chunks)
    edges = ((0, 0), (0, num_chunks * size - n), *((0, 0),) * len(rest))
    x_gn = jnp.pad(x_gn, edges)
    return x_gn.reshape(g, num_chunks, size, *rest).swapaxes(0, 1)


def _join(x_kgc: jax.Array, n: int) -> jax.Array:
    """Undoes `_split`."""
    k, g, c, *rest = x_kgc.shape
    return x_kgc.swapaxes(0, 1).reshape(g, k * c, *rest)[:, :n]


def _scores(q_gce, k_gme, visible, stored) -> jax.Array:
    scale = q_gce.shape[-1] ** -0.5
    if q_gce.dtype == jnp.float32:  # in half precision the product would be rounded
        q_gce, scale = q_gce * scale, 1
    scores_gcm = jnp.einsum(
        "gce,gme->gcm", q_gce, k_gme, preferred_element_type=jnp.float32
    )
    return visibility.hide(stored(scores_gcm) * scale, visible)


def _stored(x: jax.Array) -> jax.Array:
    """Returns x; on CPUs behind an optimization barrier, which keeps it from being fused.

    XLA would otherwise fuse a product, its maximum and its exponentials into one kernel,
    which is slower for rows of `_LONG` keys, and in gradients.
    """
    return jax.lax.platform_dependent(
        x, cpu=jax.lax.optimization_barrier, default=_identity
    )


def _identity(x):
    return x


def _exp(x: jax.Array) -> jax.Array:
    """exp(x) of float32 x <= 0, to an absolute error of 2e-7; 0 for x <= -88.03.

    On CPUs with half of the operations of XLA's own: for x / log 2 = whole + part, exp(x)
    is 2^part, a polynomial, with `whole` added to its exponent.
    """
    return jax.lax.platform_dependent(x, cpu=_exp_of_cpu, default=jnp.exp)


def _exp_of_cpu(x):
    x = jnp.maximum(x * _LOG2_E, -127.0)
    shifted = x + _WHOLE  # its last bits are the nearest whole number
    part = x - (shifted - _WHOLE)
    y = jnp.full_like(part, _POWER_OF_2[-1])
    for coefficient in _POWER_OF_2[-2::-1]:
        y = y * part + coefficient
    whole, bits = (jax.lax.bitcast_convert_type(v, jnp.int32) for v in (shifted, y))
    return jax.lax.bitcast_convert_type(bits + (whole << 23), jnp.float32)


def _values(q_gne, k_gme, v_gme, masks, num_chunks, dtype):
    """Returns the result and, for the gradient, the log sums of the scores.

    They are two numbers a query, [g, n], the largest score and the sum of exp(score -
    largest): in a row without any key, the sum of both would round the second away.
    """
    mask_gm, q_segments_gn, k_segments_gm = masks
    is_long = k_gme.shape[1] >= _LONG
    stored, exp = (_stored, _exp) if is_long else (_identity, jnp.exp)

    def chunk(_, queries):
        q_gce, q_segments_gc = queries
        visible = visibility.visible(mask_gm, q_segments_gc, k_segments_gm)
        scores_gcm = _scores(q_gce, k_gme, visible, stored)
        top_gc1 = stored(jnp.max(scores_gcm, axis=-1, keepdims=True))
        weights_gcm = stored(exp(scores_gcm - top_gc1))
        sum_gc1 = jnp.sum(weights_gcm, axis=-1, keepdims=True)
        y_gce = jnp.einsum(
            "gcm,gme->gce",
            weights_gcm.astype(v_gme.dtype),
            v_gme,
            preferred_element_type=jnp.float32,
        )
        y_gce = (y_gce / sum_gc1).astype(dtype)
        return None, (y_gce, top_gc1[..., 0], sum_gc1[..., 0])

    chunks = _split(q_gne, num_chunks), _split(q_segments_gn, num_chunks)
    _, results = jax.lax.scan(chunk, None, chunks)
    return tuple(_join(x, q_gne.shape[1]) for x in results)


def _gradients(q_gne, k_gme, v_gme, y_gne, top_gn, sum_gn, dy_gne, masks, num_chunks):
    """The gradient of softmax from its result (arXiv 2205.14135, appendix B)."""
    mask_gm, q_segments_gn, k_segments_gm = masks
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = q_gne.shape[-1] ** -0.5
    dot_gn = jnp.sum(dy_gne.astype(jnp.float32) * y_gne.astype(jnp.float32), -1)

    def chunk(sums, queries):
        dk_gem, dv_gem = sums
        q_gce, q_segments_gc, dy_gce, *numbers = queries
        dot_gc1, top_gc1, inverse_gc1 = (x[..., None] for x in numbers)
        visible = visibility.visible(mask_gm, q_segments_gc, k_segments_gm)
        scores_gcm = _scores(q_gce, k_gme, visible, _stored)
        weights_gcm = _stored(_exp(scores_gcm - top_gc1) * inverse_gc1)
        moved_gcm = product("gce,gme->gcm", dy_gce, v_gme) - dot_gc1
        dscores_gcm = scale * weights_gcm * moved_gcm
        if visible is not None:  # rows without any key have weights nevertheless
            dscores_gcm = jnp.where(visible, dscores_gcm, 0)
        dscores_gcm = dscores_gcm.astype(q_gce.dtype)
        weights_gcm = weights_gcm.astype(v_gme.dtype)
        dk_gem += product("gec,gcm->gem", q_gce.swapaxes(1, 2), dscores_gcm)
        dv_gem += product("gec,gcm->gem", dy_gce.swapaxes(1, 2), weights_gcm)
        return (dk_gem, dv_gem), product("gcm,gme->gce", dscores_gcm, k_gme)

    # The inverse of the sum, so that padded queries have weights of zero.
    queries = q_gne, q_segments_gn, dy_gne, dot_gn, top_gn, 1 / sum_gn
    chunks = [_split(x, num_chunks) for x in queries]
    # [e, m], not [m, e]: transposing the small arrays instead of the scores makes the
    # products three times as fast on a CPU.
    sums = tuple(jnp.zeros_like(x.swapaxes(1, 2), jnp.float32) for x in (k_gme, v_gme))
    sums_gem, dq_kgce = jax.lax.scan(chunk, sums, chunks)
    dk_gme, dv_gme = (x_gem.swapaxes(1, 2) for x_gem in sums_gem)
    return _join(dq_kgce, q_gne.shape[1]), dk_gme, dv_gme


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a ring, attended to in chunks."""

    kernel: ClassVar[bool] = False
    chunk_bytes: int = BYTES

    def forward(self, q_bnhe, k_bmhe, v_bmhe, masks):
        return _forward(q_bnhe, k_bmhe, v_bmhe, masks, self.chunk_bytes, jnp.float32)

    def backward(self, *arrays_and_masks):
        *arrays, masks = arrays_and_masks
        return _backward(arrays, masks, self.chunk_bytes)
