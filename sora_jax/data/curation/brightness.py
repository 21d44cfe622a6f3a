"""How bright a clip is, and how flat: the mean and the spread of its brightness.

Letters: t time, h height, w width, c channel.
"""

import numpy as np

from sora_jax.data import samples
from sora_jax.data.curation import pixels

NAME, VERSION = "brightness", 1
SCORES = {
    "brightness": "mean brightness, from 0 (black) to 1 (white)",
    "contrast": "standard deviation of the brightness of a frame, from 0 (flat) to 0.5",
    "darkest_frame": "mean brightness of the darkest frame, as of a fade to black",
}
_FRAMES = 16


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the scores of a clip uint8[t, h, w, c]."""
    del fps
    grey_thw = pixels.grey(frames_thwc[samples.evenly(len(frames_thwc), _FRAMES)])
    mean_t = grey_thw.mean((1, 2))
    return {
        "brightness": float(mean_t.mean()),
        "contrast": float(grey_thw.std((1, 2)).mean()),
        "darkest_frame": float(mean_t.min()),
    }
