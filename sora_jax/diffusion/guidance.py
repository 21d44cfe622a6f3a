"""The null condition, and classifier-free guidance (Ho & Salimans 2022, 2207.12598).

A condition is any pytree of arrays whose first axis is the row (token ids and mask,
encoder states, ...). Training (dropout) and sampling (guidance) replace it by the same
null condition.
"""

from collections.abc import Callable, Sequence
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


def _interleave(*branches: jax.Array) -> jax.Array:
    """Rows a0 b0 a1 b1 ...: the branches of a row stay on its device."""
    together = jnp.stack(branches, axis=1)
    shape = (-1, *branches[0].shape[1:])
    return jnp.reshape(together, shape, out_sharding=sharding.spec_like(branches[0]))


def _deinterleave(rows: jax.Array, count: int) -> list[jax.Array]:
    """The inverse of `_interleave`."""
    spec = sharding.spec_like(rows)
    if spec is not None:
        spec = jax.P(*spec[:1], None, *spec[1:])
    shape = (rows.shape[0] // count, count, *rows.shape[1:])
    together = jnp.reshape(rows, shape, out_sharding=spec)
    return [together[:, i] for i in range(count)]


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
    branches: Sequence[Any],
    weights: Sequence[jax.Array | float] = (),
    rescale: jax.Array | float | None = None,
    known_mask: jax.Array | None = None,
) -> Velocity:
    """v(x, tau) = v_last + sum_i w_i (v_i - v_last), in one call on rows of all branches.

    With a condition and the null condition, w_0 is the guidance scale s. With text and
    another condition, of which each may be left out (arXiv 2211.09800, section 3.2),

        v = v_null + s_other (v_other - v_null) + s_text (v_both - v_other)

    has the branches both, other, null, and the weights s_text, s_other - s_text.

    Args:
      velocity_fn: (x_b..., tau, condition) -> velocity_b...; rows must be independent.
      branches: conditions, each a pytree of arrays [b, ...], the fullest first.
      weights: of all branches but the last.
      rescale: share of `rescaled`, towards the first branch; None skips it.
      known_mask: of `rescaled`.

    Rows that divide over the devices only with all their branches may be replicated: the
    branches of a row are then computed on several devices.

    Further arguments of the result, a step cache, are passed to velocity_fn after the
    condition, and returned after the velocity.

    Raises:
      ValueError: there are not as many weights as branches but the last.
    """
    if len(weights) != len(branches) - 1:
        raise ValueError(
            f"{len(branches)} branches of guidance need {len(branches) - 1} weights, not "
            f"{len(weights)}"
        )
    if len(branches) == 1:
        return lambda x, tau, *cached: velocity_fn(x, tau, branches[0], *cached)
    count = len(branches)

    def guided_velocity(x: jax.Array, tau: jax.Array, *cached):
        rows = _interleave(*[x] * count)
        conditions = jax.tree.map(_interleave, *branches)
        output = velocity_fn(rows, tau, conditions, *cached)
        velocity, *cached = output if cached else (output,)
        found = _deinterleave(sharding.reshard_like(velocity, rows), count)
        velocity = found[-1]
        for weight, branch in zip(weights, found, strict=False):
            velocity = velocity + weight * (branch - found[-1])
        if rescale is not None:
            velocity = rescaled(velocity, found[0], rescale, known_mask)
        return (velocity, *cached) if cached else velocity

    return guided_velocity
