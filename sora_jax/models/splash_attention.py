"""JAX's splash kernel for TPUs on one device, alone and for the blocks of a ring.

It attends to tiles of keys and values that fit into a core's VMEM (arXiv 2205.14135) and
keeps scores there. Its public gradient accepts neither log sums of other blocks nor a
head at a time, so a private function of JAX is called; tests compare its results with the
reference.

Letters: b batch, n query tokens, m key tokens, h heads, e head size.
"""

import dataclasses
import functools
import json
import pathlib
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from sora_jax.models.visibility import Masks

HEAD_SIZES = (128, 256)  # whole lanes, and tiles that fit into VMEM


class Tiles(NamedTuple):
    """The most queries and keys of a tile of scores: forward pass, and gradient."""

    value: tuple[int, int] = (1024, 1024)
    gradient: tuple[int, int] = (1024, 1024)


# Kind of device -> head size -> tiles; written by `python -m experiments.tile_search`.
TABLE = pathlib.Path(__file__).with_name("splash_tiles.json")
_FETCHED = 2  # tiles of keys that are copied to VMEM at a time
_LANES = 128


@functools.cache
def _table() -> dict[tuple[str, int], Tiles]:
    return {
        (kind, int(size)): Tiles(tuple(entry["value"]), tuple(entry["gradient"]))
        for kind, sizes in json.loads(TABLE.read_text()).items()
        for size, entry in sizes.items()
    }


def tiles_for(head_size: int) -> Tiles:
    """Returns the tiles for the devices that are traced for, or the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.local_devices()[0]
    return _table().get((getattr(device, "device_kind", ""), head_size), Tiles())


@functools.partial(jax.custom_vjp, nondiff_argnames=("tiles", "interpret", "name"))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    masks: Masks,
    tiles: Tiles,
    interpret: bool,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; arguments as those of `Blocks` and of `attention`."""
    kernel, arrays = _kernel(q_bnhe, k_bmhe, v_bmhe, masks, tiles.value, interpret)
    return _tokens_first(jax.vmap(kernel)(*arrays), q_bnhe.shape[1])


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, tiles, interpret, name):
    results = _forward(q_bnhe, k_bmhe, v_bmhe, masks, tiles.value, interpret)
    saved = tuple(checkpoint_name(x, name) for x in results)
    return saved[0], (q_bnhe, k_bmhe, v_bmhe, *saved, masks)


def _attend_backward(tiles, interpret, name, saved, dy_bnhe):
    del name
    *arrays, masks = saved
    return *_backward(*arrays, dy_bnhe, masks, tiles.gradient, interpret), None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q_bnhe, k_bmhe, v_bmhe, masks, tile, interpret):
    """Returns the result [b, n, h, e] and the log sum of exp(scores) [b, n, h]."""
    kernel, arrays = _kernel(
        q_bnhe, k_bmhe, v_bmhe, masks, tile, interpret, save_residuals=True
    )
    y_bhne, (log_sum_bhn,) = jax.vmap(kernel)(*arrays)
    size = q_bnhe.shape[1]
    return _tokens_first(y_bhne, size), _tokens_first(log_sum_bhn, size)


def _backward(
    q_bnhe, k_bmhe, v_bmhe, y_bnhe, log_sum_bnh, dy_bnhe, masks, tile, interpret
):
    """Returns the gradients of q, k and v in their dtypes, with one kernel call a head.

    The fused kernel computes the weights once for all three, and writes a partial
    gradient of q for each fetch of keys, to be added up. Those of one head are small;
    those of all heads would not fit beside a model.
    """
    kernel, (*arrays, ids) = _kernel(
        q_bnhe, k_bmhe, v_bmhe, masks, tile, interpret, heads=1
    )
    of_queries = y_bnhe, log_sum_bnh, dy_bnhe
    arrays += (_heads_first(x, arrays[0].shape[2]) for x in of_queries)

    def row(arrays, ids):
        def head(arrays):
            q_ne, k_me, v_me, y_ne, log_sum_n, dy_ne = (x[None] for x in arrays)
            saved = q_ne, k_me, v_me, ids, None, y_ne, log_sum_n
            saved += kernel.dq_mask_info, kernel.dkv_mask_info
            gradients = splash_attention_kernel._splash_attention_bwd(
                **kernel.kwargs, res=saved, do=dy_ne
            )[3:6]
            return [x[0] for x in gradients]

        return jax.lax.map(head, arrays)

    gradients = jax.vmap(row)(arrays, ids)
    sizes = q_bnhe.shape[1], *(k_bmhe.shape[1],) * 2
    dq_bnhe, dk_bmhe, dv_bmhe = map(_tokens_first, gradients, sizes)
    return (q_bnhe.shape[-1] ** -0.5 * dq_bnhe).astype(q_bnhe.dtype), dk_bmhe, dv_bmhe


def _heads_first(x_bnh: jax.Array, size: int) -> jax.Array:
    """Swaps tokens and heads, and pads with zeros to `size` tokens."""
    edges = [(0, 0)] * x_bnh.ndim
    edges[2] = 0, size - x_bnh.shape[1]
    return jnp.pad(x_bnh.swapaxes(1, 2), edges)


def _tokens_first(x_bhn: jax.Array, size: int) -> jax.Array:
    """Undoes `_heads_first`."""
    return x_bhn[:, :, :size].swapaxes(1, 2)


def _kernel(
    q_bnhe, k_bmhe, v_bmhe, masks, tile, interpret, heads: int | None = None, **options
):
    """Returns the kernel for arrays of these sizes, and its arguments, rows first.

    Args:
      heads: heads of a call; by default all that the arrays have.
    """
    (b, n, h, e), m = q_bnhe.shape, k_bmhe.shape[1]
    mask_bm, q_segments_bn, k_segments_bm = masks

    def cut(size: int, tile: int, together: int) -> tuple[int, int]:
        """Returns the size of a tile, and `size` rounded up to whole groups of tiles."""
        count = -(-size // (tile * together)) * together
        fitting = -(-size // (count * _LANES)) * _LANES
        return fitting, count * fitting

    fetched = _FETCHED if m > tile[1] else 1
    (tile_n, all_n), (tile_m, all_m) = cut(n, tile[0], 1), cut(m, tile[1], fetched)
    ids = None
    if all_n > n or all_m > m or mask_bm is not None or q_segments_bn is not None:
        q_ids_bn = jnp.zeros((b, n), jnp.int32)
        k_ids_bm = jnp.zeros((b, m), jnp.int32)
        if q_segments_bn is not None:
            q_ids_bn, k_ids_bm = q_segments_bn, k_segments_bm
        low = jnp.iinfo(jnp.int32).min  # no segment has this id
        if mask_bm is not None:
            k_ids_bm = jnp.where(mask_bm, k_ids_bm, low)
        ids = splash_attention.SegmentIds(
            jnp.pad(q_ids_bn, ((0, 0), (0, all_n - n))),
            jnp.pad(k_ids_bm, ((0, 0), (0, all_m - m)), constant_values=low),
        )
    q_bnhe = (q_bnhe * e**-0.5).astype(q_bnhe.dtype)
    mask = [splash_attention.FullMask((all_n, all_m))] * (heads or h)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask(mask),
        block_sizes=splash_attention.BlockSizes(
            block_q=tile_n,
            block_kv=fetched * tile_m,
            block_kv_compute=tile_m,
            block_q_dkv=tile_n,
            block_kv_dkv=fetched * tile_m,
            block_kv_dkv_compute=tile_m,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        **options,
    )
    qkv = zip((q_bnhe, k_bmhe, v_bmhe), (all_n, all_m, all_m), strict=True)
    return kernel, (*(_heads_first(*pair) for pair in qkv), ids)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a ring, attended to by the kernel for TPUs.

    Args:
      tiles: sizes of the tiles that a core works on; None: those of the device.
      interpret: runs the kernel's program on any platform, slowly.
    """

    kernel: ClassVar[bool] = True
    tiles: Tiles | None = None
    interpret: bool = False

    def forward(self, q_bnhe, k_bmhe, v_bmhe, masks):
        tile = (self.tiles or tiles_for(q_bnhe.shape[-1])).value
        y_bnhe, log_sum_bnh = _forward(
            q_bnhe, k_bmhe, v_bmhe, masks, tile, self.interpret
        )
        return y_bnhe.astype(jnp.float32), log_sum_bnh, jnp.ones_like(log_sum_bnh)

    def backward(
        self, q_bnhe, k_bmhe, v_bmhe, y_bnhe, top_bnh, sum_bnh, dy_bnhe, masks
    ):
        tile = (self.tiles or tiles_for(q_bnhe.shape[-1])).gradient
        log_sum_bnh = top_bnh + jnp.log(sum_bnh)
        gradients = _backward(
            q_bnhe,
            k_bmhe,
            v_bmhe,
            y_bnhe,
            log_sum_bnh,
            dy_bnhe,
            masks,
            tile,
            self.interpret,
        )
        return tuple(x.astype(jnp.float32) for x in gradients)
