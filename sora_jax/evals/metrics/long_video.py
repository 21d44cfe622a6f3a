"""Faults of long videos: slow drift, seams between chunks, repetition; and loops.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1), h height, w width, c
colour channels, d pixels and channels of a frame. The distance of two frames is the root
mean square of their difference, in units of full scale.
"""

from collections.abc import Sequence

import numpy as np

from sora_jax.evals import pixels

SERIES = ("brightness", "contrast", "saturation", "sharpness")
_LUMINANCE = np.array([0.299, 0.587, 0.114])
# Lower bounds of the spread that a seam's step is compared with: this share of the median
# step, and a tenth of an 8-bit step. In perfectly even motion the spread itself is zero.
_LEAST_SPREAD, _LEAST_STEP = 0.1, 0.1 / 255
LEAST_OTHERS = 4  # steps that are not seams
# A frame repeats an earlier one if their distance is below half the median step, or below
# the mean effect of rounding to 8 bits.
_SAME, _ROUNDING = 0.5, 0.3 / 255
LEAST_LAG = 2  # frames back, for a repetition


def series(video_bthwc: np.ndarray) -> dict[str, np.ndarray]:
    """Returns brightness, contrast, saturation and sharpness of each frame: [b, t] each.

    With Y the luminance, in units of full scale:
      brightness: mean of Y.
      contrast: standard deviation of Y.
      saturation: mean over pixels of the largest minus the smallest channel.
      sharpness: mean length of the gradient of Y (central differences), per pixel.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1], 2 pixels per side or more.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in SERIES}
    for clip_thwc in pixels.as_unit(video_bthwc):
        luminance_thw = clip_thwc.astype(np.float64) @ _LUMINANCE
        down, right = np.gradient(luminance_thw, axis=(1, 2))
        found["brightness"].append(luminance_thw.mean((1, 2)))
        found["contrast"].append(luminance_thw.std((1, 2)))
        spread_thw = clip_thwc.max(3) - clip_thwc.min(3)
        found["saturation"].append(spread_thw.mean((1, 2), dtype=np.float64))
        found["sharpness"].append(np.hypot(down, right).mean((1, 2)))
    return {name: np.array(values) for name, values in found.items()}


def drift(video_bthwc: np.ndarray, *, fps: float) -> dict[str, np.ndarray]:
    """Returns slopes of `series` over time, in their units per second: float64 [b] each.

    The Theil-Sen slope is the median of (y_j - y_i) / (j - i) over all pairs of frames;
    up to 29 % of outliers do not change it. The slope is signed; zero is no drift. A
    still video has none.

    Raises:
      ValueError: fewer than three frames, or fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}, it must be positive")
    if video_bthwc.shape[1] < 3:
        raise ValueError(f"drift needs 3 frames or more, got {video_bthwc.shape[1]}")
    return {name: fps * slope(values) for name, values in series(video_bthwc).items()}


def slope(values_bt: np.ndarray) -> np.ndarray:
    """Returns the Theil-Sen slope per frame of each row: float64 [b]."""
    from scipy import stats  # here, since importing it takes a second

    return np.array([stats.theilslopes(values_t).slope for values_t in values_bt])


def seam_score(video_bthwc: np.ndarray, seams: Sequence[int]) -> np.ndarray:
    """Returns how far the steps at known seams differ from the others: float64 [b].

    With D_t the distance of frames t - 1 and t, and S the seams,

        z_s = (D_s - median of D_t) / max(1.4826 median of |D_t - median|, floor)

    over t not in S; the score is the mean of |z_s|. The floor is a tenth of the median,
    at least a tenth of an 8-bit step. Too large a step (frames dropped, the scene jumps)
    and too small a step (a repeated frame) count alike. About 1 means no visible seam. A
    still video scores 0, since nothing moves at its seams.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      seams: the first frames of new chunks, the same in all clips.

    Raises:
      ValueError: a seam is outside of 1 to t - 1, or fewer than 4 steps are not seams.
    """
    t = np.shape(video_bthwc)[1]
    seams = sorted(set(seams))
    if not seams or seams[0] < 1 or seams[-1] >= t:
        raise ValueError(f"seams are frames 1 to {t - 1}, got {seams}")
    others = [i - 1 for i in range(1, t) if i not in seams]
    if len(others) < LEAST_OTHERS:
        raise ValueError(
            f"{len(others)} steps are not seams, {LEAST_OTHERS} or more are needed"
        )
    steps_bp = steps(video_bthwc)
    middle_b1 = np.median(steps_bp[:, others], axis=1, keepdims=True)
    spread_b1 = 1.4826 * np.median(
        np.abs(steps_bp[:, others] - middle_b1), axis=1, keepdims=True
    )
    floor_b1 = np.maximum(_LEAST_SPREAD * middle_b1, _LEAST_STEP)
    score_bs = (steps_bp[:, [s - 1 for s in seams]] - middle_b1) / np.maximum(
        spread_b1, floor_b1
    )
    return np.abs(score_bs).mean(1)


def steps(video_bthwc: np.ndarray) -> np.ndarray:
    """Returns distances of neighbouring frames, float64 [b, p]."""
    vectors_btd = _vectors(video_bthwc)
    return _distance(vectors_btd[:, 1:], vectors_btd[:, :-1])


def _vectors(video_bthwc: np.ndarray) -> np.ndarray:
    unit_bthwc = pixels.as_unit(video_bthwc)
    return unit_bthwc.reshape(*unit_bthwc.shape[:2], -1).astype(np.float64)


def _distance(first_bpd: np.ndarray, second_bpd: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(first_bpd - second_bpd).mean(2))


def frame_distances(video_bthwc: np.ndarray) -> np.ndarray:
    """Returns distances between all frames of a clip, float64 [b, t, t].

    By |x - y|^2 = |x|^2 + |y|^2 - 2 x.y of centred vectors. Squares are rounded to 1e-15
    of the largest, so that equal frames may have a distance of 1e-7 of full scale.
    """
    vectors_btd = _vectors(video_bthwc)
    vectors_btd = vectors_btd - vectors_btd.mean(1, keepdims=True)
    products_btt = vectors_btd @ vectors_btd.swapaxes(1, 2) / vectors_btd.shape[2]
    squares_bt = np.diagonal(products_btt, 0, 1, 2)
    squared_btt = squares_bt[:, :, None] + squares_bt[:, None] - 2 * products_btt
    return np.sqrt(np.maximum(squared_btt, 0))


def repetition(video_bthwc: np.ndarray) -> np.ndarray:
    """Returns the share of frames that repeat an earlier frame, in [0, 1]: float64 [b].

    Frame j is a repetition if, for some i <= j - `LEAST_LAG`,

        D(i, j) <= max(1/2 * median over t of D(t, t + 1), rounding),

    that is, if it is closer to an earlier frame than half the median step. The share is
    of the frames that have such an i. A still video scores 1. Noise hides repetition,
    since it makes all frames differ. Periodic motion (a wheel, a pendulum) counts.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].

    Raises:
      ValueError: fewer than three frames.
    """
    t = np.shape(video_bthwc)[1]
    if t <= LEAST_LAG:
        raise ValueError(f"repetition needs {LEAST_LAG + 1} frames or more, got {t}")
    distance_btt = frame_distances(video_bthwc)
    median_b = np.median(np.diagonal(distance_btt, 1, 1, 2), axis=1)
    limit_b = np.maximum(_SAME * median_b, _ROUNDING)
    nearest = [
        distance_btt[:, j, : j - LEAST_LAG + 1].min(axis=1) for j in range(LEAST_LAG, t)
    ]
    return (np.stack(nearest, 1) <= limit_b[:, None]).mean(1)


def loop_ratio(video_bthwc: np.ndarray) -> np.ndarray:
    """Returns the step from the last frame to the first, in median steps: float64 [b].

        ratio = D(last, first) / median over t of D(t, t + 1)

    1 is a seamless loop, more a jump, less a repeated frame. A clip in which nothing
    moves has NaN, for which `loop_score` is 0.

    Raises:
      ValueError: fewer than three frames.
    """
    if np.shape(video_bthwc)[1] < 3:
        raise ValueError(f"a loop needs 3 frames or more, got {video_bthwc.shape[1]}")
    vectors_btd = _vectors(video_bthwc)
    median_b = np.median(_distance(vectors_btd[:, 1:], vectors_btd[:, :-1]), axis=1)
    last_b = _distance(vectors_btd[:, -1:], vectors_btd[:, :1])[:, 0]
    moves = median_b > _ROUNDING
    return np.where(moves, last_b / np.where(moves, median_b, 1), np.nan)


def loop_score(ratio_b: np.ndarray) -> np.ndarray:
    """Returns min(r, 1 / r): 1 for a seamless loop, 0 where nothing moves."""
    ratio_b = np.nan_to_num(np.asarray(ratio_b, np.float64), nan=0.0)
    return np.where(ratio_b > 1, 1 / np.maximum(ratio_b, 1), ratio_b)
