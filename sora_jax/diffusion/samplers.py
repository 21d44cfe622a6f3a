"""Solvers of dx / dtau = velocity(x, tau) from noise (tau 1) to data (tau 0).

A chunk of steps is one compiled scan; it knows nothing of tasks or of text. Callers
run chunk after chunk, so that progress, previews and cancelling work between them.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class Sampler(enum.StrEnum):
    """Which solver: Euler is of first order, Heun of second at twice the cost."""

    EULER = "euler"
    HEUN = "heun"


def euler(velocity_fn: Velocity, x: jax.Array, tau, tau_next, hold) -> jax.Array:
    """One step of Euler's method."""
    return hold(x + (tau_next - tau) * velocity_fn(x, tau))


def heun(velocity_fn: Velocity, x: jax.Array, tau, tau_next, hold) -> jax.Array:
    """One step of Heun's method; Euler's where it ends at tau 0.

    There the second evaluation would ask the model about clean data, a level that it
    was hardly trained on (Karras et al. 2022, arXiv:2206.00364, algorithm 1).
    """
    slope = velocity_fn(x, tau)
    guess = hold(x + (tau_next - tau) * slope)

    def corrected(guess):
        mean_slope = (slope + velocity_fn(guess, tau_next)) / 2
        return hold(x + (tau_next - tau) * mean_slope)

    return jax.lax.cond(tau_next > 0, corrected, lambda guess: guess, guess)


_STEPS = {Sampler.EULER: euler, Sampler.HEUN: heun}


def sample_chunk(
    velocity_fn: Velocity,
    x: jax.Array,
    taus: jax.Array,
    known_mask: jax.Array | None = None,
    known_values: jax.Array | None = None,
    sampler: str = Sampler.EULER,
) -> jax.Array:
    """Runs len(taus) - 1 solver steps and returns x at the last level.

    Args:
      velocity_fn: (x, tau scalar) -> dx / dtau, the shape of x.
      x: the state at level taus[0].
      taus: descending levels. A step between two equal levels is skipped at no cost,
        so a short last chunk can be padded to the compiled length.
      known_mask: bool, its shape a leading part of x's; these entries are held.
      known_values: what they are held at, the shape of x.
      sampler: "euler" or "heun".
    """
    if (known_mask is None) != (known_values is None):
        raise ValueError("known_mask and known_values go together: give both or none.")
    step = _STEPS[Sampler(sampler)]

    def hold(x: jax.Array) -> jax.Array:
        if known_mask is None:
            return x
        held = known_mask.reshape(known_mask.shape + (1,) * (x.ndim - known_mask.ndim))
        return jnp.where(held, known_values, x)

    def body(x, pair):
        tau, tau_next = pair
        moved = jax.lax.cond(
            tau > tau_next,
            lambda x: step(velocity_fn, x, tau, tau_next, hold),
            lambda x: x,
            x,
        )
        return moved, None

    taus = jnp.asarray(taus, jnp.float32)
    x, _ = jax.lax.scan(body, hold(x), (taus[:-1], taus[1:]))
    return x
