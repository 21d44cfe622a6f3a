"""Where a video cuts to another shot, and whether that is where it was asked to.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sora_jax.data import cuts
from sora_jax.evals import pixels


def detect(video_bthwc: np.ndarray) -> list[list[int]]:
    """Finds the first frames of new shots in each clip.

    What a cut is, `data.cuts.find` says.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1], 3 frames or more.

    Raises:
      ValueError: fewer than three frames.
    """
    video_bthwc = pixels.as_unit(video_bthwc)
    if video_bthwc.shape[1] < 3:
        raise ValueError(
            f"cuts are found in 3 frames or more, got {video_bthwc.shape[1]}"
        )
    return [
        cuts.find(np.abs(np.diff(clip_thwc, axis=0)).mean((1, 2, 3), dtype=np.float64))
        for clip_thwc in video_bthwc
    ]


@dataclasses.dataclass(frozen=True)
class Match:
    """Cuts that are where they were asked for, cuts found, and cuts asked for."""

    right: int
    found: int
    given: int

    @property
    def f1(self) -> float:
        """2 right / (found + given); 1 where none was found and none given."""
        both = self.found + self.given
        return 2 * self.right / both if both else 1.0

    def __add__(self, other: "Match") -> "Match":
        """Pools the cuts of two clips."""
        return Match(
            self.right + other.right,
            self.found + other.found,
            self.given + other.given,
        )


def match(found: Sequence[int], given: Sequence[int], *, tolerance: int = 1) -> Match:
    """Pairs the cuts that were found with those that were asked for, one to one.

    Args:
      found, given: frames with which shots begin.
      tolerance: frames by which a pair may differ.

    Raises:
      ValueError: the tolerance is negative, or a time stands twice.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}, it must not be negative")
    for name, times in (("found", found), ("given", given)):
        if len(set(times)) < len(times):
            raise ValueError(f"a cut stands twice in {name}: {list(times)}")
    # On a line, taking in order the first that is near enough pairs as many as can be.
    left, right = sorted(given), 0
    for time in sorted(found):
        near = next((g for g in left if abs(g - time) <= tolerance), None)
        if near is not None:
            left.remove(near)
            right += 1
    return Match(right, len(found), len(given))


def timing(
    video_bthwc: np.ndarray, given: Sequence[Sequence[int]], *, tolerance: int = 1
) -> list[Match]:
    """Compares the cuts of each clip with those that it was asked to have.

    The F1 of a set is that of the sum of its matches, not the mean of theirs.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      given: for each clip the frames with which new shots should begin.
      tolerance: frames by which a cut may be off.

    Raises:
      ValueError: as many times as clips are needed, or as `detect` and `match`.
    """
    if len(given) != len(video_bthwc):
        raise ValueError(f"{len(given)} lists of cuts for {len(video_bthwc)} clips")
    found = detect(video_bthwc)
    return [match(f, g, tolerance=tolerance) for f, g in zip(found, given, strict=True)]
