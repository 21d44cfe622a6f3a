"""How often a clip cuts to another shot, as `data/cuts.py` finds it.

Letters: t time, h height, w width, c channel.
"""

import numpy as np

from sora_jax.data import cuts

NAME, VERSION = "cuts", 1
SCORES = {"cuts": "number of cuts inside the clip"}


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the score of a clip uint8[t, h, w, c]."""
    del fps
    return {"cuts": float(len(cuts.shots(frames_thwc)) - 1)}
