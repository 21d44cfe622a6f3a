"""Which way the things of a clip move, measured in its pixels.

Between two frames each pixel stays, or moves with one of a few shifts. A shift explains a
pixel of the first frame if the second has the same colour at its end, and a pixel of the
second if the first has it at its start. The shifts are found one after another, each the
one that explains most of the change that is left (matching pursuit). Changed pixels
behind or before a moving thing, where no shift holds, count for none.

Letters: t time, h height, w width, c channel, p pixels.
"""

import dataclasses
import itertools

import numpy as np
import PIL.Image

from sora_jax.data import samples

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

_SIDE = 40  # pixels of the longer side of what is compared
_REACH = 8  # pixels of it that a thing moves at most between two frames
_PAIRS = 4  # of frames that are compared
_SHIFTS = 3  # of a pair
_CHANGED = 0.05  # of the range of colours; less is noise and compression
_MOST_CHANGED = 0.5  # share of the pixels of a pair; more is a moving camera or a cut
_LEAST_GAIN = 0.15  # share of a pair's change that a shift explains


@dataclasses.dataclass(frozen=True)
class Motion:
    """How much of the explained change each direction has, summed over pairs of frames.

    Attributes:
      shares: of each of DIRECTIONS, 0 to 1. A diagonal shift counts for two of them.
      is_known: whether anything moves before a background that stands still.
    """

    shares: dict[str, float]
    is_known: bool


UNKNOWN = Motion(dict.fromkeys(DIRECTIONS, 0.0), False)


def measure(frames_thwc: np.ndarray) -> Motion:
    """Measures which way things move in a clip, uint8[t, h, w, 3].

    Unknown where the camera moves, where nothing does, and where the shifts are too large
    or too small to be seen.
    """
    small = [
        _small(frames_thwc[t]) for t in samples.evenly(len(frames_thwc), _PAIRS + 1)
    ]
    gains, seen = dict.fromkeys(DIRECTIONS, 0.0), 0.0
    for one_hwc, other_hwc in itertools.pairwise(small):
        changed_hw = _distance(one_hwc, other_hwc) > _CHANGED
        if changed_hw.mean() > _MOST_CHANGED:
            return UNKNOWN
        if not changed_hw.any():
            continue
        part = _around(changed_hw)
        for (dy, dx), gain in _shifts(one_hwc[part], other_hwc[part]):
            seen += gain
            for name, (y, x) in DIRECTIONS.items():
                # A part of the shift: a thing that goes mostly up does not go left.
                if dy * y + dx * x > 0.4 * max(abs(dy), abs(dx)):
                    gains[name] += gain
    if not seen:
        return UNKNOWN
    return Motion({name: gain / seen for name, gain in gains.items()}, True)


def _small(frame_hwc: np.ndarray) -> np.ndarray:
    """A frame of at most _SIDE pixels a side, float32 in [0, 1]."""
    height, width = frame_hwc.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = PIL.Image.fromarray(frame_hwc)
    if scale < 1:
        image = image.resize(size, PIL.Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def _distance(one_hwc: np.ndarray, other_hwc: np.ndarray) -> np.ndarray:
    return np.abs(one_hwc - other_hwc).max(-1)


def _around(changed_hw: np.ndarray) -> tuple[slice, slice]:
    """The rectangle of the pixels that matter: changed ones and those within reach."""
    return tuple(
        slice(max(0, where.min() - _REACH), where.max() + _REACH + 1)
        for where in np.nonzero(changed_hw)
    )


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """Where a shift starts and ends that stays within an axis."""
    return (
        slice(max(0, -shift), size - max(0, shift)),
        slice(max(0, shift), size - max(0, -shift)),
    )


def _shifts(
    one_hwc: np.ndarray, other_hwc: np.ndarray
) -> list[tuple[tuple[int, int], float]]:
    """Returns ((dy, dx), the change that it explains) of up to _SHIFTS shifts."""
    height, width = one_hwc.shape[:2]
    # What is not explained yet, of pixels of the first frame and of the second.
    left_2hw = np.stack([_distance(one_hwc, other_hwc)] * 2)
    tries = []
    for dy in range(max(-_REACH, 1 - height), min(_REACH, height - 1) + 1):
        for dx in range(max(-_REACH, 1 - width), min(_REACH, width - 1) + 1):
            if dy or dx:
                start, end = zip(_overlap(height, dy), _overlap(width, dx), strict=True)
                apart_hw = _distance(one_hwc[start], other_hwc[end])
                tries.append(((dy, dx), (start, end), apart_hw))
    # Of several that explain as much, within the noise, the shortest.
    tries.sort(key=lambda one: one[0][0] ** 2 + one[0][1] ** 2)
    found, least = [], _LEAST_GAIN * left_2hw.sum()
    for _ in range(_SHIFTS):
        best, most = None, least
        for one in tries:
            _, parts, apart_hw = one
            gain = sum(
                np.maximum(left_hw[part] - apart_hw, 0).sum()
                for left_hw, part in zip(left_2hw, parts, strict=True)
            )
            if gain > most * (1.02 if best else 1.0):
                best, most = one, gain
        if best is None:
            break
        shift, parts, apart_hw = best
        found.append((shift, float(most)))
        for left_hw, part in zip(left_2hw, parts, strict=True):
            left_hw[part] = np.minimum(left_hw[part], apart_hw)
    return found
