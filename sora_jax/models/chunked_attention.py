"""Attention with the scores of a few queries at a time, on one device.

Memory grows with the keys and not with their product with the queries, and the scores
are computed again for the gradient (arXiv 2112.05682). The form for CPUs; on GPUs and
TPUs that for what their kernels do not take.

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

# Scores that a device holds at a time, by which its caches are shared well on a CPU. See
# experiments/RESULTS.md, "Attention".
BYTES = 4 * 2**20
# Heads share a chunk where the scores of each fit into it whole, in the gradient into
# this share of it: two in one are up to half as slow again there as one by one.
_SHARED = 1 / 4
_LANES = 64  # of which the most queries of a chunk are a multiple
_LONG = 1536  # keys of a row; see `_stored`
# For `_exp`: 2^x over [-1/2, 1/2] to 9e-8 of it, the least that a polynomial of this
# degree with 2^0 = 1 is off there.
_POWER_OF_2 = (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264726)
_LOG2_E = 1 / math.log(2)
_WHOLE = 1.5 * 2**23


@functools.partial(jax.custom_vjp, nondiff_argnames=("chunk_bytes", "name"))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    seen: visibility.Seen,
    chunk_bytes: int,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; arguments as those of `attention.chunked`."""
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, name)[0]


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, name):
    found = _forward(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, q_bnhe.dtype)
    kept = tuple(checkpoint_name(x, name) for x in found)
    return kept[0], (q_bnhe, k_bmhe, v_bmhe, seen, kept)


def _attend_backward(chunk_bytes, name, saved, dy_bnhe):
    del name
    *qkv, seen, kept = saved
    gradients = _backward((*qkv, *kept, dy_bnhe), seen, chunk_bytes)
    return *(d.astype(x.dtype) for d, x in zip(gradients, qkv, strict=True)), None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, dtype):
    run = functools.partial(_values, dtype=dtype)
    return _in_groups(run, (q_bnhe, k_bmhe, v_bmhe), seen, chunk_bytes, chunk_bytes)


def _backward(arrays, seen, chunk_bytes):
    shared = int(chunk_bytes * _SHARED)
    return _in_groups(_gradients, arrays, seen, chunk_bytes, shared)


def _in_groups(run, arrays, seen, chunk_bytes: int, shared_bytes: int):
    """`run` for groups of rows and heads, one after the other.

    Args:
      run: function of arrays, what is seen and `num_chunks`, all with a group in place
        of batch and heads.
      arrays: queries, keys and others [b, tokens, h, ...].
      seen: a mask and segments [b, tokens], or None.
      chunk_bytes, shared_bytes: scores of a chunk, and of heads that share one.

    Returns:
      what it returns, [b, tokens, h, ...].
    """
    b, n, h, _ = arrays[0].shape
    query_bytes = 4 * arrays[1].shape[1]
    fitting = max(1, shared_bytes // (query_bytes * n))
    # Cores share groups of a power of two evenly.
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

    given = (*map(heads_first, arrays), tuple(map(by_head, seen)))
    run = functools.partial(run, num_chunks=num_chunks)
    if group == b * h:
        found = run(*jax.tree.map(lambda x: x[0], given))
        found = jax.tree.map(lambda x: x[None], found)
    else:
        found = jax.lax.map(lambda one: run(*one), given)
    return jax.tree.map(heads_last, found)


def _cut(x_gn: jax.Array | None, num_chunks: int) -> jax.Array | None:
    """Cuts queries into chunks of one size: [g, n, ...] to [k, g, c, ...]."""
    if x_gn is None:
        return None
    g, n, *rest = x_gn.shape
    size = -(-n // num_chunks)
    edges = ((0, 0), (0, num_chunks * size - n), *((0, 0),) * len(rest))
    x_gn = jnp.pad(x_gn, edges)
    return x_gn.reshape(g, num_chunks, size, *rest).swapaxes(0, 1)


def _join(x_kgc: jax.Array, n: int) -> jax.Array:
    """Undoes `_cut`."""
    k, g, c, *rest = x_kgc.shape
    return x_kgc.swapaxes(0, 1).reshape(g, k * c, *rest)[:, :n]


def _scores(q_gce, k_gme, visible, stored) -> jax.Array:
    scale = q_gce.shape[-1] ** -0.5
    if q_gce.dtype == jnp.float32:  # of half precision that would round them again
        q_gce, scale = q_gce * scale, 1
    scores_gcm = jnp.einsum(
        "gce,gme->gcm", q_gce, k_gme, preferred_element_type=jnp.float32
    )
    return visibility.hide(stored(scores_gcm) * scale, visible)


def _stored(x: jax.Array) -> jax.Array:
    """x; on CPUs an array of its own, which one loop writes and others read.

    Left to itself XLA there gives a product, largest scores and exponentials to one
    kernel of its library, which is slower with rows of `_LONG` keys, and in gradients.
    """
    return jax.lax.platform_dependent(
        x, cpu=jax.lax.optimization_barrier, default=_as_it_is
    )


def _as_it_is(x):
    return x


def _exp(x: jax.Array) -> jax.Array:
    """exp(x) of float32 up to 0: to 2e-7 of 1, and 0 from -88.03 down.

    On CPUs in half the operations that XLA's own takes: with x / log 2 = whole + part,
    exp(x) is 2^part, a polynomial, and `whole` is added to its exponent.
    """
    return jax.lax.platform_dependent(x, cpu=_exp_of_cpu, default=jnp.exp)


def _exp_of_cpu(x):
    x = jnp.maximum(x * _LOG2_E, -127.0)
    shifted = x + _WHOLE  # whose last bits are those of the nearest whole number
    part = x - (shifted - _WHOLE)
    y = jnp.full_like(part, _POWER_OF_2[-1])
    for coefficient in _POWER_OF_2[-2::-1]:
        y = y * part + coefficient
    whole, bits = (jax.lax.bitcast_convert_type(v, jnp.int32) for v in (shifted, y))
    return jax.lax.bitcast_convert_type(bits + (whole << 23), jnp.float32)


def _values(q_gne, k_gme, v_gme, seen, num_chunks, dtype):
    """Returns the result, and what the gradient needs: no scores, but their log sums.

    As two numbers a query, [g, n], the largest score and the sum of exp(score -
    largest), since the log sum of a row without any key would drown in its top.
    """
    mask_gm, q_segments_gn, k_segments_gm = seen
    is_long = k_gme.shape[1] >= _LONG
    stored, exp = (_stored, _exp) if is_long else (_as_it_is, jnp.exp)

    def chunk(_, given):
        q_gce, q_segments_gc = given
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

    cut = _cut(q_gne, num_chunks), _cut(q_segments_gn, num_chunks)
    _, found = jax.lax.scan(chunk, None, cut)
    return tuple(_join(x, q_gne.shape[1]) for x in found)


def _gradients(q_gne, k_gme, v_gme, y_gne, top_gn, sum_gn, dy_gne, seen, num_chunks):
    """The gradient of softmax from its result (arXiv 2205.14135, appendix B)."""
    mask_gm, q_segments_gn, k_segments_gm = seen
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = q_gne.shape[-1] ** -0.5
    dot_gn = jnp.sum(dy_gne.astype(jnp.float32) * y_gne.astype(jnp.float32), -1)

    def chunk(sums, given):
        dk_gem, dv_gem = sums
        q_gce, q_segments_gc, dy_gce, *of_query = given
        dot_gc1, top_gc1, inverse_gc1 = (x[..., None] for x in of_query)
        visible = visibility.visible(mask_gm, q_segments_gc, k_segments_gm)
        scores_gcm = _scores(q_gce, k_gme, visible, _stored)
        weights_gcm = _stored(_exp(scores_gcm - top_gc1) * inverse_gc1)
        moved_gcm = product("gce,gme->gcm", dy_gce, v_gme) - dot_gc1
        dscores_gcm = scale * weights_gcm * moved_gcm
        if visible is not None:  # rows without any key have weights all the same
            dscores_gcm = jnp.where(visible, dscores_gcm, 0)
        dscores_gcm = dscores_gcm.astype(q_gce.dtype)
        weights_gcm = weights_gcm.astype(v_gme.dtype)
        dk_gem += product("gec,gcm->gem", q_gce.swapaxes(1, 2), dscores_gcm)
        dv_gem += product("gec,gcm->gem", dy_gce.swapaxes(1, 2), weights_gcm)
        return (dk_gem, dv_gem), product("gcm,gme->gce", dscores_gcm, k_gme)

    # Not the sum, but its inverse: padding weighs nothing.
    of_query = q_gne, q_segments_gn, dy_gne, dot_gn, top_gn, 1 / sum_gn
    cut = [_cut(x, num_chunks) for x in of_query]
    # Heads before keys: products of scores that stand as they are, with small arrays
    # turned, are three times as fast on a CPU as with scores turned.
    sums = tuple(jnp.zeros_like(x.swapaxes(1, 2), jnp.float32) for x in (k_gme, v_gme))
    sums_gem, dq_kgce = jax.lax.scan(chunk, sums, cut)
    dk_gme, dv_gme = (x_gem.swapaxes(1, 2) for x_gem in sums_gem)
    return _join(dq_kgce, q_gne.shape[1]), dk_gme, dv_gme


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a ring in chunks, as `chunked` does it."""

    kernel: ClassVar[bool] = False
    chunk_bytes: int = BYTES

    def forward(self, q_bnhe, k_bmhe, v_bmhe, seen):
        return _forward(q_bnhe, k_bmhe, v_bmhe, seen, self.chunk_bytes, jnp.float32)

    def backward(self, *arrays_and_seen):
        *arrays, seen = arrays_and_seen
        return _backward(arrays, seen, self.chunk_bytes)
