"""Encodings of noise levels and of token positions.

Letters: b batch, n tokens, d width, h heads, e head size.
"""

import jax
import jax.numpy as jnp


def sinusoid(
    x: jax.Array,
    width: int,
    max_period: float = 10_000.0,
    period: jax.Array | None = None,
) -> jax.Array:
    """[cos(x f_i), sin(x f_i)] with f_i = max_period^(-2i/width): [...] -> [..., width].

    period: see `circular`.
    """
    half = width // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / half)
    angle = x.astype(jnp.float32)[..., None] * circular(frequency, period)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def circular(frequency_f: jax.Array, period: jax.Array | None) -> jax.Array:
    """The frequencies that repeat after a period, [..., f]: multiples of 2 pi / period.

    Each is the multiple that is nearest to a usual one; the first, the highest, is at
    least one turn, so that it tells times apart.

    Args:
      frequency_f: the usual ones.
      period: [...], 0 where time does not repeat; None: nowhere.
    """
    if period is None:
        return frequency_f
    base = 2 * jnp.pi / jnp.where(period > 0, period, 1.0)[..., None]
    turns = jnp.round(frequency_f / base)
    turns = turns.at[..., 0].set(jnp.maximum(turns[..., 0], 1))
    return jnp.where(period[..., None] > 0, turns * base, frequency_f)


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Returns how many channels of a head rotate with t, h and w, as in Wan."""
    hw = 2 * (head_dim // 6)
    return head_dim - 2 * hw, hw, hw


def rope_tables(
    pos_bn3: jax.Array,
    head_dim: int,
    theta: float,
    period_bn: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the rotary angles, [b, n, head_dim / 2], float32.

    period_bn: of time; see `circular`.
    """
    angles = []
    for axis, width in enumerate(rope_split(head_dim)):
        frequency = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        if axis == 0:
            frequency = circular(frequency, period_bn)
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


def additive_positions(
    pos_bn3: jax.Array, d: int, period_bn: jax.Array | None = None
) -> jax.Array:
    """Returns sinusoids of unit scale for the three axes, concatenated: [b, n, d].

    Rotary positions encode relative positions only; small models learn "at the left of
    the frame" far sooner from absolute ones.
    """
    width = 2 * (d // 6)
    parts = [
        sinusoid(pos_bn3[..., axis], width, 100.0, None if axis else period_bn)
        for axis in range(3)
    ]
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.pad(joined, ((0, 0), (0, 0), (0, d - joined.shape[-1])))
