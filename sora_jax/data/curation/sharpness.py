"""How sharp a clip is: the variance of the Laplacian, over red, green and blue.

Blur removes it, and so does scaling up. It grows with contrast and with noise as well, so
that it orders copies of one clip better than clips of different things. Brightness alone would miss edges between colours that are
equally bright.

Letters: t time, h height, w width, c channel.
"""

import numpy as np
from scipy import ndimage

from sora_jax.data import samples

NAME, VERSION = "sharpness", 1
SCORES = {"sharpness": "variance of the Laplacian of the colours, which are in [0, 1]"}
_FRAMES = 8


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the score of a clip uint8[t, h, w, c], at its own size."""
    del fps
    seen = samples.evenly(len(frames_thwc), _FRAMES)
    frames = frames_thwc[seen].astype(np.float32) / 255
    found = [
        ndimage.laplace(frame_hwc[..., c])[1:-1, 1:-1].var()
        for frame_hwc in frames
        for c in range(frame_hwc.shape[-1])
    ]
    return {"sharpness": float(np.mean(found))}
