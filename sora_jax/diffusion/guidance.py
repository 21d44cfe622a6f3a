"""The null condition, and classifier-free guidance (Ho & Salimans 2022, 2207.12598).

A condition is any pytree of arrays whose first axis is the row (token ids and mask,
encoder states, ...). The same function replaces it by the null condition in training
(dropout) and in sampling (guidance), so the two cannot drift apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax.core import sharding

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
ConditionedVelocity = Callable[[jax.Array, jax.Array, Any], jax.Array]


def null_condition(condition: Any, null: Any, drop_b: jax.Array) -> Any:
    """`condition`, with `null` in its place for the rows where drop_b is true.

    Args:
      condition: a pytree of arrays [b, ...].
      null: the same tree; its leaves have b rows, or one row for all.
      drop_b: bool [b].
    """

    def pick(given, empty):
        drop = drop_b.reshape(drop_b.shape + (1,) * (given.ndim - 1))
        return jnp.where(drop, empty.astype(given.dtype), given)

    return jax.tree.map(pick, condition, null)


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows a0 b0 a1 b1 ...: both halves of a pair stay on the device of the row."""
    pairs = jnp.stack([first, second], axis=1)
    shape = (2 * first.shape[0], *first.shape[1:])
    return jnp.reshape(pairs, shape, out_sharding=sharding.spec_like(first))


def _deinterleave(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_interleave`."""
    layout = sharding.spec_like(pairs)
    if layout is not None:
        layout = jax.P(*layout[:1], None, *layout[1:])
    shape = (pairs.shape[0] // 2, 2, *pairs.shape[1:])
    pairs = jnp.reshape(pairs, shape, out_sharding=layout)
    return pairs[:, 0], pairs[:, 1]


def rescaled(
    guided: jax.Array,
    with_text: jax.Array,
    share: jax.Array | float,
    held: jax.Array | None = None,
) -> jax.Array:
    """Rescales a guided velocity towards the deviation of the one with the text.

    Guidance makes velocities larger, and videos too bright and too rich in contrast.
    With s the standard deviation over a row (Lin et al. 2023, arXiv:2305.08891,
    section 3.4; diffusers' guidance_rescale):

        share s(with_text) / s(guided) guided + (1 - share) guided

    Args:
      guided, with_text: [b, ...].
      share: 0 changes nothing; the paper takes 0.7.
      held: bool, its shape a leading part of theirs; these entries do not count, as
        their velocity is not used and was not learned.
    """
    axes = tuple(range(1, guided.ndim))
    free = jnp.ones_like(guided)
    if held is not None:
        held = held.reshape(held.shape + (1,) * (guided.ndim - held.ndim))
        free = jnp.where(held, 0.0, free)
    count = jnp.sum(free, axes, keepdims=True)

    def deviation(x):
        centred = x - jnp.sum(free * x, axes, keepdims=True) / count
        square = jnp.sum(free * jnp.square(centred), axes, keepdims=True) / count
        return jnp.sqrt(square)

    of_guided = deviation(guided)
    ratio = deviation(with_text) / jnp.where(of_guided > 0, of_guided, 1)
    return guided * (share * ratio + (1 - share))


def guided(
    velocity_fn: ConditionedVelocity,
    condition: Any,
    null: Any,
    guidance_scale: jax.Array | float,
    rescale: jax.Array | float | None = None,
    held: jax.Array | None = None,
) -> Velocity:
    """v(x, tau) = v_null + s (v_condition - v_null), in one call on twice the rows.

    Args:
      velocity_fn: (x_b..., tau, condition) -> velocity_b...; must treat rows alone.
      condition: a pytree of arrays [b, ...].
      null: the same tree; its leaves have b rows, or one row for all.
      guidance_scale: s. The Python number 1 needs no null half and computes none.
      rescale, held: share and held of `rescaled`; None: it is left out.

    Rows that do not divide over the devices, but do twice, may be whole on each: the
    two halves of a pair are then computed on two devices.

    What the result is given beyond x and tau, a step cache, goes to velocity_fn behind
    the condition, and comes back behind the velocity.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return lambda x, tau, *cached: velocity_fn(x, tau, condition, *cached)

    def guided_velocity(x: jax.Array, tau: jax.Array, *cached):
        rows = x.shape[0]
        everyone = jnp.ones((rows,), bool)
        empty = null_condition(condition, null, everyone)
        pairs = _interleave(x, x)
        conditions = jax.tree.map(_interleave, condition, empty)
        answer = velocity_fn(pairs, tau, conditions, *cached)
        velocity, *kept = answer if cached else (answer,)
        with_text, without = _deinterleave(sharding.reshard_like(velocity, pairs))
        velocity = without + guidance_scale * (with_text - without)
        if rescale is not None:
            velocity = rescaled(velocity, with_text, rescale, held)
        return (velocity, *kept) if cached else velocity

    return guided_velocity
