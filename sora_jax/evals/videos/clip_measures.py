"""Measures of single clips: motion, steadiness, drift, cuts, agreement with captions.

    settings = clip_measures.Settings()
    measured = clip_measures.measure(clip_files.find(folder), settings)
    measured.estimate("warping error")

One clip is in memory at a time. Frames with a longer short side than `SHORT_SIDE` are
resized as they are read, so that clips of all sizes are measured alike and memory does
not grow with their size (CLIP gets frames of its own size). A still video wins measures
of steadiness: clips in which nothing moves are left out of these means, counted and
named. Clips that move without continuity, such as shuffled frames, are counted and named
too. Each measure has a note on what it does not see.

Letters: n clips, t frames, h height, w width, d features.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.evals import protocol, statistics
from sora_jax.evals.features import networks
from sora_jax.evals.metrics import (
    agreement,
    consistency,
    cuts,
    long_video,
    motion,
    temporal_metrics,
)
from sora_jax.evals.videos import clip_files

SHORT_SIDE = 128  # pixels
MOST_FRAMES, LEAST_FRAMES = 300, 4
MOST_CLIPS = 256
LEAST_SIDE = 8
FPS = 8.0  # of clips without a stored frame rate
# Smoothness below which motion has no continuity. No toy-world clip is below it, and with
# shuffled frames 86 to 98 % are.
UNSTEADY = 0.1

STILL, JUMPS, CUTS = "still", "motion does not go on", "cuts"
SEAM = temporal_metrics.SEAM
FOLLOWED = "followed"
FRAMES_ALIKE = "frame consistency, CLIP"
AGREES, OTHERS = "agreement with caption", "agreement with other captions"
ABOVE = "agreement above that"
_CODE = (
    "evals/videos/clip_measures.py",
    "evals/metrics/agreement.py",
    "data/clip_tokenizer.py",
    "evals/metrics/motion.py",
    "evals/metrics/consistency.py",
    "evals/metrics/long_video.py",
    "evals/metrics/cuts.py",
    "evals/metrics/temporal_metrics.py",
    *clip_files.CODE,
)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure with one value per clip.

    Attributes:
      name: as in tables.
      better: "less", "more", or "" for an amount.
      moving: whether clips in which nothing moves are left out of the mean.
      share: whether each value is 0 or 1.
      note: what the measure does not see.
    """

    name: str
    better: str
    moving: bool = False
    share: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        """The name in files."""
        return self.name.replace(",", "").replace(" ", "_")


_AMOUNTS = ("dynamic degree", "dynamic", "sharpness", "loop score")
_ASKED = ("cut where asked", "no cut unasked")  # need cuts that were asked for
_TABLE = {m.name: m for m in temporal_metrics.METRICS if m.name not in _ASKED}
MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            STILL, "less", share=True, note="a slow zoom, which may count as still"
        ),
        Measure(
            JUMPS,
            "less",
            True,
            True,
            note=f"one in ten shuffled clips has a smoothness above {UNSTEADY:g}",
        ),
        *(
            Measure(
                name,
                "" if name in _AMOUNTS else "more" if metric.higher else "less",
                metric.still_counts is not None or name == "smoothness",
                name == "dynamic",
                metric.note,
            )
            for name, metric in _TABLE.items()
        ),
        Measure(
            FOLLOWED,
            "more",
            note="share of pixels tracked to the next frame; in a still clip all are",
        ),
        Measure(CUTS, "", note="a dissolve, and a cut between shots that look alike"),
        Measure(FRAMES_ALIKE, "more", True, note="order of frames"),
        Measure(AGREES, "more", note="order of frames; 100 times the cosine (CLIPSIM)"),
        Measure(
            OTHERS, "", note="the control: agreement with the set's other captions"
        ),
        Measure(ABOVE, "more", note="order of frames"),
    )
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How clips are measured.

    Attributes:
      num_clips: clips to draw; None: all, at most `MOST_CLIPS`.
      num_frames: first frames that are used; None: all, at most `MOST_FRAMES`.
      stride: every stride-th frame is used.
      chunk_frames: length of the generator's chunks, for the seam score; None leaves the
        score out.
      fps: frames per second of clips without a stored frame rate.
      colour: see `clip_files.find`.
    """

    num_clips: int | None = None
    num_frames: int | None = None
    stride: int = 1
    chunk_frames: int | None = None
    fps: float = FPS
    colour: str | None = None

    def __post_init__(self):
        if self.num_frames is not None and self.num_frames < LEAST_FRAMES:
            raise ValueError(
                f"single clips and controls are measured from {LEAST_FRAMES} frames on, "
                f"not {self.num_frames}: --distances_only without --controls leaves them out"
            )
        if self.chunk_frames is not None and self.stride != 1:
            raise ValueError("seams between chunks are visible at a stride of 1 only")

    @property
    def most_clips(self) -> int:
        """The largest number of clips that are measured."""
        return self.num_clips or MOST_CLIPS

    def to_json(self, captions: agreement.Agreement | None) -> dict[str, Any]:
        """Returns the protocol of the measures, as JSON values."""
        return {
            "chunk_frames": self.chunk_frames,
            "clip": captions and captions.to_json(),
            "code": protocol.code_version(*_CODE),
            "colour": self.colour,
            "fps_unless_said": self.fps,
            "most_clips": self.most_clips,
            "most_frames": self.num_frames or MOST_FRAMES,
            "start": "first",
            "still_below": motion.STILL,
            "stride": self.stride,
            "working_size": f"short side at most {SHORT_SIDE}, bilinear, antialiased; "
            "CLIP reads frames of its own size, by Pillow's bicubic filter",
        }


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measures of one clip.

    Attributes:
      source: where the clip is stored.
      frames, size: number of measured frames, and (height, width) as displayed.
      fps: frames per second of the measured frames.
      values: name -> value; None where undefined.
      cuts: seconds at which new shots begin.
      caption: None where there is none, or captions are not used.
    """

    source: clip_files.Source
    frames: int
    size: tuple[int, int]
    fps: float
    values: Mapping[str, float | None]
    cuts: tuple[float, ...]
    caption: str | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def counts(self, measure: Measure) -> bool:
        """Returns whether the clip is in the mean of a measure."""
        if self.values.get(measure.name) is None:
            return False
        return not (measure.moving and self.values[STILL])

    def to_json(self) -> dict[str, Any]:
        """Returns a line of clips.jsonl."""
        line = {"clip": self.name, "frames": self.frames, "size": list(self.size)}
        line |= {"fps": self.fps, "cut_seconds": list(self.cuts)}
        line |= {MEASURES[name].key: x for name, x in self.values.items()}
        return line | ({"caption": self.caption} if self.caption is not None else {})


@dataclasses.dataclass(frozen=True)
class Set:
    """The measured clips of a folder.

    Attributes:
      clips: those that were measured.
      found: number of clips in the folder.
      failures: one sentence for each clip or file that could not be measured.
      notes: one sentence for everything else that the numbers leave out or hide.
    """

    clips: tuple[Measured, ...]
    found: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    def values(self, name: str) -> np.ndarray:
        """Returns values of the clips that are in the mean of a measure, float64 [n]."""
        measure = MEASURES[name]
        return np.array([c.values[name] for c in self.clips if c.counts(measure)])

    def estimate(self, name: str) -> statistics.Estimate | None:
        """Returns the mean of a measure; None where no clip is in it.

        The mean of a single clip has no interval, except for a share.
        """
        values_n = self.values(name)
        count = len(values_n)
        if not count:
            return None
        if MEASURES[name].share:
            return statistics.proportion(int(values_n.sum()), count)
        if count == 1:
            return statistics.Estimate(float(values_n[0]), count=1)
        mean = statistics.bootstrap_mean(values_n)
        # The shift of the percentiles may leave the range of the values.
        ends = np.clip([mean.low, mean.high], values_n.min(), values_n.max())
        return statistics.Estimate(mean.value, *ends.tolist(), count)

    def flagged(self, name: str) -> int:
        """Returns how many clips have the value 1 in a measure that is a share."""
        return sum(bool(clip.values[name]) for clip in self.clips)

    def worst(self, name: str, count: int) -> list[Measured]:
        """Returns the clips with the worst values of a measure, worst first."""
        measure = MEASURES[name]
        clips = [clip for clip in self.clips if clip.counts(measure)]
        clips.sort(key=lambda c: c.values[name], reverse=measure.better == "less")
        return clips[:count]


def difference(first: Set, second: Set, name: str) -> statistics.Estimate | None:
    """Returns the mean of the first set minus that of the second, with its interval.

    Shares have Newcombe's interval; for other measures each set is resampled separately.
    None where a set has fewer than two values.
    """
    values = first.values(name), second.values(name)
    if min(map(len, values)) < 2:
        return None
    if MEASURES[name].share:
        return statistics.newcombe(*((int(v.sum()), len(v)) for v in values))
    return statistics.bootstrap(
        lambda rng: np.subtract(*(statistics.resample(v, rng).mean() for v in values)),
        float(values[0].mean() - values[1].mean()),
        num_resamples=1000,
    )


def working_size(frame_hwc: np.ndarray) -> np.ndarray:
    """Returns a frame uint8 at the size at which it is measured."""
    return shrink(frame_hwc, SHORT_SIDE)


def shrink(frame_hwc: np.ndarray, short_side: int) -> np.ndarray:
    """Returns a frame uint8 resized, with antialiasing, to at most that short side."""
    h, w = frame_hwc.shape[:2]
    if min(h, w) <= short_side:
        return frame_hwc
    scale = short_side / min(h, w)
    size = round(w * scale), round(h * scale)
    bilinear = PIL.Image.Resampling.BILINEAR  # antialiased in Pillow
    return np.asarray(PIL.Image.fromarray(frame_hwc).resize(size, bilinear))


def measure(
    found: clip_files.Found,
    settings: Settings,
    *,
    captions: agreement.Captions | None = None,
    clip: agreement.Agreement | None = None,
    tell: Callable[[], None] = lambda: None,
) -> Set:
    """Measures the clips of a folder, one after the other.

    Args:
      found: the clips.
      settings: how they are measured.
      captions: of the clips; with `clip`.
      clip: compares clips with captions.
      tell: is called after each clip.

    Raises:
      ValueError: no clip can be measured; the sentence says why.
    """
    most = settings.num_frames or MOST_FRAMES
    read = clip_files.Reader(
        most, settings.stride, least=LEAST_FRAMES, shrink=working_size
    )
    # Reading a clip twice takes less memory than keeping it at its full size.
    read_for_clip = clip and clip_files.Reader(
        most, settings.stride, least=LEAST_FRAMES, shrink=clip.fit
    )
    wanted = settings.most_clips
    clips, failures, vectors = [], list(found.failures), []
    longer = unsaid = smaller = 0
    done = collections.Counter()
    for index in clip_files.drawn(len(found.sources), wanted, lambda: len(clips)):
        source = found.sources[index]
        try:
            frames = read(source)
            one = _measure(source, frames, settings, captions)
            vector = None
            if clip:
                one, vector = _with_frames(one, read_for_clip(source).video_thwc, clip)
        except clip_files.UnusableClip as error:
            failures.append(str(error))
        else:
            clips.append(one)
            vectors.append(vector)
            longer += frames.longer
            unsaid += frames.fps is None
            smaller += min(one.size) > SHORT_SIDE
            done.update(frames.notes)
        tell()
    if not clips:
        because = failures[0] if failures else "there is none"
        raise ValueError(f"no clip can be measured: {because}")
    if clip:
        clips = _with_agreement(clips, vectors, clip)
    notes = list(found.notes)
    notes += [
        f"{count} of {len(clips)} clips {what}"
        for count, what in (
            (longer, f"have more than the {most} frames that are measured"),
            (unsaid, f"have no stored frame rate: {settings.fps:g} is assumed"),
            (smaller, f"are measured at a short side of {SHORT_SIDE} pixels"),
        )
        if count
    ]
    if (left := len(found.sources) - len(clips)) > len(failures) - len(found.failures):
        notes.append(f"{len(clips)} clips were drawn, {left} are not measured")
    notes += clip_files.count_notes(done, len(clips))
    notes += _named(clips, captions)
    total = len(found.sources) + len(found.failures)
    return Set(tuple(clips), total, tuple(failures), tuple(notes))


def _measure(source, read: clip_files.Clip, settings, captions) -> Measured:
    size = read.size
    if min(size) < LEAST_SIDE:
        raise clip_files.UnusableClip(
            f"{source.name}: {size[1]}x{size[0]} pixels, but {LEAST_SIDE} per side are "
            "needed"
        )
    video_1thwc = read.video_thwc[None]
    fps = (read.fps or settings.fps) / settings.stride
    length = len(read.video_thwc)
    seams = range(length)[:: settings.chunk_frames][1:] if settings.chunk_frames else ()
    view = temporal_metrics.Clips(video_1thwc, fps, seams)
    values = dict(_values(view))
    [times] = cuts.detect(video_1thwc)
    values[CUTS] = float(len(times))
    values[FOLLOWED] = float(view.steadiness["followed"][0])
    still = values["dynamic degree"] <= motion.STILL
    jumps = not still and values["smoothness"] < UNSTEADY
    values = {STILL: float(still), JUMPS: float(jumps)} | values
    caption = captions.texts.get(source.name) if captions else None
    seconds = tuple(round(time / fps, 3) for time in times)
    return Measured(source, length, size, fps, values, seconds, caption)


def _with_frames(one: Measured, video_thwc, clip) -> tuple[Measured, np.ndarray]:
    """Adds the consistency of CLIP's features; returns also their mean over frames [d]."""
    frames_td = networks.unit(clip.network.frames(video_thwc[None])[0])
    more = {FRAMES_ALIKE: float(consistency.similarity(frames_td[None])[0])}
    one = dataclasses.replace(one, values=dict(one.values) | more)
    return one, frames_td.mean(axis=0)


def _values(view: temporal_metrics.Clips) -> Iterator[tuple[str, float | None]]:
    for name, metric in _TABLE.items():
        if name == SEAM and not _seams_can_be_judged(view):
            if view.seams:
                yield name, None
            continue
        value = float(metric.measure(view)[0])
        yield name, value if np.isfinite(value) else None


def _seams_can_be_judged(view: temporal_metrics.Clips) -> bool:
    steps = view.video_nthwc.shape[1] - 1
    return bool(view.seams) and steps - len(view.seams) >= long_video.LEAST_OTHERS


def _with_agreement(clips, vectors, clip: agreement.Agreement) -> list[Measured]:
    """Adds the agreement of clips with their captions, and with those of other clips."""
    captioned = [number for number, one in enumerate(clips) if one.caption is not None]
    scores = clip.compare(
        np.array([vectors[n] for n in captioned]), [clips[n].caption for n in captioned]
    )
    result = list(clips)
    for n, own, others in zip(captioned, *scores, strict=True):
        values = {AGREES: own, OTHERS: others}
        values[ABOVE] = None if others is None else own - others
        values = dict(clips[n].values) | values
        result[n] = dataclasses.replace(clips[n], values=values)
    return result


def _named(clips: list[Measured], captions) -> Iterator[str]:
    """Yields notes that name the clips which means leave out or hide."""
    for name, what in (
        (STILL, "are still and left out of the means of steadiness"),
        (JUMPS, "move without continuity, as shuffled frames do"),
    ):
        these = [one.name for one in clips if one.values[name]]
        if these:
            yield f"{len(these)} of {len(clips)} clips {what}: {listed(these)}"
    for name in _TABLE:
        missing = [one.name for one in clips if one.values.get(name, 0) is None]
        if missing:
            yield f"{len(missing)} of {len(clips)} clips have no {name}: {listed(missing)}"
    if captions:
        silent = [one.name for one in clips if one.caption is None]
        if silent:
            yield (
                f"{len(silent)} of {len(clips)} clips have no caption and are left out of "
                f"the means of agreement: {listed(silent)}"
            )


def listed(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
