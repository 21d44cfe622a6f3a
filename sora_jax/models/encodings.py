"""Encodings of noise levels and of token positions.

Letters: b batch, n tokens, d width, h heads, e head size.
"""

import jax
import jax.numpy as jnp


def sinusoid(x: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """[cos(x f_i), sin(x f_i)] with f_i = max_period^(-2i/width): [...] -> [..., width]."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / half)
    angle = x.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Returns how many channels of a head rotate with t, h and w, as in Wan."""
    hw = 2 * (head_dim // 6)
    return head_dim - 2 * hw, hw, hw


def rope_tables(
    pos_bn3: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the rotary angles, [b, n, head_dim / 2], float32."""
    angles = []
    for axis, width in enumerate(rope_split(head_dim)):
        frequency = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles.append(pos_bn3[..., axis].astype(jnp.float32)[..., None] * frequency)
    angle_bne = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle_bne), jnp.sin(angle_bne)


def rotate(x_bnhe: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs of adjacent channels by their angles (arXiv 2104.09864)."""
    cos, sin = (table[:, :, None, :] for table in tables)
    x32 = x_bnhe.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_bnhe.shape).astype(x_bnhe.dtype)


def additive_positions(pos_bn3: jax.Array, d: int) -> jax.Array:
    """Returns sinusoids of unit scale for the three axes, concatenated: [b, n, d].

    Rotary positions encode relative positions only; small models learn "at the left of
    the frame" far sooner from absolute ones.
    """
    width = 2 * (d // 6)
    parts = [sinusoid(pos_bn3[..., axis], width, 100.0) for axis in range(3)]
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.pad(joined, ((0, 0), (0, 0), (0, d - joined.shape[-1])))
