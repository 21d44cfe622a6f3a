"""Frames as the stages look at them.

Letters: t time, h height, w width, c channel.
"""

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of BT.601


def grey(frames_thwc: np.ndarray) -> np.ndarray:
    """Returns the luma of frames uint8, float32[t, h, w] in [0, 1]."""
    return grey_of(frames_thwc.astype(np.float32) / 255)


def grey_of(frames_thwc: np.ndarray) -> np.ndarray:
    """Returns the luma of frames float32."""
    return frames_thwc @ _LUMA


def shrunk(frames_thwc: np.ndarray, side: int) -> np.ndarray:
    """Returns frames uint8 as float32 in [0, 1], averaged over blocks of pixels.

    Args:
      frames_thwc: the frames.
      side: pixels of the shorter side that are enough; the result has from `side` to
        just below 2 * `side` of them, or all that there are.
    """
    num_frames, height, width, channels = frames_thwc.shape
    k = max(1, min(height, width) // side)
    seen = frames_thwc[:, : height // k * k, : width // k * k].astype(np.float32) / 255
    return seen.reshape(num_frames, height // k, k, width // k, k, channels).mean(
        (2, 4)
    )
