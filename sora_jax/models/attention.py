"""Attention behind one function.

Four forms of the same mathematics. `reference` holds the scores of all queries; where
they are a few megabytes it is the fastest. `chunked` holds those of a few
queries at a time, so that its memory grows with the keys and not with their product
with the queries, and computes them again for the gradient. `splash` is JAX's kernel for
TPUs and `cudnn` that for NVIDIA GPUs, which never hold them outside of a core. Which one
runs follows from the shapes on a device and from what the program is lowered for, so it
is known before it runs.

Where a row's tokens are split over devices, heads are exchanged for tokens over the mesh
axis `ulysses`, and over `ring` the keys and values go round (`ring_attention`), block by
block; each is attended to in chunks or by the kernel.

Letters: b batch, n query tokens, m key tokens, h heads, e head size, g heads of keys and
values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.core import sharding
from sora_jax.models import (
    chunked_attention,
    cudnn_attention,
    ring_attention,
    splash_attention,
    visibility,
)

# Scores that a device holds at a time: what keeps a GPU busy; up to so many are all
# computed at once. See experiments/RESULTS.md, "Attention".
_LARGE_CHUNK_BYTES = 2**29  # not measured
_AT_ONCE_BYTES = 8 * 2**20
_MIN_QUERIES = 256  # a chunk has more scores before it has fewer queries
SAVED = "attention"  # what remat policies call the results that are dear to compute
_EXCHANGED = "ulysses"  # the mesh axis over which heads and tokens change places
_RING = "ring"  # the mesh axis over which keys and values go round


def attention(
    q_bnhe: jax.Array,
    k_bmge: jax.Array,
    v_bmge: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    name: str = SAVED,
) -> jax.Array:
    """softmax(q k^T / sqrt(e)) v, softmax in float32 (arXiv 1706.03762).

    Args:
      q_bnhe, k_bmge, v_bmge: queries, keys and values, in the compute dtype. Where g is
        less than h, each of their heads serves h / g heads of queries that follow one
        another (arXiv 2305.13245).
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
    group = q_bnhe.shape[2] // k_bmge.shape[2]
    form = functools.partial(_attend_split, group=group, name=name)
    if group == 1:
        return _exchanged(
            form, q_bnhe, k_bmge, v_bmge, mask_bm, q_segments_bn, k_segments_bm
        )
    # Queries of heads that share a key are more queries of one head: no form need know.
    layout = sharding.spec_like(q_bnhe)
    if q_segments_bn is not None:
        of_row = sharding.spec_like(q_segments_bn)
        q_segments_bn = jnp.repeat(q_segments_bn, group, axis=1, out_sharding=of_row)
    folded = _fold(q_bnhe, group, layout)
    y = _exchanged(form, folded, k_bmge, v_bmge, mask_bm, q_segments_bn, k_segments_bm)
    return _unfold(y, group, layout)


def _fold(q_bnhe: jax.Array, group: int, layout) -> jax.Array:
    """Heads that share a key become tokens: [b, n, h, e] to [b, n group, g, e]."""
    b, n, h, e = q_bnhe.shape
    apart = layout and jax.P(*layout[:3], None, layout[3])
    q = jnp.reshape(q_bnhe, (b, n, h // group, group, e), out_sharding=apart)
    return jnp.reshape(
        q.swapaxes(2, 3), (b, n * group, h // group, e), out_sharding=layout
    )


def _unfold(y: jax.Array, group: int, layout) -> jax.Array:
    """Undoes `_fold`."""
    b, n, g, e = y.shape
    apart = layout and jax.P(*layout[:2], None, *layout[2:])
    y = jnp.reshape(y, (b, n // group, group, g, e), out_sharding=apart)
    return jnp.reshape(
        y.swapaxes(2, 3), (b, n // group, g * group, e), out_sharding=layout
    )


def _exchanged(form, q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm):
    """`form` with the tokens of a part of the heads, in place of all heads of a part."""
    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_EXCHANGED] == 1:
        return form(*given)
    before, keys = (jax.typeof(x).sharding.spec for x in (q_bnhe, k_bmhe))
    rows, tokens, heads, _ = (sharding.mesh_axes(entry) for entry in before)
    left = q_bnhe.shape[2] % (sharding.num_shards(mesh, heads) * mesh.shape[_EXCHANGED])
    if (
        left
        or _EXCHANGED not in tokens
        or _EXCHANGED not in sharding.mesh_axes(keys[1])
    ):
        return form(*given)
    tokens = tuple(name for name in tokens if name != _EXCHANGED)
    after = jax.P(rows, tokens, (*heads, _EXCHANGED), None)
    layouts = (*(after,) * 3, jax.P(rows), *(jax.P(rows, tokens),) * 2)
    given = (
        None if x is None else jax.reshard(x, layout)
        for x, layout in zip(given, layouts, strict=True)
    )
    return jax.reshard(form(*given), before)


def _attend_split(
    q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm, group, name
):
    """`attention` where queries are; keys, values and what hides them come there."""
    goes_round = _goes_round(q_bnhe, k_bmhe)
    keys = k_bmhe.shape[1] // (sharding.array_shards(k_bmhe, (1,)) if goes_round else 1)
    sizes = _chunk_sizes(keys)
    if goes_round:
        small, kernel = ring, functools.partial(ring, blocks=splash_attention.Blocks())
        fine, large = (
            functools.partial(ring, blocks=chunked_attention.Blocks(size))
            for size in sizes
        )
    else:
        small, kernel = _named_reference, splash
        fine, large = (functools.partial(chunked, chunk_bytes=size) for size in sizes)
        k_bmhe = sharding.gather_axis(k_bmhe, 1, like=q_bnhe)
        v_bmhe = sharding.gather_axis(v_bmhe, 1, like=q_bnhe)
        if k_segments_bm is not None:
            k_segments_bm = sharding.gather_axis(k_segments_bm, 1, like=q_segments_bn)
    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    if _score_bytes(q_bnhe, k_bmhe) <= _AT_ONCE_BYTES:
        return small(*given, name=name)
    if q_bnhe.shape[-1] not in splash_attention.HEAD_SIZES:
        kernel = large
    there = [x is not None for x in given]

    def on(form):
        def run(*arrays):
            arrays = iter(arrays)
            return form(*(next(arrays) if x else None for x in there), name=name)

        return run

    arrays = [x for x in given if x is not None]
    forms = {"cpu": fine, "tpu": kernel, "default": large}
    if not goes_round and cudnn_attention.there():
        pairs = q_bnhe.shape[0] * q_bnhe.shape[1] // group * k_bmhe.shape[1]
        hidden = any(there[3:]) * pairs // sharding.array_shards(q_bnhe, (0, 1))
        if cudnn_attention.takes(q_bnhe, hidden):
            forms["cuda"] = functools.partial(cudnn, group=group)
    forms = {platform: on(form) for platform, form in forms.items()}
    return jax.lax.platform_dependent(*arrays, **forms)


def _chunk_sizes(keys: int) -> list[int]:
    """Bytes of scores that a CPU, and another device, holds at a time."""
    sizes = chunked_attention.BYTES, _LARGE_CHUNK_BYTES
    return [max(size, 4 * _MIN_QUERIES * keys) for size in sizes]


def held_bytes(
    q_bnhe: jax.ShapeDtypeStruct, keys: int, hidden: bool, platform: str
) -> int:
    """Bytes that the form which `attention` chooses holds beside its arrays, about.

    On one device, without gradients: scores and their exponentials, of all queries or of
    a chunk of them; of a kernel two numbers a query and what hides keys.

    Args:
      q_bnhe: the queries.
      keys: of a row.
      hidden: whether some are hidden by a mask or segments.
      platform: "cpu", "tpu" or "gpu".
    """
    b, n, h, e = q_bnhe.shape
    scores = 4 * b * n * h * keys
    if scores <= _AT_ONCE_BYTES:
        return 2 * scores
    fine, large = _chunk_sizes(keys)
    pairs = hidden * b * n * keys
    if platform == "tpu" and e in splash_attention.HEAD_SIZES:
        return 8 * b * n * h
    if platform == "gpu" and cudnn_attention.there():
        if cudnn_attention.takes(q_bnhe, pairs):
            return 8 * b * n * h + 2 * pairs
    return 2 * min(scores, fine if platform == "cpu" else large)


def _goes_round(q_bnhe: jax.Array, k_bmhe: jax.Array) -> bool:
    """Whether the tokens of both are split over the ring."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_RING] == 1:
        return False
    layouts = (jax.typeof(x).sharding.spec for x in (q_bnhe, k_bmhe))
    return all(_RING in sharding.mesh_axes(layout[1]) for layout in layouts)


def _named_reference(*given, name):
    return checkpoint_name(reference(*given), name)


def _score_bytes(q_bnhe: jax.Array, k_bmhe: jax.Array) -> int:
    """Bytes of all scores on one device."""
    b, n, h, _ = q_bnhe.shape
    devices = sharding.array_shards(q_bnhe, (0, 1, 2))
    return 4 * b * n * h * k_bmhe.shape[1] // devices


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
    visible = visibility.visible(mask_bm, q_segments_bn, k_segments_bm)
    visible = None if visible is None else visible[:, None]
    weights_bhnm = jax.nn.softmax(visibility.hide(scores_bhnm, visible), axis=-1)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_bhnm.astype(v_bmhe.dtype), v_bmhe)


def chunked(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    chunk_bytes: int = chunked_attention.BYTES,
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
        return chunked_attention.attend(q_bnhe, k_bmhe, v_bmhe, seen, chunk_bytes, name)

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
    axes = tuple(axis for axis in sharding.mesh_axes(n) if axis != keys)

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


def splash(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    tiles: splash_attention.Tiles | None = None,
    interpret: bool = False,
    name: str = SAVED,
) -> jax.Array:
    """`attention` as JAX's splash kernel for TPUs; keys and values are whole.

    Segments hide scores and skip no tile. A query without any key gets the mean of some
    values, and gradients are right where nothing depends on it.

    Args:
      tiles: that a core works on at a time; None: those of the device.
      interpret: runs the kernel's program on any platform, slowly.
      name: see `attention`.
    """

    def run(q_bnhe, k_bmhe, v_bmhe, *seen):
        chosen = tiles or splash_attention.tiles_for(q_bnhe.shape[-1])
        return splash_attention.attend(
            q_bnhe, k_bmhe, v_bmhe, seen, chosen, interpret, name
        )

    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    return _by_device(run, given, kernel=True)


def cudnn(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
    *,
    group: int = 1,
    name: str = SAVED,
) -> jax.Array:
    """`attention` as cuDNN's kernel for NVIDIA GPUs; keys and values are whole.

    In half precision. A query without any key gets nearly the mean of the values, and
    gradients are right where nothing depends on it.

    Args:
      group: heads of queries that became tokens (`_fold`); the kernel takes them as
        heads, and what hides keys once for all of them.
      name: see `attention`.
    """

    def run(q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm):
        if q_segments_bn is not None:
            q_segments_bn = q_segments_bn[:, ::group]
        seen = mask_bm, q_segments_bn, k_segments_bm
        q_bnhe = _unfold(q_bnhe, group, None)
        y_bnhe = cudnn_attention.attend(q_bnhe, k_bmhe, v_bmhe, seen, name)
        return _fold(y_bnhe, group, None)

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
    blocks: ring_attention.Blocks = chunked_attention.Blocks(),
    name: str = SAVED,
) -> jax.Array:
    """`attention` where keys and values go round over the `ring` axis of the mesh.

    Args:
      blocks: `Blocks` of `chunked_attention` or `splash_attention`: how to attend to one of them.
      name: see `attention`.
    """

    def on_device(q_bnhe, k_bmhe, v_bmhe, *seen):
        return ring_attention.attend(
            q_bnhe, k_bmhe, v_bmhe, seen, blocks=blocks, axis=_RING, name=name
        )

    given = (q_bnhe, k_bmhe, v_bmhe, mask_bm, q_segments_bn, k_segments_bm)
    return _by_device(on_device, given, kernel=blocks.kernel, keys=_RING)
