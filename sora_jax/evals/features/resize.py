"""Resizing of clips exactly as in public code.

Published distances differ by the interpolation alone, so each method has a name, which is
recorded in the protocol. The bilinear methods have no antialiasing.

  tf             TensorFlow 1's resize_bilinear: FVD as first published (arXiv 1812.01717)
  align_corners  the same with align_corners, equal to torch's
  half_pixel     torch's F.interpolate with align_corners=False: StyleGAN-V, VideoGPT,
                 CD-FVD
  bicubic        bicubic with antialiasing, as in Pillow: CLIP

Frames are stretched to a square. If the name ends in ", cropped", their short side is
resized and the centre is cropped.

Letters: b clips, t frames, h height, w width, c channels, i input and o output pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np

BILINEAR = ("tf", "align_corners", "half_pixel")
CROPPED = ", cropped"
NAMES = tuple(f"{m}{c}" for m in (*BILINEAR, "bicubic") for c in ("", CROPPED))


def places(method: str, i: int, o: int) -> np.ndarray:
    """Returns the position among i input pixels of each of o output pixels: float32 [o].

    Rounded as in public code, since an error of 1e-5 pixels is visible in scores.
    """
    at_o, half = np.arange(o, dtype=np.float32), np.float32(0.5)
    if method == "tf":
        return at_o * (np.float32(i) / np.float32(o))
    if method == "align_corners":
        return at_o * (np.float32(i - 1) / np.float32(max(o - 1, 1)))
    scale = np.float64(np.float32(i) / np.float32(o))
    # One rounding after both operations, which are fused in torch on CPU and GPU.
    return np.maximum(((at_o + half) * scale - 0.5).astype(np.float32), 0)


def matrix(method: str, i: int, o: int) -> np.ndarray:
    """Returns the weights of i input pixels in o output pixels: float32 [o, i]."""
    at_o = places(method, i, o)
    low_o = np.minimum(np.floor(at_o).astype(int), i - 1)
    high_o = np.minimum(low_o + 1, i - 1)
    part_o, rows_o = at_o - low_o, np.arange(o)
    weights_oi = np.zeros((o, i))
    np.add.at(weights_oi, (rows_o, low_o), 1 - part_o)
    np.add.at(weights_oi, (rows_o, high_o), part_o)
    return weights_oi.astype(np.float32)


def resize(video_bthwc: jax.Array, size: int, name: str) -> jax.Array:
    """Returns the clips at size x size pixels, float32.

    Args:
      video_bthwc: the clips, float32.
      size: pixels.
      name: one of NAMES.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"resize is {name!r}, it must be one of {', '.join(NAMES)}")
    method = name.removesuffix(CROPPED)
    h, w = video_bthwc.shape[2:4]
    new_h, new_w = size, size
    if name.endswith(CROPPED):
        short = min(h, w)  # the long side is rounded down, as torchvision does
        new_h, new_w = size * h // short, size * w // short
    if (new_h, new_w) != (h, w):
        video_bthwc = _interpolate(video_bthwc, new_h, new_w, method)
    top, left = round((new_h - size) / 2), round((new_w - size) / 2)
    return video_bthwc[:, :, top : top + size, left : left + size]


def _interpolate(video_bthwc, new_h: int, new_w: int, method: str) -> jax.Array:
    highest = jax.lax.Precision.HIGHEST  # accelerators round to bfloat16 by default
    b, t, h, w, c = video_bthwc.shape
    if method == "bicubic":
        shape = (b, t, new_h, new_w, c)
        return jax.image.resize(video_bthwc, shape, "cubic", precision=highest)
    rows_oi, columns_oi = matrix(method, h, new_h), matrix(method, w, new_w)
    x = jnp.einsum("oh,bthwc->btowc", rows_oi, video_bthwc, precision=highest)
    return jnp.einsum("pw,btowc->btopc", columns_oi, x, precision=highest)
