"""Latent videos as rows of tokens, and back.

Letters: b batch, n tokens, c channels; t, h, w time, height and width of a video grid, and
pt, ph, pw of a patch.
"""

import jax
import jax.numpy as jnp

from sora_jax.core import sharding


def patchify(video_bthwc: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[b, t, h, w, c] -> [b, n, patch volume * c].

    Raises:
      ValueError: a size is not a multiple of the patch's.
    """
    b, *grid, c = video_bthwc.shape
    if any(size % p for size, p in zip(grid, patch, strict=True)):
        raise ValueError(f"latent size {grid} is not a multiple of the patch {patch}")
    (pt, ph, pw), (t, h, w) = patch, (s // p for s, p in zip(grid, patch, strict=True))
    x = _reshape(video_bthwc, (b, t, pt, h, ph, w, pw, c))
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return _reshape(x, (b, t * h * w, pt * ph * pw * c))


def unpatchify(
    x_bnc: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> jax.Array:
    """The inverse of `patchify` for a latent grid (t, h, w)."""
    (pt, ph, pw), (t, h, w) = patch, (s // p for s, p in zip(grid, patch, strict=True))
    b, c = x_bnc.shape[0], x_bnc.shape[-1] // (pt * ph * pw)
    # All-gathers tokens that were sharded over the context axes.
    x = sharding.gather_axis(x_bnc, 1, x_bnc)
    x = _reshape(x, (b, t, h, w, pt, ph, pw, c))
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return _reshape(x, (b, *grid, c))


def _reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshapes all but the batch axis, which keeps its sharding."""
    spec = sharding.spec_like(x)
    return jnp.reshape(x, shape, out_sharding=spec and jax.P(*spec[:1]))
