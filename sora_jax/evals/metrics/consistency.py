"""Does a clip keep its subject and its background: similarity of frames' features.

After VBench (arXiv 2311.17982): with f_t the features of frame t,

    consistency = mean over t >= 1 of (max(0, cos(f_t, f_{t-1}))
                                       + max(0, cos(f_t, f_0))) / 2.

What it means is up to the features: a function from frames to vectors. VBench takes
DINO's for the subject and CLIP's for the background; any such network can be given.
Here are two that need no weights, for videos in which the subject is coloured and the
background is grey, as in the toy world, and the toy state network's for a frame.

A still video has 1 whatever it shows, so the amount of motion belongs beside it, and
features that say nothing about place cannot see that frames are in a wrong order. A
camera that moves changes the background, rightly: there background consistency falls
for a perfect clip too.

Letters: b clips, t frames, n frames of all clips, h height, w width, c colour channels,
d features.
"""

from collections.abc import Callable

import numpy as np

from sora_jax.evals import pixels
from sora_jax.evals.features import networks

# Frames, float32 [n, h, w, 3] in [0, 1], to vectors [n, d].
FrameFeatures = Callable[[np.ndarray], np.ndarray]

# Spread of a pixel's channels, of full scale, at which it begins to count as coloured,
# and at which it fully does. The toy world's greys have none, its colours 0.5 or more.
_COLOURED = (0.15, 0.35)
_HUES = 12
_CELLS = 4  # a side


def consistency(
    video_bthwc: np.ndarray, frame_features: FrameFeatures, *, batch_size: int = 256
) -> np.ndarray:
    """How alike the frames of each clip are, in [0, 1]: float64 [b].

    Args:
      video_bthwc: uint8, or float32 in [-1, 1], 2 frames or more.
      frame_features: see the head of this file; each vector must depend on its own
        frame alone. A vector of zeros, "nothing was found", is like no other.
      batch_size: frames that are given to it at once.

    Raises:
      ValueError: fewer than two frames, or features that are not [n, d] and finite.
    """
    return similarity(of_frames(video_bthwc, frame_features, batch_size=batch_size))


def similarity(vectors_btd: np.ndarray) -> np.ndarray:
    """The same of features of frames, [b, t, d].

    Raises:
      ValueError: fewer than two frames.
    """
    vectors_btd = np.asarray(vectors_btd, np.float64)
    if vectors_btd.shape[1] < 2:
        raise ValueError("consistency needs clips of 2 frames or more, got 1")
    length_bt1 = np.linalg.norm(vectors_btd, axis=2, keepdims=True)
    unit_btd = vectors_btd / np.where(length_bt1 > 0, length_bt1, 1)
    to_last = np.einsum("btd,btd->bt", unit_btd[:, 1:], unit_btd[:, :-1])
    to_first = np.einsum("btd,bd->bt", unit_btd[:, 1:], unit_btd[:, 0])
    both = np.clip(to_last, 0, 1) + np.clip(to_first, 0, 1)
    return both.mean(1) / 2


def of_frames(
    video_bthwc: np.ndarray, frame_features: FrameFeatures, *, batch_size: int = 256
) -> np.ndarray:
    """Features of every frame of clips, float64 [b, t, d].

    Raises:
      ValueError: there are no clips, or features that are not [n, d] and finite.
    """
    video_bthwc = pixels.as_unit(video_bthwc)
    b, t = video_bthwc.shape[:2]
    if not b * t:
        raise ValueError(f"there are no frames in clips of shape {video_bthwc.shape}")
    frames_nhwc = video_bthwc.reshape(b * t, *video_bthwc.shape[2:])
    parts = []
    for start in range(0, b * t, batch_size):
        chunk = frames_nhwc[start : start + batch_size]
        found = np.asarray(frame_features(chunk), np.float64)
        if found.ndim != 2 or len(found) != len(chunk) or not np.isfinite(found).all():
            raise ValueError(
                f"frame features must be finite and [{len(chunk)}, d], got shape "
                f"{found.shape}"
            )
        parts.append(found)
    return np.concatenate(parts).reshape(b, t, -1)


def subject_colours(frames_nhwc: np.ndarray) -> np.ndarray:
    """What is coloured in each frame: root of a histogram of 12 hues, float64 [n, 12].

    The histogram adds up the pixels' shares, so the cosine of two of its roots is the
    Bhattacharyya coefficient of the frames' colours. Place, shape and size do not
    show. A frame without colour has zeros.
    """
    rgb = np.asarray(frames_nhwc, np.float64)
    weight_nhw = _coloured(rgb)
    # The angle of a colour in the plane across the greys.
    along = rgb[..., 0] - 0.5 * (rgb[..., 1] + rgb[..., 2])
    across = np.sqrt(0.75) * (rgb[..., 1] - rgb[..., 2])
    place = (np.arctan2(across, along) / (2 * np.pi) * _HUES) % _HUES
    n = len(rgb)
    lower = np.floor(place).astype(int) % _HUES
    share = place - np.floor(place)
    row = np.arange(n)[:, None, None] * _HUES
    total = np.bincount(
        (row + lower).ravel(), (weight_nhw * (1 - share)).ravel(), n * _HUES
    )
    upper = (row + (lower + 1) % _HUES).ravel()
    total += np.bincount(upper, (weight_nhw * share).ravel(), n * _HUES)
    return np.sqrt(total.reshape(n, _HUES))


def background_greys(frames_nhwc: np.ndarray) -> np.ndarray:
    """What is grey in each frame: mean brightness of 4 x 4 cells, float64 [n, 16].

    Coloured pixels have no part in a cell's mean; a cell that they fill has the mean
    of the frame. Mid-grey is zero, so that the cosine is not that of two constants.

    Raises:
      ValueError: frames of fewer than 4 pixels a side.
    """
    rgb = np.asarray(frames_nhwc, np.float64)
    n, h, w, _ = rgb.shape
    if min(h, w) < _CELLS:
        raise ValueError(f"frames must have {_CELLS} pixels a side, got {h} x {w}")
    weight_nhw, grey_nhw = 1 - _coloured(rgb), rgb.mean(3) - 0.5

    def cells(image_nhw):
        for axis, size in ((1, h), (2, w)):
            starts = np.arange(_CELLS) * size // _CELLS
            image_nhw = np.add.reduceat(image_nhw, starts, axis=axis)
        return image_nhw.reshape(n, -1)

    area_nd, total_nd = cells(weight_nhw), cells(weight_nhw * grey_nhw)
    mean_n1 = total_nd.sum(1, keepdims=True) / np.maximum(
        area_nd.sum(1, keepdims=True), 1e-9
    )
    return np.where(area_nd > 0.5, total_nd / np.maximum(area_nd, 1e-9), mean_n1)


def _coloured(rgb: np.ndarray) -> np.ndarray:
    low, high = _COLOURED
    spread = rgb.max(-1) - rgb.min(-1)
    return np.clip((spread - low) / (high - low), 0, 1)


class ToyFrameFeatures:
    """The toy state network's features of single frames, each shown as a still clip.

    They say where things are too, so a moving subject lowers the similarity.
    """

    def __init__(self, network: networks.ToyFeatures):
        self._network = network

    def __call__(self, frames_nhwc: np.ndarray) -> np.ndarray:
        """Returns features [n, d] of frames [n, h, w, 3] in [0, 1]."""
        clips = np.repeat(frames_nhwc[:, None], self._network.num_frames, axis=1)
        return self._network(clips.astype(np.float32) * 2 - 1)
