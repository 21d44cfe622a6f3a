"""Where a video cuts to another shot, found by how much its pixels change.

Letters: t frames, p pairs of neighbouring frames (t - 1), h height, w width, c channel.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# A cut changes pixels by at least this share of full scale on average, and by this factor
# more than the steps around it, as in PySceneDetect's AdaptiveDetector.
_LEAST_CHANGE, _RATIO, _AROUND = 0.045, 3.0, 3
_REPEATED = 0.5 / 255  # the change of a step that repeats a frame is below this
_SIDE = 128  # pixels of the shorter side that are looked at, at least


def find(change_p: Sequence[float]) -> list[int]:
    """Finds the first frames of new shots.

    With C_t the mean absolute difference of frames t - 1 and t, frame t is a cut where

        C_t >= 0.045 and C_t >= 3 * median of C_s, 0 < |s - t| <= 3.

    Both conditions are needed: a fast pan changes every pixel, but in every step; noise
    in a still video exceeds its median, but not the first limit. Where frames are
    repeated on both sides of a change, as in a slow video, repeats are left out of the
    median. Dissolves are not found, nor cuts between shots that look alike.

    Args:
      change_p: C_1, C_2, ..., two or more, of full scale.
    """
    return [p + 1 for p in range(len(change_p)) if _is_cut(change_p, p)]


def _is_cut(change_p: Sequence[float], p: int) -> bool:
    before, after = [*change_p[max(0, p - _AROUND) : p]], [*change_p[p + 1 :][:_AROUND]]
    around = before + after
    if max([*before[-1:], *after[:1]], default=0.0) < _REPEATED:
        around = [change for change in around if change >= _REPEATED] or [0.0]
    return change_p[p] >= max(_LEAST_CHANGE, _RATIO * float(np.median(around)))


def shots(frames_thwc: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns (first frame, one past the last) of each shot of a clip uint8.

    Large frames are subsampled.
    """
    seen = [_subsampled(frame_hwc) for frame_hwc in frames_thwc]
    change_p = [
        _change(before, after) for before, after in zip(seen, seen[1:], strict=False)
    ]
    starts = [0, *(find(change_p) if len(change_p) > 1 else ())]
    return tuple(zip(starts, [*starts[1:], len(frames_thwc)], strict=True))


def flagged(frames_hwc: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields each frame uint8 of a video, and whether it begins a new shot.

    The cuts are those of `find`, for videos of any length: a frame is yielded as soon as
    the three different frames after it are known. A frame that is repeated, the same
    array again, is no step of its own.
    """
    held: collections.deque[list] = collections.deque()  # [frame, its number, repeats]
    change_p: collections.deque[float] = collections.deque(maxlen=2 * _AROUND + 1)
    seen = None

    def released(number_of_last: int) -> Iterator[tuple[np.ndarray, bool]]:
        frame_hwc, number, repeats = held.popleft()
        # `change_p` ends with the step to the last frame; this is the step to this one.
        p = len(change_p) - 1 - (number_of_last - number)
        yield frame_hwc, number > 0 and _is_cut([*change_p], p)
        for _ in range(repeats):
            yield frame_hwc, False

    number = -1
    for frame_hwc in frames_hwc:
        if held and frame_hwc is held[-1][0]:
            held[-1][2] += 1
            continue
        before, seen = seen, _subsampled(frame_hwc)
        if before is not None:
            change_p.append(_change(before, seen))
        number += 1
        held.append([frame_hwc, number, 0])
        if len(held) > _AROUND:
            yield from released(number)
    while held:
        yield from released(number)


def _subsampled(frame_hwc: np.ndarray) -> np.ndarray:
    step = max(1, min(frame_hwc.shape[:2]) // _SIDE)
    return frame_hwc[::step, ::step].astype(np.int16)


def _change(before_hwc: np.ndarray, after_hwc: np.ndarray) -> float:
    return float(np.abs(after_hwc - before_hwc).mean()) / 255
