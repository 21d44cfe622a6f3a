"""Which share of a clip looks like lines of text: titles, subtitles, credits.

A heuristic without a network. Letters are strokes: along a row, brightness changes
strongly many times within a short distance, up and down in turn. Such places are joined
along rows; what results is a line of text if it is wider than high, neither tiny nor half
the frame, and mostly full of strokes. Fences, foliage and windows can look like this too;
single letters, handwriting and text below 8 pixels are missed.

Letters: t time, h height, w width, c channel.
"""

import numpy as np
from scipy import ndimage

from sora_jax.data import samples
from sora_jax.data.curation import pixels

NAME, VERSION = "text_area", 1
SCORES = {"text_area": "share of the frame's area that looks like lines of text"}
_FRAMES = 3
_SIDE = 240  # pixels of the shorter side that are looked at, at most
_EDGE = 0.2  # change of brightness between neighbouring pixels of a letter's edge
_LEAST, _MOST = 6, 0.2  # height of a line: pixels at least, share of the frame at most
_ASPECT, _FULL = (
    2.0,
    0.6,
)  # least width of a line in heights, least share that is filled
_STROKES = 1.2  # least number of strokes, each an edge up and one down, in a height


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the score of a clip uint8[t, h, w, c]."""
    del fps
    seen = frames_thwc[samples.evenly(len(frames_thwc), _FRAMES)]
    grey_thw = pixels.grey_of(pixels.shrunk(seen, _SIDE))
    shares = [lines(grey_hw).mean() for grey_hw in grey_thw]
    return {"text_area": float(np.mean(shares))}


def lines(grey_hw: np.ndarray) -> np.ndarray:
    """Returns where a frame float32[h, w] in [0, 1] looks like lines of text."""
    change_hw = np.diff(grey_hw, axis=1, append=grey_hw[:, -1:])
    up, down = change_hw > _EDGE, change_hw < -_EDGE
    reach = max(5, round(min(grey_hw.shape) / 16) | 1)
    near = lambda mask: ndimage.maximum_filter1d(mask, reach, axis=1)  # noqa: E731
    # Edges in both directions close by: a stroke, and not the side of a large thing.
    stroke_hw = (up & near(down)) | (down & near(up))
    joined_hw = ndimage.binary_closing(stroke_hw, np.ones((3, reach)))
    joined_hw = ndimage.binary_opening(joined_hw, np.ones((3, 3)))
    label_hw, _ = ndimage.label(joined_hw)
    found_hw = np.zeros(grey_hw.shape, bool)
    for label, box in enumerate(ndimage.find_objects(label_hw), 1):
        height, width = (part.stop - part.start for part in box)
        inside = label_hw[box] == label
        strokes = (up[box] & inside).sum(1)
        if (
            _LEAST <= height <= _MOST * len(grey_hw)
            and width >= _ASPECT * height
            and inside.mean() >= _FULL
            # Rows through the middle of letters cross most of their strokes.
            and np.percentile(strokes, 75) >= _STROKES * width / height
        ):
            found_hw[box] = True
    return found_hw
