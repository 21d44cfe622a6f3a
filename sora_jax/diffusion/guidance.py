"""The null condition, and classifier-free guidance (Ho & Salimans 2022, 2207.12598).

A condition is any pytree of arrays whose first axis is the row (token ids and mask,
encoder states, ...). Training (dropout) and sampling (guidance) replace it by the null
condition with the same function, so they cannot differ.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax.core import sharding

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
ConditionedVelocity = Callable[[jax.Array, jax.Array, Any], jax.Array]


def null_condition(condition: Any, null: Any, drop_b: jax.Array) -> Any:
    """Replaces `condition` by `null` in the rows where drop_b is true.

    Args:
      condition: a pytree of arrays [b, ...].
      null: the same tree; its leaves have b rows, or one row for all.
      drop_b: bool [b].
    """

    def pick(x, empty):
        drop = drop_b.reshape(drop_b.shape + (1,) * (x.ndim - 1))
        return jnp.where(drop, empty.astype(x.dtype), x)

    return jax.tree.map(pick, condition, null)


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows a0 b0 a1 b1 ...: both rows of a pair stay on the device of the row."""
    pairs = jnp.stack([first, second], axis=1)
    shape = (2 * first.shape[0], *first.shape[1:])
    return jnp.reshape(pairs, shape, out_sharding=sharding.spec_like(first))


def _deinterleave(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_interleave`."""
    spec = sharding.spec_like(pairs)
    if spec is not None:
        spec = jax.P(*spec[:1], None, *spec[1:])
    shape = (pairs.shape[0] // 2, 2, *pairs.shape[1:])
    pairs = jnp.reshape(pairs, shape, out_sharding=spec)
    return pairs[:, 0], pairs[:, 1]


def rescaled(
    guided: jax.Array,
    with_text: jax.Array,
    share: jax.Array | float,
    known_mask: jax.Array | None = None,
) -> jax.Array:
    """Rescales a guided velocity towards the standard deviation of the one with the text.

    Guidance makes velocities larger, and videos too bright and too high in contrast.
    With s the standard deviation over a row (Lin et al. 2023, arXiv:2305.08891,
    section 3.4; diffusers' guidance_rescale):

        share s(with_text) / s(guided) guided + (1 - share) guided

    Args:
      guided, with_text: [b, ...].
      share: 0 changes nothing; the paper uses 0.7.
      known_mask: bool, its shape a prefix of theirs. Known entries do not count: their
        velocity is neither used nor trained.
    """
    axes = tuple(range(1, guided.ndim))
    free = jnp.ones_like(guided)
    if known_mask is not None:
        ones = (1,) * (guided.ndim - known_mask.ndim)
        free = jnp.where(known_mask.reshape(known_mask.shape + ones), 0.0, free)
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
    known_mask: jax.Array | None = None,
) -> Velocity:
    """v(x, tau) = v_null + s (v_condition - v_null), in one call on twice the rows.

    Args:
      velocity_fn: (x_b..., tau, condition) -> velocity_b...; rows must be independent.
      condition: a pytree of arrays [b, ...].
      null: the same tree; its leaves have b rows, or one row for all.
      guidance_scale: s. With the Python number 1 the null condition is not computed.
      rescale: share of `rescaled`; None skips it.
      known_mask: of `rescaled`.

    Rows that divide over the devices only when doubled may be replicated: the two rows
    of a pair are then computed on two devices.

    Further arguments of the result, a step cache, are passed to velocity_fn after the
    condition, and returned after the velocity.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return lambda x, tau, *cached: velocity_fn(x, tau, condition, *cached)

    def guided_velocity(x: jax.Array, tau: jax.Array, *cached):
        rows = x.shape[0]
        everyone = jnp.ones((rows,), bool)
        empty = null_condition(condition, null, everyone)
        pairs = _interleave(x, x)
        conditions = jax.tree.map(_interleave, condition, empty)
        output = velocity_fn(pairs, tau, conditions, *cached)
        velocity, *cached = output if cached else (output,)
        with_text, without = _deinterleave(sharding.reshard_like(velocity, pairs))
        velocity = without + guidance_scale * (with_text - without)
        if rescale is not None:
            velocity = rescaled(velocity, with_text, rescale, known_mask)
        return (velocity, *cached) if cached else velocity

    return guided_velocity
