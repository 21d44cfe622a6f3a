"""Which share of a clip is black bars, above and below or left and right of the picture.

A bar is a run of lines at an edge that are black in every frame. Bars are in pairs, which
tells them from a night sky, and there is a picture between them, which tells them from a
black clip. Bars of other colours and blurred copies as bars are not found.

Letters: t time, h height, w width, c channel, n lines.
"""

import numpy as np

from sora_jax.data import samples
from sora_jax.data.curation import pixels

NAME, VERSION = "letterbox", 1
SCORES = {"letterbox": "share of the frame's area that is black bars"}
_FRAMES = 8
# Black of limited range is 16 of 255 in files that are tagged wrongly; coding adds some.
_BLACK = 26 / 255
_PICTURE = 2 * _BLACK  # what the brightest pixel of a picture has, at least
_MOST = 0.2  # of the height that pairs of bars may differ by


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the score of a clip uint8[t, h, w, c]."""
    del fps
    grey_thw = pixels.grey(frames_thwc[samples.evenly(len(frames_thwc), _FRAMES)])
    brightest_hw = grey_thw.max(0)
    left = (1 - _bars(brightest_hw)) * (1 - _bars(brightest_hw.T))
    return {"letterbox": float(1 - left)}


def _bars(brightest_hw: np.ndarray) -> float:
    """The share of the rows that are a pair of bars."""
    # A logo or a bright pixel of coding noise in a bar does not end it.
    line_n = np.percentile(brightest_hw, 98, axis=1)
    picture = np.flatnonzero(line_n > _BLACK)
    if not len(picture) or line_n.max() < _PICTURE:
        return 0.0
    first, last = int(picture[0]), len(line_n) - 1 - int(picture[-1])
    if min(first, last) == 0 or abs(first - last) > _MOST * len(line_n):
        return 0.0
    return (first + last) / len(line_n)
