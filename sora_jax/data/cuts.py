"""Where a video cuts to another shot, found by how much its pixels change.

Letters: t frames, p pairs of neighbouring frames (t - 1), h height, w width, c channel.
"""

from collections.abc import Sequence

import numpy as np

# A cut changes pixels by at least this share of full scale on average, and by this factor
# more than the steps around it, as in PySceneDetect's AdaptiveDetector.
_LEAST_CHANGE, _RATIO, _AROUND = 0.045, 3.0, 3
_SIDE = 128  # pixels of the shorter side that are looked at, at least


def find(change_p: Sequence[float]) -> list[int]:
    """Finds the first frames of new shots.

    With C_t the mean absolute difference of frames t - 1 and t, frame t is a cut where

        C_t >= 0.045 and C_t >= 3 * median of C_s, 0 < |s - t| <= 3.

    Both conditions are needed: a fast pan changes every pixel, but in every step; noise
    in a still video exceeds its median, but not the first limit. Dissolves are not
    found, nor cuts between shots that look alike.

    Args:
      change_p: C_1, C_2, ..., two or more, of full scale.
    """
    times = []
    for p, change in enumerate(change_p):
        around = np.r_[change_p[max(0, p - _AROUND) : p], change_p[p + 1 :][:_AROUND]]
        if change >= max(_LEAST_CHANGE, _RATIO * np.median(around)):
            times.append(p + 1)
    return times


def shots(frames_thwc: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns (first frame, one past the last) of each shot of a clip uint8.

    Large frames are subsampled.
    """
    num_frames, height, width = frames_thwc.shape[:3]
    step = max(1, min(height, width) // _SIDE)
    seen_thwc = frames_thwc[:, ::step, ::step].astype(np.int16)
    change_p = [
        np.abs(after - before).mean() / 255
        for before, after in zip(seen_thwc, seen_thwc[1:], strict=False)
    ]
    starts = [0, *(find(change_p) if len(change_p) > 1 else ())]
    return tuple(zip(starts, [*starts[1:], num_frames], strict=True))
