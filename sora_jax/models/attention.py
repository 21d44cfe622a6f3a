"""Attention behind one function, with an implementation for each kind of device.

`reference` holds the scores of all queries; where they are a few megabytes it is the
fastest. `chunked` holds the scores of a few queries at a time and recomputes them for
the gradient, so its memory grows with the number of keys, not with the product of keys
and queries. `splash` is JAX's kernel for TPUs and `cudnn` the one for NVIDIA GPUs; both
keep scores in on-chip memory. The choice follows from the shapes on a device and from
the platform that the program is lowered for, so it is known before the program runs.

Where a row's tokens are sharded, an all-to-all over the mesh axis `ulysses` exchanges
tokens for heads, and over `ring` the keys and values move from device to device
(`ring_attention`), block by block; each block is attended to in chunks or by the kernel.

Letters: b batch, n query tokens, m key tokens, h heads, e head size, g heads of keys and
values.
"""

import functools
from typing import NamedTuple

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

# Bytes of scores that a device holds at a time: enough to keep a GPU busy, and up to how
# many all are computed at once. See experiments/RESULTS.md, "Attention".
_LARGE_CHUNK_BYTES = 2**29  # not measured
_AT_ONCE_BYTES = 8 * 2**20
_MIN_QUERIES = 256  # a chunk exceeds its bytes before it has fewer queries
SAVED = "attention"  # the name by which remat policies save the results of attention
_ULYSSES, _RING = "ulysses", "ring"  # mesh axes


class Inputs(NamedTuple):
    """The arrays that `attention` and its implementations take, in their order."""

    q_bnhe: jax.Array
    k_bmhe: jax.Array
    v_bmhe: jax.Array
    mask_bm: jax.Array | None = None
    q_segments_bn: jax.Array | None = None
    k_segments_bm: jax.Array | None = None


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
        less than h, each of their heads serves h / g consecutive heads of queries
        (grouped queries, arXiv 2305.13245).
      mask_bm: True where a key may be attended to.
      q_segments_bn, k_segments_bm: segment ids; a query attends only to keys of its own
        segment.
      name: by which remat policies save the result and its log sums.

    Returns:
      [b, n, h, e] in the dtype of q. A query that may attend to no key gets the mean of
      the values.

    Where keys are sharded over tokens, an all-to-all over the `ulysses` axis exchanges
    tokens for heads if the heads divide (arXiv 2309.14509), and keys and values move
    around the `ring` axis if queries are sharded over it too (arXiv 2310.01889). Over
    other axes, such as `ulysses` where heads do not divide, keys and values are
    gathered. Text is replicated, and queries stay where they are.
    """
    inputs = Inputs(q_bnhe, k_bmge, v_bmge, mask_bm, q_segments_bn, k_segments_bm)
    group = q_bnhe.shape[2] // k_bmge.shape[2]
    attend = functools.partial(_attend_in_place, group=group, name=name)
    if group == 1:
        return _exchange_heads(attend, inputs)
    # Heads that share a key become tokens of one head, so that no implementation needs
    # to know of groups.
    spec = sharding.spec_like(q_bnhe)
    if q_segments_bn is not None:
        row_spec = sharding.spec_like(q_segments_bn)
        q_segments_bn = jnp.repeat(q_segments_bn, group, axis=1, out_sharding=row_spec)
    folded = _fold(q_bnhe, group, spec)
    inputs = inputs._replace(q_bnhe=folded, q_segments_bn=q_segments_bn)
    return _unfold(_exchange_heads(attend, inputs), group, spec)


def _fold(q_bnhe: jax.Array, group: int, spec) -> jax.Array:
    """Makes tokens of heads that share a key: [b, n, h, e] to [b, n group, g, e]."""
    b, n, h, e = q_bnhe.shape
    split = spec and jax.P(*spec[:3], None, spec[3])
    q = jnp.reshape(q_bnhe, (b, n, h // group, group, e), out_sharding=split)
    return jnp.reshape(
        q.swapaxes(2, 3), (b, n * group, h // group, e), out_sharding=spec
    )


def _unfold(y: jax.Array, group: int, spec) -> jax.Array:
    """Undoes `_fold`."""
    b, n, g, e = y.shape
    split = spec and jax.P(*spec[:2], None, *spec[2:])
    y = jnp.reshape(y, (b, n // group, group, g, e), out_sharding=split)
    return jnp.reshape(
        y.swapaxes(2, 3), (b, n // group, g * group, e), out_sharding=spec
    )


def _reshard(inputs: Inputs, specs: Inputs) -> Inputs:
    pairs = zip(inputs, specs, strict=True)
    return Inputs(*(x if x is None else jax.reshard(x, spec) for x, spec in pairs))


def _exchange_heads(attend, inputs: Inputs) -> jax.Array:
    """`attend` between two all-to-alls over `ulysses`, where heads divide over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_ULYSSES] == 1:
        return attend(*inputs)
    before, keys = (jax.typeof(x).sharding.spec for x in inputs[:2])
    rows, tokens, heads, _ = (sharding.mesh_axes(entry) for entry in before)
    shards = sharding.num_shards(mesh, heads) * mesh.shape[_ULYSSES]
    divides = inputs.q_bnhe.shape[2] % shards == 0
    if not divides or any(
        _ULYSSES not in sharding.mesh_axes(spec[1]) for spec in (before, keys)
    ):
        return attend(*inputs)
    tokens = tuple(name for name in tokens if name != _ULYSSES)
    after = jax.P(rows, tokens, (*heads, _ULYSSES), None)
    specs = Inputs(*(after,) * 3, jax.P(rows), *(jax.P(rows, tokens),) * 2)
    return jax.reshard(attend(*_reshard(inputs, specs)), before)


def _attend_in_place(*inputs, group: int, name: str) -> jax.Array:
    """`attention` without moving queries; keys, values and masks come to them."""
    inputs = Inputs(*inputs)
    q_bnhe, k_bmhe, v_bmhe, *masks = inputs
    in_ring = _is_in_ring(q_bnhe, k_bmhe)
    keys = k_bmhe.shape[1] // (sharding.array_shards(k_bmhe, (1,)) if in_ring else 1)
    sizes = _chunk_sizes(keys)
    if in_ring:
        small, kernel = ring, functools.partial(ring, blocks=splash_attention.Blocks())
        fine, large = (
            functools.partial(ring, blocks=chunked_attention.Blocks(size))
            for size in sizes
        )
    else:
        small, kernel = _named_reference, splash
        fine, large = (functools.partial(chunked, chunk_bytes=size) for size in sizes)
        gather = functools.partial(sharding.gather_axis, axis=1)
        inputs = inputs._replace(
            k_bmhe=gather(k_bmhe, like=q_bnhe), v_bmhe=gather(v_bmhe, like=q_bnhe)
        )
        if inputs.k_segments_bm is not None:
            segments_bm = gather(inputs.k_segments_bm, like=inputs.q_segments_bn)
            inputs = inputs._replace(k_segments_bm=segments_bm)
    if _score_bytes(q_bnhe, k_bmhe) <= _AT_ONCE_BYTES:
        return small(*inputs, name=name)
    if q_bnhe.shape[-1] not in splash_attention.HEAD_SIZES:
        kernel = large
    platforms = {"cpu": fine, "tpu": kernel, "default": large}
    if not in_ring and cudnn_attention.is_available():
        pairs = q_bnhe.shape[0] * q_bnhe.shape[1] // group * k_bmhe.shape[1]
        hidden = any(x is not None for x in masks) * pairs
        if cudnn_attention.supports(
            q_bnhe, hidden // sharding.array_shards(q_bnhe, (0, 1))
        ):
            platforms["cuda"] = functools.partial(cudnn, group=group)
    return jax.lax.platform_dependent(
        *inputs,
        **{key: functools.partial(run, name=name) for key, run in platforms.items()},
    )


def _chunk_sizes(keys: int) -> list[int]:
    """Bytes of scores that a CPU, and another device, holds at a time."""
    sizes = chunked_attention.BYTES, _LARGE_CHUNK_BYTES
    return [max(size, 4 * _MIN_QUERIES * keys) for size in sizes]


def workspace_bytes(
    q_bnhe: jax.ShapeDtypeStruct, keys: int, hidden: bool, platform: str
) -> int:
    """Estimates the bytes that `attention` holds beside its arguments and result.

    On one device, without gradients: scores and their exponentials, of all queries or of
    a chunk of them; for a kernel two numbers a query, and the mask.

    Args:
      q_bnhe: the queries.
      keys: keys of a row.
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
    if platform == "gpu" and cudnn_attention.is_available():
        if cudnn_attention.supports(q_bnhe, pairs):
            return 8 * b * n * h + 2 * pairs
    return 2 * min(scores, fine if platform == "cpu" else large)


def _is_in_ring(q_bnhe: jax.Array, k_bmhe: jax.Array) -> bool:
    """Whether the tokens of both are sharded over the ring."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_RING] == 1:
        return False
    specs = (jax.typeof(x).sharding.spec for x in (q_bnhe, k_bmhe))
    return all(_RING in sharding.mesh_axes(spec[1]) for spec in specs)


def _score_bytes(q_bnhe: jax.Array, k_bmhe: jax.Array) -> int:
    """Bytes of all scores on one device."""
    b, n, h, _ = q_bnhe.shape
    devices = sharding.array_shards(q_bnhe, (0, 1, 2))
    return 4 * b * n * h * k_bmhe.shape[1] // devices


def reference(*inputs: jax.Array | None) -> jax.Array:
    """`attention` with all scores at once; keys and values are not sharded.

    Args:
      inputs: `Inputs`, one after the other.
    """
    q_bnhe, k_bmhe, v_bmhe, *masks = Inputs(*inputs)
    scores_bhnm = jnp.einsum(
        "bnhe,bmhe->bhnm", q_bnhe, k_bmhe, preferred_element_type=jnp.float32
    )
    scores_bhnm = scores_bhnm * q_bnhe.shape[-1] ** -0.5
    visible = visibility.visible(*masks)
    visible = None if visible is None else visible[:, None]
    weights_bhnm = jax.nn.softmax(visibility.hide(scores_bhnm, visible), axis=-1)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_bhnm.astype(v_bmhe.dtype), v_bmhe)


def _named_reference(*inputs, name: str) -> jax.Array:
    return checkpoint_name(reference(*inputs), name)


def _map_devices(attend, inputs, *, kernel: bool = False, keys: str | None = None):
    """Runs `attend` on each device's rows, queries and heads.

    Args:
      attend: function of q, k, v and masks.
      inputs: `Inputs`, one after the other.
      kernel: whether it is a kernel, whose results do not tell over which axes they vary.
      keys: the mesh axis over which keys stay sharded; None where each device gets all.
    """
    inputs = Inputs(*inputs)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(*inputs[:3], inputs[3:])
    b, n, h, e = jax.typeof(inputs.q_bnhe).sharding.spec
    row = jax.P(b, keys)
    specs = Inputs(
        jax.P(b, n, h, e), *(jax.P(b, keys, h, e),) * 2, row, jax.P(b, n), row
    )
    axes = tuple(axis for axis in sharding.mesh_axes(n) if axis != keys)

    def on_device(q, k, v, *masks):
        # The transpose of this is the sum of their gradients.
        if axes and not kernel:
            k, v = (jax.lax.pcast(x, axes, to="varying") for x in (k, v))
        return attend(q, k, v, masks)

    return jax.shard_map(
        on_device,
        in_specs=tuple(specs),
        out_specs=specs.q_bnhe,
        check_vma=not kernel,
    )(*_reshard(inputs, specs))


def chunked(
    *inputs: jax.Array | None,
    chunk_bytes: int = chunked_attention.BYTES,
    name: str = SAVED,
) -> jax.Array:
    """`attention` with the scores of a few queries at a time; keys and values are whole.

    Args:
      inputs: `Inputs`, one after the other.
      chunk_bytes: bytes of scores that a device holds at a time. The gradient holds a
        small multiple of them.
      name: see `attention`.

    Every device works on its own rows, queries and heads without communication; only the
    gradients of keys and values are summed, once, over the devices that share the queries
    of a row.
    """
    attend = functools.partial(
        chunked_attention.attend, chunk_bytes=chunk_bytes, name=name
    )
    return _map_devices(attend, inputs)


def splash(
    *inputs: jax.Array | None,
    tiles: splash_attention.Tiles | None = None,
    interpret: bool = False,
    name: str = SAVED,
) -> jax.Array:
    """`attention` as JAX's splash kernel for TPUs; keys and values are whole.

    Segments mask scores and skip no tile. A query without any key gets the mean of some
    values, and gradients are right where nothing depends on it.

    Args:
      inputs: `Inputs`, one after the other.
      tiles: sizes of the tiles that a core works on; None: those of the device.
      interpret: runs the kernel's program on any platform, slowly.
      name: see `attention`.
    """
    tiles = tiles or splash_attention.tiles_for(inputs[0].shape[-1])
    attend = functools.partial(
        splash_attention.attend, tiles=tiles, interpret=interpret, name=name
    )
    return _map_devices(attend, inputs, kernel=True)


def cudnn(*inputs: jax.Array | None, group: int = 1, name: str = SAVED) -> jax.Array:
    """`attention` as cuDNN's kernel for NVIDIA GPUs; keys and values are whole.

    In half precision. A query without any key gets nearly the mean of the values, and
    gradients are right where nothing depends on it.

    Args:
      inputs: `Inputs`, one after the other.
      group: heads of queries that became tokens (`_fold`); the kernel takes them as
        heads, with one mask for all of them.
      name: see `attention`.
    """

    def attend(q_bnhe, k_bmhe, v_bmhe, masks):
        mask_bm, q_segments_bn, k_segments_bm = masks
        if q_segments_bn is not None:
            q_segments_bn = q_segments_bn[:, ::group]
        masks = mask_bm, q_segments_bn, k_segments_bm
        q_bnhe = _unfold(q_bnhe, group, None)
        y_bnhe = cudnn_attention.attend(q_bnhe, k_bmhe, v_bmhe, masks, name)
        return _fold(y_bnhe, group, None)

    return _map_devices(attend, inputs, kernel=True)


def ring(
    *inputs: jax.Array | None,
    blocks: ring_attention.Blocks = chunked_attention.Blocks(),
    name: str = SAVED,
) -> jax.Array:
    """`attention` where keys and values move around the `ring` axis of the mesh.

    Args:
      inputs: `Inputs`, one after the other.
      blocks: `Blocks` of `chunked_attention` or `splash_attention`: how a device attends
        to one block of keys and values.
      name: see `attention`.
    """
    attend = functools.partial(
        ring_attention.attend, blocks=blocks, axis=_RING, name=name
    )
    return _map_devices(attend, inputs, kernel=blocks.kernel, keys=_RING)
