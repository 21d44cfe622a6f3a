"""Ring attention: queries stay, keys and values go round (arXiv 2310.01889).

Of a row whose tokens are split over the devices of a ring, each device attends with its
own queries to one block of keys and values after the other, and the results are merged
by the sums of their weights. The next block is on its way while one is computed, so a
device holds two of them, however long the row is. The gradient lets the blocks go round
once more, followed by the sums of their gradients; it computes the weights again, from
what the forward pass kept of each query: the result, the largest score of all blocks
and the sum of the weights.

How a block is attended to is a form of `Blocks`; the forms are those of `attention`.

Letters: b batch, n query tokens, m key tokens of a block, h heads, e head size.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.models.visibility import Seen


class Blocks(Protocol):
    """Attention to one block of keys and values, on one device; hashable."""

    def forward(
        self, q_bnhe: jax.Array, k_bmhe: jax.Array, v_bmhe: jax.Array, seen: Seen
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the result [b, n, h, e] of softmax within the block, the largest
        score [b, n, h], and the sum [b, n, h] of exp(score - largest); float32.
        """

    def backward(
        self, q_bnhe: jax.Array, k_bmhe: jax.Array, v_bmhe: jax.Array,
        y_bnhe: jax.Array, top_bnh: jax.Array, sum_bnh: jax.Array, dy_bnhe: jax.Array,
        seen: Seen,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Returns the block's part in the gradients of q, k and v, float32; result,
        largest score and sum are those of all blocks.
        """


@functools.partial(jax.custom_vjp, nondiff_argnames=("blocks", "axis", "name"))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    seen: Seen,
    blocks: Blocks,
    axis: str,
    name: str,
) -> jax.Array:
    """Attention to the keys and values of all devices of a ring; within `shard_map`.

    Args:
      q_bnhe, k_bmhe, v_bmhe, seen: what this device has.
      blocks: how to attend to one block.
      axis: the mesh axis of the ring.
      name: what remat policies call what the gradient needs beside the arguments.

    Returns:
      [b, n, h, e] in the dtype of q.
    """
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, blocks, axis, name)[0]


def _send(block, axis: str):
    """Hands arrays on to the next device of the ring."""
    size = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), block)


def _merge(one, other):
    """Softmax over two sets of keys from that over each: (result, largest score, sum).

    Largest score and sum are two numbers: of a query that sees no key the scores are so
    low that the logarithm of the sum would drown, and all its values weigh the same.
    """
    (y_bnhe, top_bnh, sum_bnh), (more_bnhe, more_top_bnh, more_sum_bnh) = one, other
    highest_bnh = jnp.maximum(top_bnh, more_top_bnh)
    sum_bnh = sum_bnh * jnp.exp(top_bnh - highest_bnh)
    more_sum_bnh = more_sum_bnh * jnp.exp(more_top_bnh - highest_bnh)
    total_bnh = sum_bnh + more_sum_bnh
    y_bnhe = y_bnhe * (sum_bnh / total_bnh)[..., None]
    y_bnhe = y_bnhe + more_bnhe * (more_sum_bnh / total_bnh)[..., None]
    return y_bnhe, highest_bnh, total_bnh


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, blocks, axis, name):
    mask_bm, q_segments_bn, k_segments_bm = seen

    def visit(block, merged):
        k_bmhe, v_bmhe, mask_bm, k_segments_bm = block
        seen = mask_bm, q_segments_bn, k_segments_bm
        return _merge(merged, blocks.forward(q_bnhe, k_bmhe, v_bmhe, seen))

    def step(carry, _):
        block, merged = carry
        following = _send(block, axis)  # does not wait for what comes next
        return (following, visit(block, merged)), None

    y_bnhe = jnp.zeros_like(q_bnhe, jnp.float32)
    sum_bnh = y_bnhe[..., 0]
    nothing = y_bnhe, sum_bnh + jnp.finfo(jnp.float32).min, sum_bnh
    carry = (k_bmhe, v_bmhe, mask_bm, k_segments_bm), nothing
    steps = jax.lax.axis_size(axis) - 1
    (block, merged), _ = jax.lax.scan(step, carry, length=steps)
    y_bnhe, top_bnh, sum_bnh = visit(block, merged)  # the last one is sent nowhere
    kept = y_bnhe.astype(q_bnhe.dtype), top_bnh, sum_bnh
    kept = tuple(checkpoint_name(x, name) for x in kept)
    return kept[0], (q_bnhe, k_bmhe, v_bmhe, seen, kept)


def _attend_backward(blocks, axis, name, saved, dy_bnhe):
    del name
    q_bnhe, k_bmhe, v_bmhe, (mask_bm, q_segments_bn, k_segments_bm), kept = saved

    def visit(block):
        k_bmhe, v_bmhe, mask_bm, k_segments_bm = block
        seen = mask_bm, q_segments_bn, k_segments_bm
        return blocks.backward(q_bnhe, k_bmhe, v_bmhe, *kept, dy_bnhe, seen)

    def step(carry, _):
        block, dq_bnhe, *sums = carry
        # A block's gradients follow it one step behind, so neither waits to be sent. The
        # last send of a block is for nothing, and beside computation.
        following, sums = _send((block, sums), axis)
        more_dq_bnhe, *more = visit(block)
        sums = (one + other for one, other in zip(sums, more, strict=True))
        return (following, dq_bnhe + more_dq_bnhe, *sums), None

    block = k_bmhe, v_bmhe, mask_bm, k_segments_bm
    carry = _send(block, axis), *visit(block)
    steps = jax.lax.axis_size(axis) - 1
    (_, dq_bnhe, *sums), _ = jax.lax.scan(step, carry, length=steps)
    dk_bmhe, dv_bmhe = _send(sums, axis)  # one more step, and they are at home
    return (
        dq_bnhe.astype(q_bnhe.dtype),
        dk_bmhe.astype(k_bmhe.dtype),
        dv_bmhe.astype(v_bmhe.dtype),
        None,
    )


attend.defvjp(_attend_forward, _attend_backward)
