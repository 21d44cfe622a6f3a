"""What goes wrong in long videos: slow drift, seams between chunks, repetition; and loops.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1), h height, w width, c
colour channels, d features. Frame distances are root mean squares of the difference of
two frames in units of full scale, or of their feature vectors where a function from
frames to vectors is given.
"""

from collections.abc import Sequence

import numpy as np

from sora_jax.evals import pixels
from sora_jax.evals.metrics import consistency

SERIES = ("brightness", "contrast", "saturation", "sharpness")
_LUMINANCE = np.array([0.299, 0.587, 0.114])
# Of a seam's surprise: the spread of the other differences is taken to be no less than
# this share of their median, and than a tenth of a step of 8 bits. Without it clips of
# perfectly even motion would find everything surprising.
_LEAST_SPREAD, _LEAST_STEP = 0.1, 0.1 / 255
LEAST_OTHERS = 4
# A frame repeats an earlier one where it is nearer to it than half a usual step.
_SAME = 0.5
# Distance that no change of the picture explains: rounding to 8 bits, on the mean.
_ROUNDING = 0.3 / 255


def series(video_bthwc: np.ndarray) -> dict[str, np.ndarray]:
    """How bright, rich in contrast, colourful and sharp each frame is: [b, t] each.

    With Y the luminance, in units of full scale:
      brightness: mean of Y.
      contrast: standard deviation of Y.
      saturation: mean over pixels of the largest less the smallest channel.
      sharpness: mean length of the gradient of Y (central differences), a pixel.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1], frames of 2 pixels a side or more.
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
    """Slopes of `series` over time, in their units a second: float64 [b] each.

    Theil's and Sen's slope, the median of (y_j - y_i) / (j - i) over all pairs of
    frames, which up to 29 % of outlying frames cannot move. Zero is no drift, in
    either direction. A still video has none.

    Raises:
      ValueError: fewer than three frames, or fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}, it must be positive")
    if video_bthwc.shape[1] < 3:
        raise ValueError(f"drift needs 3 frames or more, got {video_bthwc.shape[1]}")
    return {name: fps * slope(values) for name, values in series(video_bthwc).items()}


def slope(values_bt: np.ndarray) -> np.ndarray:
    """Theil and Sen's slope per frame of each row: float64 [b]."""
    from scipy import stats  # here, since importing it takes a second

    return np.array([stats.theilslopes(values_t).slope for values_t in values_bt])


def seam_score(video_bthwc: np.ndarray, seams: Sequence[int]) -> np.ndarray:
    """How far the steps at known borders stand out from the others: float64 [b].

    With D_t the distance of frames t - 1 and t, and S the seams,

        z_s = (D_s - median of D_t) / max(1.4826 median of |D_t - median|, floor)

    over t not in S; the score is the mean of |z_s|. The floor is a tenth of the median
    and a tenth of a step of 8 bits. Too large a step (frames were dropped, the scene
    jumps) and too small a one (a frame stands twice) count alike. Around 1 is no seam.
    A still video has 0: where nothing moves no seam is seen.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      seams: the frames with which a new chunk begins, the same in all clips.

    Raises:
      ValueError: a seam is no frame but the first, or there are fewer than 4 steps
        that are none.
    """
    t = np.shape(video_bthwc)[1]
    seams = sorted(set(seams))
    if not seams or seams[0] < 1 or seams[-1] >= t:
        raise ValueError(f"seams are frames 1 to {t - 1}, got {seams}")
    others = [i - 1 for i in range(1, t) if i not in seams]
    if len(others) < LEAST_OTHERS:
        raise ValueError(
            f"{len(others)} steps are no seam, {LEAST_OTHERS} or more are needed"
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


def steps(
    video_bthwc: np.ndarray, features: consistency.FrameFeatures | None = None
) -> np.ndarray:
    """Distances of neighbouring frames, float64 [b, p]."""
    vectors_btd = consistency.of_frames(video_bthwc, features or _pixels)
    return _apart(vectors_btd[:, 1:], vectors_btd[:, :-1])


def _apart(first_bpd: np.ndarray, second_bpd: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(first_bpd - second_bpd).mean(2))


def frame_distances(
    video_bthwc: np.ndarray, features: consistency.FrameFeatures | None = None
) -> np.ndarray:
    """Distances of all frames of a clip from one another, float64 [b, t, t].

    By |x - y|^2 = |x|^2 + |y|^2 - 2 x.y of vectors less their mean; that rounds squares
    to 1e-15 of the largest, so frames that are equal may be 1e-7 of full scale apart.
    """
    vectors_btd = consistency.of_frames(video_bthwc, features or _pixels)
    vectors_btd = vectors_btd - vectors_btd.mean(1, keepdims=True)
    products_btt = vectors_btd @ vectors_btd.swapaxes(1, 2) / vectors_btd.shape[2]
    squares_bt = np.diagonal(products_btt, 0, 1, 2)
    away_btt = squares_bt[:, :, None] + squares_bt[:, None] - 2 * products_btt
    return np.sqrt(np.maximum(away_btt, 0))


def _pixels(frames_nhwc: np.ndarray) -> np.ndarray:
    return frames_nhwc.reshape(len(frames_nhwc), -1)


def repetition(
    video_bthwc: np.ndarray,
    *,
    least_lag: int = 2,
    features: consistency.FrameFeatures | None = None,
) -> np.ndarray:
    """Share of the frames that show an earlier frame again, in [0, 1]: float64 [b].

    Frame j repeats where, for an i <= j - least_lag,

        D(i, j) <= max(1/2 * median over t of D(t, t + 1), rounding):

    it is nearer to what was shown before than half a usual step. The share is of the
    frames that have an i. A still video has 1. Noise hides repetition, as it keeps all
    frames apart; a thing that truly comes back (a wheel, a pendulum) counts.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      least_lag: how far back a frame must be to count as shown earlier.
      features: what frames are compared by; None: their pixels.

    Raises:
      ValueError: the clips are not longer than least_lag, or that is below 2.
    """
    t = np.shape(video_bthwc)[1]
    if not 2 <= least_lag < t:
        raise ValueError(f"least_lag is {least_lag}, for {t} frames it is 2 to {t - 1}")
    distance_btt = frame_distances(video_bthwc, features)
    usual_b = np.median(np.diagonal(distance_btt, 1, 1, 2), axis=1)
    limit_b = np.maximum(_SAME * usual_b, _ROUNDING)
    nearest = [
        distance_btt[:, j, : j - least_lag + 1].min(axis=1) for j in range(least_lag, t)
    ]
    return (np.stack(nearest, 1) <= limit_b[:, None]).mean(1)


def loop_ratio(
    video_bthwc: np.ndarray, features: consistency.FrameFeatures | None = None
) -> np.ndarray:
    """The step from the last frame to the first, in usual steps: float64 [b].

        ratio = D(last, first) / median over t of D(t, t + 1)

    One is a seamless loop; more is a jump, less a frame that stands twice. It is NaN
    for a clip in which nothing moves, which is no loop (`loop_score` gives it 0).

    Raises:
      ValueError: fewer than three frames.
    """
    if np.shape(video_bthwc)[1] < 3:
        raise ValueError(f"a loop needs 3 frames or more, got {video_bthwc.shape[1]}")
    vectors_btd = consistency.of_frames(video_bthwc, features or _pixels)
    usual_b = np.median(_apart(vectors_btd[:, 1:], vectors_btd[:, :-1]), axis=1)
    back_b = _apart(vectors_btd[:, -1:], vectors_btd[:, :1])[:, 0]
    moves = usual_b > _ROUNDING
    return np.where(moves, back_b / np.where(moves, usual_b, 1), np.nan)


def loop_score(ratio_b: np.ndarray) -> np.ndarray:
    """min(r, 1 / r) of loop ratios: 1 for a seamless loop, 0 where nothing moves."""
    ratio_b = np.nan_to_num(np.asarray(ratio_b, np.float64), nan=0.0)
    return np.where(ratio_b > 1, 1 / np.maximum(ratio_b, 1), ratio_b)
