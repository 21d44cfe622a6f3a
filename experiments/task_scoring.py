"""The figures of `task_truth.py`: what a task's result is, against what it should be.

A case is one clip of a task with its truth. A result is a video for a case, by whomever
it was made: the model, or a control. All results go through the same figures. A result
is judged on what the task made; what was given counts only where it must be kept.

A thing that the oracle does not find counts as far away, wrong and still, so that nothing
is won by leaving it out. A still video has no step that is long enough, so that it fails
`frozen`, and with it the figures about the object.

Letters: t frames, p pairs of neighbouring frames (t - 1), h height, w width of a video; x
the two coordinates of a place (right, down); n clips.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage

from sora_jax.data import regions
from sora_jax.evals import statistics
from sora_jax.evals.prompts import toyworld
from sora_jax.toyworld import oracle, rules
from sora_jax.toyworld import scene as scenes
from sora_jax.toyworld.reading import PRESENT, Track

TIER = scenes.TIERS["tw32"]
NEAR = 1.5  # pixels between a thing and its true place
LOST = float(np.hypot(TIER.size, TIER.size))  # that of a thing that is not found
STILL = 0.25  # share of the stated speed below which a thing counts as still
JUMP = 3.0  # steps or frame differences above so many of the usual ones are a cut
# The video VAE changes the fine texture of a frame, which would hide a thing's movement.
_LOW_PASS = 1.5  # standard deviation, pixels
_LEAST_SPREAD = 0.25  # of frame differences, of 255; see `spread`
_TO_DEVIATION = 1.4826  # of the median distance from the mean, to a normal's deviation


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One clip of a task.

    Attributes:
      text: the prompt.
      stated: what it states.
      truth_thwc: what a perfect result shows, uint8.
      path_tx: the true places of the thing's centre.
      given_thw: bool, the pixels of the truth that the task is given.
      colour, shape: of the thing.
      inputs: of the task.
      family: of the scene, whose rule scores the text.
      before_thwc: for edits, the video that is changed.
      old: the colour that must be gone.
      place_x: the thing's place in a reference picture.
    """

    text: str
    stated: scenes.Slots
    truth_thwc: np.ndarray
    path_tx: np.ndarray
    given_thw: np.ndarray
    colour: str
    shape: str
    inputs: Mapping[str, Any]
    family: str = "motion"
    before_thwc: np.ndarray | None = None
    old: str | None = None
    place_x: np.ndarray | None = None

    @property
    def whole_t(self) -> np.ndarray:
        """Which frames are given as a whole."""
        return self.given_thw.all((1, 2))

    @property
    def made_t(self) -> np.ndarray:
        """Which frames are made, in whole or in part; all where none is."""
        made_t = ~self.whole_t
        return made_t if made_t.any() else ~made_t

    def pasted(self, video_thwc: np.ndarray) -> np.ndarray:
        """A video with what is given put into it."""
        return np.where(self.given_thw[..., None], self.truth_thwc, video_thwc)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A video for a case, uint8, and the same before what is given was put into it."""

    video_thwc: np.ndarray
    raw_thwc: np.ndarray

    @classmethod
    def of(cls, video_thwc: np.ndarray) -> "Result":
        return cls(video_thwc, video_thwc)


# -- controls -------------------------------------------------------------------------


def copy(case: Case) -> Result | None:
    """The given frames again and again, or the video before an edit; None if none is."""
    if case.before_thwc is not None:
        return Result.of(case.pasted(case.before_thwc))
    whole = np.flatnonzero(case.whole_t)
    if not len(whole):
        return None
    video_thwc = case.truth_thwc.copy()
    for place, frame in enumerate(np.flatnonzero(~case.whole_t)):
        video_thwc[frame] = case.truth_thwc[whole[place % len(whole)]]
    return Result.of(video_thwc)


def freeze(case: Case) -> Result:
    """The last given frame stands still until the next; without any, the first frame."""
    whole = np.flatnonzero(case.whole_t)
    held = np.arange(len(case.truth_thwc))
    for frame in held:
        before = whole[whole <= frame]
        held[frame] = before[-1] if len(before) else (whole[0] if len(whole) else 0)
    return Result.of(case.pasted(case.truth_thwc[held]))


def paste(case: Case) -> Result | None:
    """What is given, on grey; None if nothing is."""
    if not case.given_thw.any():
        return None
    return Result.of(regions.blanked(case.truth_thwc, case.given_thw))


def others(cases: Sequence[Case]) -> list[Case]:
    """For each case another one: the next whose thing has another colour, if any."""
    found = []
    for n, case in enumerate(cases):
        rest = [*cases[n + 1 :], *cases[:n]] or [case]
        found.append(next((o for o in rest if o.colour != case.colour), rest[0]))
    return found


def another(cases: Sequence[Case]) -> list[Result]:
    """The truth of another clip."""
    return [Result.of(other.truth_thwc) for other in others(cases)]


# -- what is seen in a result ---------------------------------------------------------


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR of two sets of pixels of 255; at most 68 dB, of equal ones."""
    error = np.square(first.astype(float) - second).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-2)))


def changes(video_thwc: np.ndarray) -> np.ndarray:
    """Mean difference of neighbouring low-passed frames, [p], of 255."""
    sigma = (0, _LOW_PASS, _LOW_PASS, 0)
    smooth_thwc = scipy.ndimage.gaussian_filter(video_thwc.astype(float), sigma)
    return np.abs(np.diff(smooth_thwc, axis=0)).mean((1, 2, 3))


def spread(references: Sequence[np.ndarray]) -> float:
    """The usual deviation of a frame difference from the mean of its clip.

    It is pooled over clips, since that of one clip of even motion is about 0, by the
    median, so that single jumps do not count; and it is at least a quarter of a grey
    level, below which a video of 8 bits shows no difference.

    Args:
      references: the frame differences [p] of each clip.
    """
    deviations = [np.abs(changes_p - changes_p.mean()) for changes_p in references]
    pooled = _TO_DEVIATION * float(np.median(np.concatenate(deviations)))
    return max(pooled, _LEAST_SPREAD)


def stated_speed(case: Case) -> float:
    """The least speed, pixels a frame, that the text allows."""
    speed = case.stated.subjects[0].speed if case.stated.subjects else None
    return TIER.fast[0] if speed == "fast" else TIER.slow[0]


@dataclasses.dataclass(frozen=True)
class Context:
    """What results are compared with.

    Attributes:
      changes_p: the usual frame differences of each clip.
      spread: see `spread`.
      pace: mean step of text to video's things; None where it is not needed.
    """

    changes_p: tuple[np.ndarray, ...]
    spread: float
    pace: float | None = None


class Seen:
    """A result as the figures see it.

    Args:
      case: what was asked for.
      result: what was made.
      ceiling: the video VAE's reconstruction of the truth.
      usual_p: frame differences of the clip as it should be.
      spread: their usual deviation; see `spread`.
      pace: see `Context`.
    """

    def __init__(
        self,
        case: Case,
        result: Result,
        ceiling: Result,
        usual_p: np.ndarray,
        spread: float,
        pace: float | None = None,
    ):
        if result.video_thwc.shape != case.truth_thwc.shape:
            raise ValueError(
                f"the result is {list(result.video_thwc.shape)}, the truth "
                f"{list(case.truth_thwc.shape)}"
            )
        self.case, self.result, self.ceiling = case, result, ceiling
        self.usual_p, self.spread, self.reference_pace = usual_p, spread, pace

    @property
    def video_thwc(self) -> np.ndarray:
        return self.result.video_thwc

    @functools.cached_property
    def reading(self) -> oracle.Reading:
        return oracle.read(self.video_thwc)

    @functools.cached_property
    def track(self) -> Track:
        """The thing through time."""
        return self.reading.track(self.case.colour, 1)

    @functools.cached_property
    def errors_t(self) -> np.ndarray:
        """Distance of the thing from its true place in each frame, pixels."""
        away_t = np.linalg.norm(self.track.centre - self.case.path_tx, axis=1)
        return np.where(self.track.seen, away_t, LOST)

    @functools.cached_property
    def steps_p(self) -> np.ndarray:
        """How far the thing goes between neighbouring frames; nan where it is lost."""
        step_p = np.linalg.norm(np.diff(self.track.centre, axis=0), axis=1)
        return np.where(self.track.seen[1:] & self.track.seen[:-1], step_p, np.nan)

    @functools.cached_property
    def changes_p(self) -> np.ndarray:
        return changes(self.video_thwc)

    @functools.cached_property
    def verdict(self) -> dict[str, bool]:
        """The oracle's verdict on the text, by part."""
        prompt = toyworld.Prompt(self.case.text, self.case.stated)
        suite = toyworld.Suite(self.case.family, self.case.family, (prompt,))
        return toyworld.verdicts(suite, [self.reading])[0]


# -- figures of one clip --------------------------------------------------------------


def passed(seen: Seen) -> bool:
    """All that the text states."""
    return seen.verdict[toyworld.PASS]


def motion(seen: Seen) -> bool | None:
    """The stated direction and speed; None where neither is stated."""
    parts = [seen.verdict[p] for p in ("direction", "speed") if p in seen.verdict]
    return all(parts) if parts else None


def motion_at(fps: float) -> Callable[[Seen], bool]:
    """The stated direction and speed at a frame rate: what counts is pixels a second."""

    def figure(seen: Seen) -> bool:
        (subject,) = seen.case.stated.subjects
        if not seen.track.present:
            return False
        velocity_x = seen.track.line[0] * fps / TIER.fps
        ways = {d: np.dot(scenes.DIRECTIONS[d], velocity_x) for d in TIER.directions}
        speed = float(np.linalg.norm(velocity_x))
        is_fast = speed > TIER.speed_limit
        right = subject.speed is None or is_fast == (subject.speed == "fast")
        moves = speed > STILL * TIER.slow[0]
        return bool(moves and right and max(ways, key=ways.get) == subject.direction)

    return figure


def colour_and_shape(seen: Seen) -> bool:
    """What the text states of these."""
    return all(seen.verdict.get(part, True) for part in ("colour", "shape"))


def frozen(seen: Seen) -> bool:
    """In what was made, the thing goes less than a quarter as fast as the text says.

    The middle one of its steps counts, so that it may not stand still and then jump.
    """
    step_p = seen.steps_p[seen.case.made_t[1:]]
    step_p = step_p[~np.isnan(step_p)]
    if 2 * len(step_p) < seen.case.made_t[1:].sum() or not len(step_p):
        return True
    return bool(np.median(step_p) < STILL * stated_speed(seen.case))


def kept(seen: Seen) -> bool:
    """In what was made, the thing has its colour and shape, and it moves."""
    made_thwc = seen.video_thwc[seen.case.made_t]
    thing = scenes.Subject(seen.case.colour, seen.case.shape)
    verdict = rules.attribute(scenes.Slots((thing,)), oracle.read(made_thwc))
    return verdict[toyworld.PASS] and not frozen(seen)


def alone(seen: Seen) -> bool:
    """In what was made, there is one thing of the asked colour, and none of another."""
    found = seen.reading
    counts_tk = np.stack([found.counts(c) for c in found.colours], axis=1)
    own = found.colours.index(seen.case.colour)
    right_t = (counts_tk[:, own] == 1) & (counts_tk.sum(1) == 1)
    return bool(right_t[seen.case.made_t].mean() >= PRESENT)


def exact(seen: Seen) -> bool:
    """What was given is in the result as it was."""
    given_thw = seen.case.given_thw
    return np.array_equal(seen.video_thwc[given_thw], seen.case.truth_thwc[given_thw])


def anchor(seen: Seen) -> float:
    """PSNR of the given frames, before they were put into the result."""
    whole_t = seen.case.whole_t
    return psnr(seen.result.raw_thwc[whole_t], seen.case.truth_thwc[whole_t])


def anchor_gap(seen: Seen) -> float:
    """That, above the reconstruction's."""
    whole_t = seen.case.whole_t
    best = psnr(seen.ceiling.raw_thwc[whole_t], seen.case.truth_thwc[whole_t])
    return anchor(seen) - best


def made_psnr(seen: Seen) -> float:
    """PSNR of what was made."""
    made_thw = ~seen.case.given_thw
    return psnr(seen.video_thwc[made_thw], seen.case.truth_thwc[made_thw])


def made_gap(seen: Seen) -> float:
    """That, above the reconstruction's."""
    made_thw = ~seen.case.given_thw
    best = psnr(seen.ceiling.raw_thwc[made_thw], seen.case.truth_thwc[made_thw])
    return made_psnr(seen) - best


def place(seen: Seen) -> float:
    """Distance of the thing from its true place in what was made, pixels: the median."""
    return float(np.median(seen.errors_t[seen.case.made_t]))


def place_after(frames: int) -> Callable[[Seen], float]:
    """The distance so many frames after the join; negative: before it."""

    def figure(seen: Seen) -> float:
        made = np.flatnonzero(seen.case.made_t)
        at = made[0] + frames - 1 if frames > 0 else made[-1] + frames + 1
        return float(seen.errors_t[at])

    return figure


def within(limit: float) -> Callable[[Seen], bool]:
    """In what was made, the thing is never further than that from its true place."""

    def figure(seen: Seen) -> bool:
        return bool((seen.errors_t[seen.case.made_t] <= limit).all())

    return figure


def velocity(seen: Seen) -> float:
    """Difference of the thing's velocity in what was made, pixels a frame."""
    track, path_tx = seen.track, seen.case.path_tx
    used = np.flatnonzero(seen.case.made_t & track.seen)
    if len(used) < 2:
        return LOST
    slopes = [np.polyfit(used, x_tx[used], 1)[0] for x_tx in (track.centre, path_tx)]
    return float(np.linalg.norm(slopes[0] - slopes[1]))


def joins(case: Case) -> np.ndarray:
    """The pairs of frames of which one is given and one is made, by their first."""
    return np.flatnonzero(np.diff(case.whole_t.astype(int)))


def seam(seen: Seen) -> float:
    """How unusual the change from given to made frames is, in standard deviations.

    z = (frame difference - mean of those of the clip as it should be) / `spread`; its
    absolute value, since a still video has no change at all; the mean over the joins.
    """
    at = seen.changes_p[joins(seen.case)]
    return float(np.abs((at - seen.usual_p.mean()) / seen.spread).mean())


def uncut(seen: Seen) -> bool:
    """No change between frames is above three medians; a still video has no median."""
    middle = float(np.median(seen.changes_p))
    return middle > 0 and bool(seen.changes_p.max() <= JUMP * middle)


def smooth_path(seen: Seen) -> bool:
    """The thing goes evenly from its last given place to the next.

    From each given frame before a made part to the one after it, it stays within 1.5
    pixels of the line, never turns back, and no step is longer than three of the mean.
    """
    case, track = seen.case, seen.track
    edges = joins(case)
    for first, last in zip(edges[::2], edges[1::2] + 1, strict=True):
        if not track.seen[first : last + 1].all():
            return False
        way_x = case.path_tx[last] - case.path_tx[first]
        length = float(np.linalg.norm(way_x))
        unit_x = way_x / max(length, 1e-6)
        rest_tx = track.centre[first : last + 1] - case.path_tx[first]
        along_t = rest_tx @ unit_x
        across_t = rest_tx @ np.array([-unit_x[1], unit_x[0]])
        step_p, mean = np.diff(along_t), length / (last - first)
        even = step_p.min() > -STILL * mean and step_p.max() <= JUMP * mean
        if np.abs(across_t).max() > NEAR or not even:
            return False
    return True


def gone(seen: Seen) -> bool:
    """Nothing has the colour that was there before."""
    return not seen.reading.counts(seen.case.old).any()


def tone(seen: Seen) -> bool:
    """What was made of the background is as dark or light as the text says."""
    made_thw = ~seen.case.given_thw & (np.ptp(seen.video_thwc.astype(int), -1) < 40)
    if not made_thw.any():
        return False
    level = seen.video_thwc[made_thw].mean()
    return bool(level < 118 if seen.case.stated.tone == "dark" else level > 138)


def camera(seen: Seen) -> bool:
    """The camera moves as the text says."""
    return seen.verdict["camera"]


def border(seen: Seen) -> float:
    """How unlike the truth the step over the border of what is given is.

    The ratio of the mean steps of brightness, the larger to the smaller: neither an edge
    nor a blurred border is good.
    """
    given_thw = seen.case.given_thw
    total = [1e-6, 1e-6]
    for axis in (1, 2):
        over = np.diff(given_thw.astype(int), axis=axis) != 0
        for which, video in enumerate((seen.video_thwc, seen.case.truth_thwc)):
            total[which] += np.abs(np.diff(video.astype(float), axis=axis))[over].sum()
    return float(min(max(total) / min(total), LOST))


def closing(seen: Seen) -> float:
    """Change from the last to the first frame, over the mean change between frames.

    A still video, which changes nowhere, gets the worst value.
    """
    mean = float(seen.changes_p.mean())
    last = changes(seen.video_thwc[[-1, 0]])[0]
    return float(last / mean) if mean > _LEAST_SPREAD else LOST


def pace(seen: Seen) -> float:
    """Mean step of the thing, pixels a frame; 0 where it is lost."""
    return float(np.nan_to_num(seen.steps_p).mean())


def pace_share(seen: Seen) -> float:
    """That, over the mean of text to video with the same prompts."""
    return pace(seen) / max(seen.reference_pace or 0.0, 1e-6)


# -- figures of a set -----------------------------------------------------------------


def place_correlation(members: Sequence[Seen]) -> statistics.Estimate:
    """Correlation of the thing's mean place with its place in the reference picture.

    Both coordinates are pooled, each without its mean. Lost things are left out; 1 where
    fewer than three are left.
    """
    pairs = [
        (seen.track.centre[seen.track.seen].mean(0), seen.case.place_x)
        for seen in members
        if seen.track.seen.any()
    ]
    if len(pairs) < 3:
        return statistics.Estimate(1.0, count=len(pairs))
    pairs_n2x = np.array(pairs)

    def correlation(rows_n2x: np.ndarray) -> float:
        centred = rows_n2x - rows_n2x.mean(0)
        first, second = centred[:, 0].ravel(), centred[:, 1].ravel()
        size = np.linalg.norm(first) * np.linalg.norm(second)
        return float(first @ second / size) if size > 0 else 0.0

    return statistics.bootstrap(
        lambda rng: correlation(statistics.resample(pairs_n2x, rng)),
        correlation(pairs_n2x),
        num_resamples=1000,
    )


@dataclasses.dataclass(frozen=True)
class Figure:
    """One column of a task's table.

    Attributes:
      name: shown.
      of: the value of one clip, bool or float; None where it has no meaning.
      bar: the target of the column; None: only shown.
      at_least: whether the bar is the lowest good value rather than the highest.
      clip_bar: what one float must reach; default: the bar. A bool is right or wrong.
      median: shows the median of floats instead of the mean.
      judges: whether it counts for "all of it".
    """

    name: str
    of: Callable[[Seen], bool | float | None]
    bar: float | None = None
    at_least: bool = True
    clip_bar: float | None = None
    median: bool = False
    judges: bool = True

    def meets(self, value: bool | float | None) -> bool:
        """Whether one clip's value is good enough."""
        bar = self.bar if self.clip_bar is None else self.clip_bar
        if value is None or bar is None or not self.judges:
            return True
        if isinstance(value, bool | np.bool_):
            return bool(value) == self.at_least
        return value >= bar if self.at_least else value <= bar

    def estimate(self, values: Sequence[bool | float | None]) -> statistics.Estimate:
        """Of all clips: a share, a mean or a median, with its interval."""
        values = [value for value in values if value is not None]
        if not values:
            return statistics.Estimate(float("nan"), count=0)
        if isinstance(values[0], bool | np.bool_):
            return statistics.proportion(int(sum(values)), len(values))
        values_n = np.array(values, float)
        found = median(values_n) if self.median else statistics.bootstrap_mean(values_n)
        return dataclasses.replace(found, count=len(values))


def median(values_n: np.ndarray) -> statistics.Estimate:
    """A median with its bootstrap interval.

    The percentiles are not shifted: a median of resamples is one of the values, and a
    lost thing's would be moved below 0.
    """
    rng = np.random.default_rng(0)
    values_r = [np.median(statistics.resample(values_n, rng)) for _ in range(1000)]
    low, high = np.quantile(values_r, [0.025, 0.975])
    return statistics.Estimate(float(np.median(values_n)), float(low), float(high))


ALL = "all of it"


def score(
    figures: Sequence[Figure],
    cases: Sequence[Case],
    results: Sequence[Result],
    ceilings: Sequence[Result],
    context: Context,
) -> tuple[dict[str, statistics.Estimate], list[Seen]]:
    """Scores results: each figure, and the share of clips with which nothing is wrong.

    Args:
      ceilings: the video VAE's reconstructions of the truths.
      context: see `Context`.
    """
    members = [
        Seen(case, result, best, usual_p, context.spread, context.pace)
        for case, result, best, usual_p in zip(
            cases, results, ceilings, context.changes_p, strict=True
        )
    ]
    values = [[figure.of(seen) for figure in figures] for seen in members]
    found = {
        figure.name: figure.estimate(column)
        for figure, column in zip(figures, zip(*values, strict=True), strict=True)
    }
    right = sum(
        all(f.meets(v) for f, v in zip(figures, row, strict=True)) for row in values
    )
    return found | {ALL: statistics.proportion(right, len(values))}, members
