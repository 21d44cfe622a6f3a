"""Attention behind one function.

Three forms of the same mathematics. `reference` holds the scores of all queries; where
they fit into the memory of one chunk it is the fastest. `chunked` holds those of a few
queries at a time, so that its memory grows with the keys and not with their product
with the queries, and computes them again for the gradient. `splash` is JAX's kernel for
TPUs, which never holds them outside of a core. Which one runs follows from the shapes
on a device and from what the program is lowered for, so it is known before it runs.

Where a row's tokens are split over devices, heads are exchanged for tokens over the mesh
axis `ulysses`, and over `ring` the keys and values go round (`ring_attention`), block by
block; each is attended to in chunks or by the kernel.

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

from sora_jax.core import sharding
from sora_jax.models import ring_attention, splash_attention

# Scores that a device holds at a time, by which its caches are shared well on a CPU, and
# what keeps a GPU busy; up to so many are all computed at once. See
# experiments/RESULTS.md, "Attention".
CHUNK_BYTES = 4 * 2**20
_LARGE_CHUNK_BYTES = 2**29  # not measured
_AT_ONCE_BYTES = 8 * 2**20
_MIN_QUERIES = 256  # a chunk has more scores before it has fewer queries
# Heads share a chunk where the scores of each fit into it whole, in the gradient into
# this share of it: two in one are up to half as slow again there as one by one.
_SHARED = 1 / 4
_LANES = 64  # of which a chunk's queries are a multiple
SAVED = "attention"  # what remat policies call the results that are dear to compute
_EXCHANGED = "ulysses"  # the mesh axis over which heads and tokens change places
_RING = "ring"  # the mesh axis over which keys and values go round


def attention(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    name: str = SAVED,
) -> jax.Array:
    """softmax(q k^T / sqrt(e)) v, softmax in float32 (arXiv 1706.03762).

    Args:
      q_bnhe, k_bmhe, v_bmhe: queries, keys and values, in the compute dtype.
      mask_bm: True where a key may be attended to.
      q_segments_bn, k_segments_bm: ids; a query sees only keys of its own segment.
      name: what remat policies call the result and its log sums.

    Returns:
      [b, n, h, e] in the dtype of q. A query that may see no key at all gets the mean
      of the values.

    Where keys are tokens that are split, heads are exchanged for tokens over the
    `ulysses` axis if they divide (arXiv 2309.14509), and keys and values go round over
    the `ring` axis if queries are split over it too (arXiv 2310.01889). They are gathered
    over what is left: over `ulysses`, where heads do not divide. Text is whole
    everywhere, and queries stay.
    """
    form = functools.partial(_attend_split, name=name)
    return _exchanged(
        form, q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm
    )


def _exchanged(form, q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm):
    """`form` with the tokens of a part of the heads, in place of all heads of a part."""
    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_EXCHANGED] == 1:
        return form(*given)
    before, keys = (jax.typeof(x).sharding.spec for x in (q_bnhe, k_bmhe))
    rows, tokens, heads, _ = (sharding.names(entry) for entry in before)
    left = q_bnhe.shape[2] % (sharding.shards(mesh, heads) * mesh.shape[_EXCHANGED])
    if left or _EXCHANGED not in tokens or _EXCHANGED not in sharding.names(keys[1]):
        return form(*given)
    tokens = tuple(name for name in tokens if name != _EXCHANGED)
    after = jax.P(rows, tokens, (*heads, _EXCHANGED), None)
    layouts = (*(after,) * 3, jax.P(rows), *(jax.P(rows, tokens),) * 2)
    given = (
        None if x is None else jax.reshard(x, layout)
        for x, layout in zip(given, layouts, strict=True)
    )
    return jax.reshard(form(*given), before)


def _attend_split(q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm, name):
    """`attention` where queries are; keys, values and what hides them come there."""
    if _goes_round(q_bnhe, k_bmhe):
        small, kernel = ring, functools.partial(ring, blocks=splash_attention.Blocks())
        chunks = lambda size: functools.partial(ring, blocks=ChunkBlocks(size))  # noqa: E731
    else:
        small, kernel = _named_reference, splash
        chunks = lambda size: functools.partial(chunked, chunk_bytes=size)  # noqa: E731
        k_bmhe = sharding.gather_axis(k_bmhe, 1, like=q_bnhe)
        v_bmhe = sharding.gather_axis(v_bmhe, 1, like=q_bnhe)
        if k_segments_bm is not None:
            k_segments_bm = sharding.gather_axis(k_segments_bm, 1, like=q_segments_bn)
    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    if _score_bytes(q_bnhe, k_bmhe) <= _AT_ONCE_BYTES:
        return small(*given, name=name)
    least = 4 * _MIN_QUERIES * k_bmhe.shape[1]
    fine, large = (chunks(max(x, least)) for x in (CHUNK_BYTES, _LARGE_CHUNK_BYTES))
    if q_bnhe.shape[-1] not in splash_attention.HEAD_SIZES:
        kernel = large
    there = [x is not None for x in given]

    def on(form):
        def run(*arrays):
            arrays = iter(arrays)
            return form(*(next(arrays) if x else None for x in there), name=name)

        return run

    arrays = [x for x in given if x is not None]
    return jax.lax.platform_dependent(
        *arrays, cpu=on(fine), tpu=on(kernel), default=on(large)
    )


def _goes_round(q_bnhe: jax.Array, k_bmhe: jax.Array) -> bool:
    """Whether the tokens of both are split over the ring."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_RING] == 1:
        return False
    layouts = (jax.typeof(x).sharding.spec for x in (q_bnhe, k_bmhe))
    return all(_RING in sharding.names(layout[1]) for layout in layouts)


def _named_reference(*given, name):
    return checkpoint_name(reference(*given), name)


def _score_bytes(q_bnhe: jax.Array, k_bmhe: jax.Array) -> int:
    """Bytes of all scores on one device."""
    b, n, h, _ = q_bnhe.shape
    devices = sharding.pieces(q_bnhe, (0, 1, 2))
    return 4 * b * n * h * k_bmhe.shape[1] // devices


def _visible(
    mask_bm: jax.Array | None,
    q_segments_bn: jax.Array | None,
    k_segments_bm: jax.Array | None,
) -> jax.Array | None:
    """Which keys a query sees: bool [b, n or 1, m]; None where it is all of them."""
    visible = None if mask_bm is None else mask_bm[:, None]
    if q_segments_bn is not None:
        same_bnm = q_segments_bn[:, :, None] == k_segments_bm[:, None]
        visible = same_bnm if visible is None else same_bnm & visible
    return visible


def _hide(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    """Lowers the scores of keys that are not seen."""
    # Finite, so that a row without any key stays free of NaN.
    low = jnp.finfo(jnp.float32).min
    return scores if visible is None else jnp.where(visible, scores, low)


def reference(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
) -> jax.Array:
    """`attention` with all scores at once; keys and values are whole."""
    scores_bhnm = jnp.einsum(
        "bnhe,bmhe->bhnm", q_bnhe, k_bmhe, preferred_element_type=jnp.float32
    )
    scores_bhnm = scores_bhnm * q_bnhe.shape[-1] ** -0.5
    visible = _visible(mask_bm, q_segments_bn, k_segments_bm)
    visible = None if visible is None else visible[:, None]
    weights_bhnm = jax.nn.softmax(_hide(scores_bhnm, visible), axis=-1)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_bhnm.astype(v_bmhe.dtype), v_bmhe)


def chunked(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    name: str = SAVED,
) -> jax.Array:
    """`attention` with the scores of a few queries at a time; keys and values are whole.

    Args:
      chunk_bytes: of scores that a device holds at a time. The gradient holds a small
        multiple of it.
      name: see `attention`.

    Every device works on the rows, queries and heads that it has, without asking any
    other; only the gradients of keys and values are summed, once, over the devices that
    share the queries of a row.
    """

    def run(q_bnhe, k_bmhe, v_bmhe, *seen):
        return _attend(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, name)

    return _by_device(
        run, (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    )


def _by_device(run, given, *, kernel: bool = False, keys: str | None = None):
    """Runs a form on each device's rows, queries and heads.

    Args:
      run: the form; keys and values are its second and third argument.
      given: arguments of `attention`.
      kernel: whether it is one; a kernel does not say over which axes results vary.
      keys: the mesh axis over which keys stay split; None where each device gets all.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run(*given)
    b, n, h, e = jax.typeof(given[0]).sharding.spec
    layouts = (jax.P(b, n, h, e), *(jax.P(b, keys, h, e),) * 2)
    layouts += (jax.P(b, keys), jax.P(b, n), jax.P(b, keys))
    layouts = [
        None if x is None else layout for x, layout in zip(given, layouts, strict=True)
    ]
    given = [
        x if x is None else jax.reshard(x, layout)
        for x, layout in zip(given, layouts, strict=True)
    ]
    axes = tuple(axis for axis in sharding.names(n) if axis != keys)

    def on_device(q, k, v, *visible):
        # The transpose of this is the sum of their gradients.
        if axes and not kernel:
            k, v = (jax.lax.pcast(x, axes, to="varying") for x in (k, v))
        return run(q, k, v, *visible)

    return jax.shard_map(
        on_device,
        in_specs=tuple(layouts),
        out_specs=layouts[0],
        check_vma=not kernel,
    )(*given)


@functools.partial(jax.custom_vjp, nondiff_argnames=("chunk_bytes", "name"))
def _attend(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, name):
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


_attend.defvjp(_attend_forward, _attend_backward)


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


def _scores(q_gce, k_gme, visible) -> jax.Array:
    scores_gcm = jnp.einsum(
        "gce,gme->gcm", q_gce, k_gme, preferred_element_type=jnp.float32
    )
    return _hide(scores_gcm * q_gce.shape[-1] ** -0.5, visible)


def _values(q_gne, k_gme, v_gme, seen, num_chunks, dtype):
    """Returns the result, and what the gradient needs: no scores, but their log sums.

    As two numbers a query, [g, n], the largest score and the sum of exp(score -
    largest), since the log sum of a row without any key would drown in its top.
    """
    mask_gm, q_segments_gn, k_segments_gm = seen

    def chunk(_, given):
        q_gce, q_segments_gc = given
        visible = _visible(mask_gm, q_segments_gc, k_segments_gm)
        scores_gcm = _scores(q_gce, k_gme, visible)
        top_gc1 = jnp.max(scores_gcm, axis=-1, keepdims=True)
        weights_gcm = jnp.exp(scores_gcm - top_gc1)
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
        visible = _visible(mask_gm, q_segments_gc, k_segments_gm)
        scores_gcm = _scores(q_gce, k_gme, visible)
        weights_gcm = jnp.exp(scores_gcm - top_gc1) * inverse_gc1
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
class ChunkBlocks:
    """Blocks of a ring in chunks, as `chunked` does it."""

    kernel: ClassVar[bool] = False
    chunk_bytes: int = CHUNK_BYTES

    def forward(self, q_bnhe, k_bmhe, v_bmhe, seen):
        return _forward(q_bnhe, k_bmhe, v_bmhe, seen, self.chunk_bytes, jnp.float32)

    def backward(self, *arrays_and_seen):
        *arrays, seen = arrays_and_seen
        return _backward(arrays, seen, self.chunk_bytes)


def splash(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    tile: int = splash_attention.TILE,
    interpret: bool = False,
    name: str = SAVED,
) -> jax.Array:
    """`attention` as JAX's splash kernel for TPUs; keys and values are whole.

    Segments hide scores and skip no tile. A query without any key gets the mean of some
    values.

    Args:
      tile: queries, and keys, that a core works on at a time, at most.
      interpret: runs the kernel's program on any platform, slowly.
      name: see `attention`.
    """

    def run(q_bnhe, k_bmhe, v_bmhe, *seen):
        return splash_attention.attend(
            q_bnhe, k_bmhe, v_bmhe, seen, tile, interpret, name
        )

    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    return _by_device(run, given, kernel=True)


def ring(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    blocks: ring_attention.Blocks = ChunkBlocks(),
    name: str = SAVED,
) -> jax.Array:
    """`attention` where keys and values go round over the `ring` axis of the mesh.

    Args:
      blocks: `ChunkBlocks` or `splash_attention.Blocks`: how to attend to one of them.
      name: see `attention`.
    """

    def on_device(q_bnhe, k_bmhe, v_bmhe, *seen):
        return ring_attention.attend(
            q_bnhe, k_bmhe, v_bmhe, seen, blocks=blocks, axis=_RING, name=name
        )

    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    return _by_device(on_device, given, kernel=blocks.kernel, keys=_RING)
