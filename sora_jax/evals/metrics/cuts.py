"""Where a video cuts to another shot, and whether that is where it was asked to.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sora_jax.data import cuts
from sora_jax.evals import pixels


def detect(video_bthwc: np.ndarray) -> list[list[int]]:
    """Finds the first frame of each new shot, by the rule of `data.cuts.find`.

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
    """Numbers of cuts: right (found where they were asked for), found, asked for."""

    right: int
    found: int
    asked: int

    @property
    def f1(self) -> float:
        """2 right / (found + asked); 1 where there is neither."""
        both = self.found + self.asked
        return 2 * self.right / both if both else 1.0

    def __add__(self, other: "Match") -> "Match":
        """Pools the cuts of two clips."""
        return Match(
            self.right + other.right,
            self.found + other.found,
            self.asked + other.asked,
        )


def match(found: Sequence[int], asked: Sequence[int], *, tolerance: int = 1) -> Match:
    """Pairs the cuts that were found with those that were asked for, one to one.

    Args:
      found, asked: frames with which shots begin.
      tolerance: frames by which a pair may differ.

    Raises:
      ValueError: the tolerance is negative, or a list has a cut twice.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}, it must not be negative")
    for name, times in (("found", found), ("asked", asked)):
        if len(set(times)) < len(times):
            raise ValueError(f"a cut is listed twice in {name}: {list(times)}")
    # Greedy in order of time: on a line this pairs as many as possible.
    left, right = sorted(asked), 0
    for time in sorted(found):
        near = next((cut for cut in left if abs(cut - time) <= tolerance), None)
        if near is not None:
            left.remove(near)
            right += 1
    return Match(right, len(found), len(asked))


def timing(video_bthwc: np.ndarray, asked: Sequence[Sequence[int]]) -> list[Match]:
    """Compares the cuts of each clip with those that it was asked to have.

    The F1 of a set of clips is that of the sum of their matches.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      asked: for each clip, the frames with which new shots should begin.

    Raises:
      ValueError: other than one list per clip, or as `detect` and `match`.
    """
    if len(asked) != len(video_bthwc):
        raise ValueError(f"{len(asked)} lists of cuts for {len(video_bthwc)} clips")
    return [match(f, a) for f, a in zip(detect(video_bthwc), asked, strict=True)]
