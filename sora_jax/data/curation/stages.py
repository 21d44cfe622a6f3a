"""The stages that score clips.

A stage is a module, or an object, with a name, a version, and a pure function from the
decoded frames of one clip to named numbers. It decides nothing: that is up to the policy.
The version is part of what a folder was made with; raise it when a score changes.

Those of `STAGES` need NumPy and SciPy alone. A network, such as one that judges aesthetics,
is added to `STAGES` in code as one more `Stage`, which loads its weights on the first call
in each process. A policy names stages and nothing else, so that no file can bring code.

Letters: t time, h height, w width, c channel.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from sora_jax.data.curation import (
    brightness,
    cut_count,
    letterbox,
    motion,
    sharpness,
    text_area,
)


class Stage(Protocol):
    """What scores clips.

    Attributes:
      NAME: of the stage, as policies name it.
      VERSION: raised whenever a score of the same clip changes.
      SCORES: what each of its scores means; no two stages share a name of a score.
    """

    NAME: str
    VERSION: int
    SCORES: Mapping[str, str]

    def score(self, frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
        """Returns the scores of a clip uint8[t, h, w, c]; finite numbers."""


STAGES: dict[str, Stage] = {
    stage.NAME: stage
    for stage in (brightness, cut_count, letterbox, motion, sharpness, text_area)
}
_DIGITS = 6


def scores_of(names: Collection[str]) -> dict[str, str]:
    """Returns what the scores of these stages mean."""
    return {
        score: meaning
        for name in names
        for score, meaning in STAGES[name].SCORES.items()
    }


def run(
    names: Collection[str], frames_thwc: np.ndarray, fps: float
) -> dict[str, float]:
    """Returns the scores of a clip by these stages, with six significant digits.

    The last digits of sums differ between processors.

    Raises:
      ValueError: a stage gave other scores than it names, or one that is not finite.
    """
    found = {}
    for name in names:
        scores = STAGES[name].score(frames_thwc, fps)
        if scores.keys() != STAGES[name].SCORES.keys():
            raise ValueError(
                f"stage {name!r} gave the scores {sorted(scores)}; it says "
                f"{sorted(STAGES[name].SCORES)}"
            )
        if not np.isfinite([*scores.values()]).all():
            raise ValueError(f"stage {name!r} gave {scores}, not finite numbers")
        found |= {key: float(f"{x:.{_DIGITS}g}") for key, x in scores.items()}
    return found
