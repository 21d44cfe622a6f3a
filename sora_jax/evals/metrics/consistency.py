"""Does a clip keep its subject and its background: similarity of frames' features.

After VBench (arXiv 2311.17982): with f_t the features of frame t,

    consistency = mean over t >= 1 of (max(0, cos(f_t, f_{t-1}))
                                       + max(0, cos(f_t, f_0))) / 2.

What it measures depends on the features, a function from frames to vectors. VBench
takes DINO's for the subject and CLIP's for the background; any network can be used. The
two functions here need no weights: they are for videos with a coloured subject on a grey
background, as in the toy world.

A still video scores 1 whatever it shows, so read the amount of motion beside it.
Features without position cannot see that frames are in the wrong order. A moving camera
changes the background, so that background consistency falls for a perfect clip too.

Letters: b clips, t frames, n frames of all clips, h height, w width, c colour channels,
d features.
"""

from collections.abc import Callable

import numpy as np

from sora_jax.evals import pixels

# Frames, float32 [n, h, w, 3] in [0, 1], to vectors [n, d].
FrameFeatures = Callable[[np.ndarray], np.ndarray]

# Range of a pixel's channels (full scale 1) from which it counts as coloured in part, and
# in full. The toy world's greys have none, its colours 0.5 or more.
_COLOURED = (0.15, 0.35)
_HUES = 12
_CELLS = 4  # per side
_FRAMES_AT_ONCE = 256


def similarity(vectors_btd: np.ndarray) -> np.ndarray:
    """Returns the consistency of clips, in [0, 1]: float64 [b].

    Args:
      vectors_btd: features of the frames, see `of_frames`. A vector of zeros, "nothing
        was found", is similar to no other.

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


def of_frames(video_bthwc: np.ndarray, frame_features: FrameFeatures) -> np.ndarray:
    """Returns features of every frame of clips, float64 [b, t, d].

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      frame_features: each vector must depend on its own frame alone.

    Raises:
      ValueError: there are no clips, or features that are not [n, d] and finite.
    """
    video_bthwc = pixels.as_unit(video_bthwc)
    b, t = video_bthwc.shape[:2]
    if not b * t:
        raise ValueError(f"there are no frames in clips of shape {video_bthwc.shape}")
    frames_nhwc = video_bthwc.reshape(b * t, *video_bthwc.shape[2:])
    parts = []
    for start in range(0, b * t, _FRAMES_AT_ONCE):
        chunk = frames_nhwc[start : start + _FRAMES_AT_ONCE]
        found = np.asarray(frame_features(chunk), np.float64)
        if found.ndim != 2 or len(found) != len(chunk) or not np.isfinite(found).all():
            raise ValueError(
                f"frame features must be finite and [{len(chunk)}, d], got shape "
                f"{found.shape}"
            )
        parts.append(found)
    return np.concatenate(parts).reshape(b, t, -1)


def subject_colours(frames_nhwc: np.ndarray) -> np.ndarray:
    """Returns the root of a histogram of 12 hues per frame: float64 [n, 12].

    The cosine of two such roots is the Bhattacharyya coefficient of the frames' colours.
    Position, shape and size have no effect. A frame without colour has zeros.
    """
    rgb = np.asarray(frames_nhwc, np.float64)
    weight_nhw = _coloured(rgb)
    # The angle of a colour in the plane orthogonal to the greys.
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
    """Returns the mean brightness of the grey pixels in 4 x 4 cells: float64 [n, 16].

    A cell that coloured pixels fill gets the mean of the frame. Mid-grey is zero, since
    the cosine of two positive constants would be 1.

    Raises:
      ValueError: frames of fewer than 4 pixels per side.
    """
    rgb = np.asarray(frames_nhwc, np.float64)
    n, h, w, _ = rgb.shape
    if min(h, w) < _CELLS:
        raise ValueError(f"frames must have {_CELLS} pixels per side, got {h} x {w}")
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
