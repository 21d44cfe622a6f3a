"""Clips as every measure reads them: float32 in [0, 1].

Letters: b clips, t frames, h height, w width, 3 colour channels.
"""

import numpy as np


def as_unit(video_bthwc: np.ndarray) -> np.ndarray:
    """Returns clips, uint8 or float in [-1, 1], as float32 in [0, 1].

    Raises:
      ValueError: not five axes with 3 channels, or values that are not finite.
    """
    video_bthwc = np.asarray(video_bthwc)
    if video_bthwc.ndim != 5 or video_bthwc.shape[-1] != 3:
        raise ValueError(f"clips must be [b, t, h, w, 3], got {video_bthwc.shape}")
    if video_bthwc.dtype == np.uint8:
        return video_bthwc.astype(np.float32) / 255
    if not np.isfinite(video_bthwc).all():
        raise ValueError("the clips hold NaN or infinity")
    return np.clip((video_bthwc.astype(np.float32) + 1) / 2, 0, 1)


def to_uint8(unit: np.ndarray) -> np.ndarray:
    """Converts frames in [0, 1] to uint8, rounded.

    Raises:
      ValueError: values that are not finite.
    """
    if not np.isfinite(unit).all():
        raise ValueError("the frames hold NaN or infinity")
    return np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8)
