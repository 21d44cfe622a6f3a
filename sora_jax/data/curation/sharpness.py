"""How sharp a clip is: the variance of the Laplacian of its brightness.

Blur removes it, and so does scaling up. It grows with contrast and with noise as well, so
that it orders copies of one clip better than clips of different things.

Letters: t time, h height, w width, c channel.
"""

import numpy as np
from scipy import ndimage

from sora_jax.data import samples
from sora_jax.data.curation import pixels

NAME, VERSION = "sharpness", 1
SCORES = {
    "sharpness": "variance of the Laplacian of the brightness, which is in [0, 1]"
}
_FRAMES = 8


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the score of a clip uint8[t, h, w, c], at its own size."""
    del fps
    seen = samples.evenly(len(frames_thwc), _FRAMES)
    grey_thw = pixels.grey(frames_thwc[seen])
    found = [ndimage.laplace(grey_hw)[1:-1, 1:-1].var() for grey_hw in grey_thw]
    return {"sharpness": float(np.mean(found))}
