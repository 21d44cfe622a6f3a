"""The temporal metrics by name, and the order in which each must rank spoilt clips.

Each metric lists chains of rows from best to worst. A row is the clips themselves or one
of the controls made from them (`controls.py`). `control_tables.py` tests the chains
against bootstrap intervals. Where a chain cannot hold, the metric says why.

A still video wins metrics of steadiness. In these metrics a clip in which nothing moves
(`motion.STILL`) gets the worst value, and so does one for which the metric is undefined.

Letters: n clips, t frames, h height, w width, c channels, d features.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sora_jax.evals.features import networks
from sora_jax.evals.metrics import (
    consistency,
    controls,
    cuts,
    long_video,
    motion,
    temporal,
)

GIVEN = "as given"
SEAM = "seam score"
CAMERA = "camera"  # a kind of set: the camera moves
Chain = tuple[str, ...]  # names of rows, the best first


class Clips:
    """The clips of a row, with the quantities that several metrics share.

    Args:
      video_nthwc: uint8.
      fps: frames per second.
      seams: first frames of new chunks, where seams may be seen; controls have one.
    """

    def __init__(self, video_nthwc: np.ndarray, fps: float, seams: Sequence[int] = ()):
        self.video_nthwc, self.fps, self.seams = video_nthwc, fps, tuple(seams)

    @functools.cached_property
    def _motions(self) -> tuple[temporal.Motion, temporal.Motion]:
        return temporal.estimate_both(self.video_nthwc)

    @property
    def forward(self) -> temporal.Motion:
        return self._motions[0]

    @property
    def backward(self) -> temporal.Motion:
        """The motion of the reversed clips."""
        return self._motions[1]

    @functools.cached_property
    def steadiness(self) -> dict[str, np.ndarray]:
        return temporal.measure(self.video_nthwc, self.forward)

    @functools.cached_property
    def degree(self) -> dict[str, np.ndarray]:
        return motion.dynamic_degree(self.forward, fps=self.fps)

    @functools.cached_property
    def smoothness(self) -> np.ndarray:
        return motion.smoothness(self.video_nthwc, self.backward, exact=False)

    @functools.cached_property
    def drift(self) -> dict[str, np.ndarray]:
        found = long_video.drift(self.video_nthwc, fps=self.fps)
        return {name: np.abs(slope_n) for name, slope_n in found.items()}

    def cut_f1(self, asked: Sequence[int]) -> np.ndarray:
        """F1 of each clip's cuts against those that were asked for."""
        found = cuts.timing(self.video_nthwc, [asked] * len(self.video_nthwc))
        return np.array([match.f1 for match in found])


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric with one value per clip, and the orders that it must give.

    Attributes:
      name: shown in tables.
      measure: returns values float64 [n].
      orders: chains of rows, best first; `GIVEN` is the unspoilt clips.
      higher: whether higher is better.
      still_counts: value of a clip in which nothing moves; None: as measured.
      cannot: kind of set on which the orders cannot hold -> why.
      note: what the metric does not see.
    """

    name: str
    measure: Callable[[Clips], np.ndarray]
    orders: tuple[Chain, ...]
    higher: bool = False
    still_counts: float | None = None
    cannot: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def values(self, clips: Clips) -> np.ndarray:
        """Returns values [n]; undefined ones count as that of a still clip."""
        values_n = np.asarray(self.measure(clips), np.float64)
        if self.still_counts is None:
            return values_n
        moves = clips.degree["dynamic_degree"] > motion.STILL
        counts = moves & ~np.isnan(values_n)
        return np.where(counts, values_n, self.still_counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Other clips of the same kind, to which set metrics measure, and a network."""

    clips: Clips
    network: networks.ToyFeatures


@dataclasses.dataclass(frozen=True)
class SetMetric:
    """A Frechet distance to other clips, and the orders that it must give.

    Attributes:
      name, orders, cannot, note: as in `Metric`; lower is better.
      describe: returns features [n, d] of clips; None where they are too short for the
        network.
      one_way: chains that hold if all clips move in the same direction.
    """

    name: str
    describe: Callable[[Clips, networks.ToyFeatures], np.ndarray | None]
    orders: tuple[Chain, ...]
    one_way: tuple[Chain, ...] = ()
    cannot: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


def _consistent(frame_features) -> Callable[[Clips], np.ndarray]:
    """Consistency; undefined for clips in which no frame has any features."""

    def measure(clips: Clips) -> np.ndarray:
        vectors_btd = consistency.of_frames(clips.video_nthwc, frame_features)
        found_b = vectors_btd.any(axis=(1, 2))
        return np.where(found_b, consistency.similarity(vectors_btd), np.nan)

    return measure


_STILL_LAST = ((GIVEN, controls.SHUFFLED, controls.STILL),)
METRICS: tuple[Metric, ...] = (
    Metric(
        "warping error",
        lambda c: c.steadiness["warping_error"],
        _STILL_LAST,
        still_counts=1.0,
        note="a blurred clip wins; pixels that cannot be tracked, as at a cut, are left out",
    ),
    Metric(
        "flicker",
        lambda c: c.steadiness["flicker"],
        _STILL_LAST,
        still_counts=1.0,
        note="a blurred clip wins",
    ),
    Metric(
        "smoothness",
        lambda c: c.smoothness,
        tuple(
            (GIVEN, name)
            for name in (
                controls.SHUFFLED,
                controls.STILL,
                controls.NOISE,
                controls.TWICE,
                controls.CUT,
            )
        ),
        higher=True,
        note="a reversed clip is as smooth; a blurred or fading one wins",
    ),
    Metric(
        "dynamic degree",
        lambda c: c.degree["dynamic_degree"],
        ((GIVEN, controls.STILL),),
        higher=True,
        note="an amount, not a quality: a shuffled clip has more",
    ),
    Metric(
        "dynamic",
        lambda c: c.degree["dynamic"],
        ((GIVEN, controls.STILL),),
        higher=True,
        note="share of clips that move",
    ),
    Metric(
        "subject consistency",
        _consistent(consistency.subject_colours),
        ((GIVEN, controls.CUT, controls.STILL),),
        higher=True,
        still_counts=0.0,
        note="of colours: sees neither positions nor the order of frames",
    ),
    Metric(
        "background consistency",
        _consistent(consistency.background_greys),
        ((GIVEN, controls.CUT, controls.STILL),),
        higher=True,
        still_counts=0.0,
        cannot={CAMERA: "a moving camera changes the background"},
        note="of greys in 16 cells: does not see the order of frames",
    ),
    *(
        Metric(
            f"{name} drift",
            lambda c, name=name: c.drift[name],
            ((GIVEN, controls.DRIFT, controls.STILL),),
            still_counts=1.0,
            cannot={CAMERA: "zoom changes how much of the frame a colour fills"}
            if name == "saturation"
            else {},
            note="absolute slope per second; a shuffled clip has less",
        )
        for name in long_video.SERIES
    ),
    Metric(
        SEAM,
        lambda c: long_video.seam_score(c.video_nthwc, c.seams),
        tuple(
            (GIVEN, name, controls.STILL) for name in (controls.DROPPED, controls.TWICE)
        ),
        still_counts=1000.0,
        note="sees the seam only",
    ),
    Metric(
        "repetition",
        lambda c: long_video.repetition(c.video_nthwc),
        ((GIVEN, controls.LOOPED, controls.STILL),),
        note="noise hides it",
    ),
    Metric(
        "loop score",
        lambda c: long_video.loop_score(long_video.loop_ratio(c.video_nthwc)),
        ((controls.LOOPED, GIVEN, controls.STILL),),
        higher=True,
        note="of a clip asked to loop; in a shuffled clip every step is as large",
    ),
    Metric(
        "cut where asked",
        lambda c: c.cut_f1(c.seams),
        tuple(
            (controls.CUT, name) for name in (GIVEN, controls.STILL, controls.SHUFFLED)
        ),
        higher=True,
        note="F1, of clips asked to cut at the seam",
    ),
    Metric(
        "no cut unasked",
        lambda c: c.cut_f1([]),
        ((GIVEN, controls.CUT, controls.STILL),),
        higher=True,
        still_counts=-1.0,
        note="F1, of clips asked to be one shot",
    ),
    Metric(
        "sharpness",
        lambda c: long_video.series(c.video_nthwc)["sharpness"].mean(1),
        ((GIVEN, controls.BLURRED),),
        higher=True,
        note="a noised clip has more",
    ),
)


def _network_features(clips: Clips, network: networks.ToyFeatures) -> np.ndarray | None:
    if clips.video_nthwc.shape[1] < network.num_frames:
        return None
    return network(clips.video_nthwc)


FVD = SetMetric(
    "FVD-toy",
    _network_features,
    (
        (GIVEN, controls.BLURRED, controls.SHUFFLED),
        (controls.BLURRED, controls.STILL),
        (GIVEN, controls.NOISE),
    ),
    one_way=((controls.BLURRED, controls.REVERSED),),
    note="sees a reversal only if directions are not equally frequent",
)
MOTION_DISTANCE = SetMetric(
    "motion distance",
    lambda clips, network: motion.histograms(clips.forward, fps=clips.fps),
    (
        (GIVEN, controls.SHUFFLED),
        (GIVEN, controls.STILL),
        (controls.BLURRED, controls.SHUFFLED),
    ),
    one_way=((controls.BLURRED, controls.REVERSED),),
    note="sees motion only, so a blur hardly counts; shuffled and still are as far away",
)
SETS = (FVD, MOTION_DISTANCE)
