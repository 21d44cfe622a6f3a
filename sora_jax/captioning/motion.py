"""Which way the things of a clip move, measured in its pixels.

Between two frames each pixel stays, or moves with one of a few shifts. A shift explains a
pixel of the first frame if the second has the same colour at its end, and a pixel of the
second if the first has it at its start. The shifts are found one after another, each the
one that explains most of the change that is left (matching pursuit). Changed pixels
behind or before a moving thing, where no shift holds, count for none.

Letters: t time, h height, w width, c channel; p changed pixels, s shifts, 2 (y, x), k the
first and the second frame.
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


def _all_shifts() -> np.ndarray:
    steps = np.arange(-_REACH, _REACH + 1)
    shifts_s2 = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    lengths_s = (shifts_s2**2).sum(-1)
    return shifts_s2[np.argsort(lengths_s, kind="stable")][1:]


_SHIFTS_S2 = _all_shifts()  # (dy, dx), the shortest first


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
        for (dy, dx), gain in _shifts(one_hwc, other_hwc, changed_hw):
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


def _shifts(
    one_hwc: np.ndarray, other_hwc: np.ndarray, changed_hw: np.ndarray
) -> list[tuple[tuple[int, int], float]]:
    """Returns ((dy, dx), the change that it explains) of up to _SHIFTS shifts."""
    shifts_s2 = _SHIFTS_S2
    places_p2 = np.argwhere(changed_hw)
    # Of the changed pixels of the first frame where they go, and of those of the second
    # where they come from.
    pairs = ((one_hwc, other_hwc, shifts_s2), (other_hwc, one_hwc, -shifts_s2))
    apart_ksp = np.stack(
        [_apart(here, there, places_p2, by_s2) for here, there, by_s2 in pairs]
    )
    change_p = _distance(one_hwc, other_hwc)[changed_hw]
    left_kp = np.stack([change_p, change_p])  # not explained yet
    found, least = [], _LEAST_GAIN * left_kp.sum()
    for _ in range(_SHIFTS):
        gains_s = np.maximum(left_kp[:, None] - apart_ksp, 0).sum((0, 2))
        # Of several that explain as much, within the noise, the shortest.
        best = int(np.argmax(gains_s >= 0.98 * gains_s.max()))
        if gains_s[best] < least:
            break
        dy, dx = shifts_s2[best].tolist()
        found.append(((dy, dx), float(gains_s[best])))
        left_kp = np.minimum(left_kp, apart_ksp[:, best])
    return found


def _apart(
    here_hwc: np.ndarray,
    there_hwc: np.ndarray,
    places_p2: np.ndarray,
    by_s2: np.ndarray,
) -> np.ndarray:
    """How far colours are from those at the other end of each shift; inf outside."""
    margin = ((_REACH, _REACH), (_REACH, _REACH), (0, 0))
    padded = np.pad(there_hwc, margin, constant_values=np.inf)
    y_sp, x_sp = np.moveaxis(places_p2[None] + by_s2[:, None] + _REACH, -1, 0)
    return _distance(here_hwc[*places_p2.T], padded[y_sp, x_sp])
