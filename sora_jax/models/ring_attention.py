"""Ring attention: queries stay, keys and values move around (arXiv 2310.01889).

Where the tokens of a row are sharded over the devices of a ring, each device attends with
its own queries to one block of keys and values after the other, and the results are
merged by the sums of their weights. The next block is sent while one is computed, so a
device holds two blocks, however long the row is. For the gradient the blocks move around
once more, followed by the sums of their gradients; the weights are recomputed from what
the forward pass saved for each query: the result, the largest score of all blocks and the
sum of the weights.

`Blocks` says how a device attends to one block: in chunks, or with a kernel.

Letters: b batch, n query tokens, m key tokens of a block, h heads, e head size.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.models.visibility import Masks


class Blocks(Protocol):
    """Attention to one block of keys and values, on one device; hashable."""

    def forward(
        self, q_bnhe: jax.Array, k_bmhe: jax.Array, v_bmhe: jax.Array, masks: Masks
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the result [b, n, h, e] of softmax within the block, the largest
        score [b, n, h], and the sum [b, n, h] of exp(score - largest); float32.
        """

    def backward(
        self,
        q_bnhe: jax.Array,
        k_bmhe: jax.Array,
        v_bmhe: jax.Array,
        y_bnhe: jax.Array,
        top_bnh: jax.Array,
        sum_bnh: jax.Array,
        dy_bnhe: jax.Array,
        masks: Masks,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the block's part of the gradients of q, k and v, float32; result,
        largest score and sum are those of all blocks.
        """


@functools.partial(jax.custom_vjp, nondiff_argnames=("blocks", "axis", "name"))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    masks: Masks,
    blocks: Blocks,
    axis: str,
    name: str,
) -> jax.Array:
    """Attention to the keys and values of all devices of a ring; within `shard_map`.

    Args:
      q_bnhe, k_bmhe, v_bmhe, masks: the shards of this device.
      blocks: how to attend to one block.
      axis: the mesh axis of the ring.
      name: by which remat policies save what the gradient needs beside the arguments.

    Returns:
      [b, n, h, e] in the dtype of q.
    """
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, blocks, axis, name)[0]


def _send(block, axis: str):
    """Sends arrays to the next device of the ring."""
    size = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), block)


def _merge(one, other):
    """Merges the softmax over two sets of keys: (result, largest score, sum) of each.

    Largest score and sum are two numbers because the scores of a query without any key
    are so low that adding the logarithm of the sum to them would round it away.
    """
    (y_bnhe, top_bnh, sum_bnh), (more_bnhe, more_top_bnh, more_sum_bnh) = one, other
    highest_bnh = jnp.maximum(top_bnh, more_top_bnh)
    sum_bnh = sum_bnh * jnp.exp(top_bnh - highest_bnh)
    more_sum_bnh = more_sum_bnh * jnp.exp(more_top_bnh - highest_bnh)
    total_bnh = sum_bnh + more_sum_bnh
    y_bnhe = y_bnhe * (sum_bnh / total_bnh)[..., None]
    y_bnhe = y_bnhe + more_bnhe * (more_sum_bnh / total_bnh)[..., None]
    return y_bnhe, highest_bnh, total_bnh


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, blocks, axis, name):
    mask_bm, q_segments_bn, k_segments_bm = masks

    def visit(block, merged):
        k_bmhe, v_bmhe, mask_bm, k_segments_bm = block
        masks = mask_bm, q_segments_bn, k_segments_bm
        return _merge(merged, blocks.forward(q_bnhe, k_bmhe, v_bmhe, masks))

    def step(carry, _):
        block, merged = carry
        following = _send(block, axis)  # overlaps with the computation below
        return (following, visit(block, merged)), None

    y_bnhe = jnp.zeros_like(q_bnhe, jnp.float32)
    sum_bnh = y_bnhe[..., 0]
    empty = y_bnhe, sum_bnh + jnp.finfo(jnp.float32).min, sum_bnh
    carry = (k_bmhe, v_bmhe, mask_bm, k_segments_bm), empty
    steps = jax.lax.axis_size(axis) - 1
    (block, merged), _ = jax.lax.scan(step, carry, length=steps)
    y_bnhe, top_bnh, sum_bnh = visit(block, merged)  # the last block is not sent on
    results = y_bnhe.astype(q_bnhe.dtype), top_bnh, sum_bnh
    saved = tuple(checkpoint_name(x, name) for x in results)
    return saved[0], (q_bnhe, k_bmhe, v_bmhe, masks, saved)


def _attend_backward(blocks, axis, name, saved, dy_bnhe):
    del name
    q_bnhe, k_bmhe, v_bmhe, (mask_bm, q_segments_bn, k_segments_bm), results = saved

    def visit(block):
        k_bmhe, v_bmhe, mask_bm, k_segments_bm = block
        masks = mask_bm, q_segments_bn, k_segments_bm
        return blocks.backward(q_bnhe, k_bmhe, v_bmhe, *results, dy_bnhe, masks)

    def step(carry, _):
        block, dq_bnhe, *sums = carry
        # A block's gradients follow it one step later, so that neither send waits. The
        # last send of a block is not used, and overlaps with computation.
        following, sums = _send((block, sums), axis)
        more_dq_bnhe, *more = visit(block)
        sums = (one + other for one, other in zip(sums, more, strict=True))
        return (following, dq_bnhe + more_dq_bnhe, *sums), None

    block = k_bmhe, v_bmhe, mask_bm, k_segments_bm
    carry = _send(block, axis), *visit(block)
    steps = jax.lax.axis_size(axis) - 1
    (_, dq_bnhe, *sums), _ = jax.lax.scan(step, carry, length=steps)
    dk_bmhe, dv_bmhe = _send(sums, axis)  # one more step returns them to their owner
    return (
        dq_bnhe.astype(q_bnhe.dtype),
        dk_bmhe.astype(k_bmhe.dtype),
        dv_bmhe.astype(v_bmhe.dtype),
        None,
    )


attend.defvjp(_attend_forward, _attend_backward)
