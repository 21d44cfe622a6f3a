"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): straight paths to noise.

    x_tau = (1 - tau) x0 + tau noise,      velocity = d x_tau / d tau = noise - x0

tau is the noise level: 0 is data, 1 is pure noise. It may be a scalar, one value per
row [b], or one value per token [b, t, h, w]: its shape is a prefix of x's shape.
"""

import jax
import jax.numpy as jnp


def per_token(tau: jax.Array | float, like: jax.Array) -> jax.Array:
    """Adds trailing axes of size 1 to `tau`, so that it broadcasts against `like`.

    Raises:
      ValueError: the shape of tau is not a prefix of the shape of `like`.
    """
    tau = jnp.asarray(tau, jnp.float32)
    if tau.shape != like.shape[: tau.ndim]:
        raise ValueError(
            f"tau has shape {tau.shape}, which is not a prefix of {like.shape}: give a "
            "scalar, one level per row, or one level per token"
        )
    return tau.reshape(tau.shape + (1,) * (like.ndim - tau.ndim))


def interpolate(x0: jax.Array, noise: jax.Array, tau: jax.Array | float) -> jax.Array:
    """x_tau = (1 - tau) x0 + tau noise."""
    tau = per_token(tau, x0)
    return (1 - tau) * x0 + tau * noise


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The denoiser's target: noise - x0, the same at every tau."""
    return noise - x0
