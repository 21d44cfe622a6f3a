"""What each clip of a folder is like by itself: motion, steadiness, drift, cuts, captions.

    settings = clip_measures.Settings()
    measured = clip_measures.measure(clip_files.find(folder), settings)
    measured.estimate("warping error")

One clip is in memory at a time, at a working size: where the short side of its frames is
longer, each is made smaller as it is read, so that clips of any size are measured alike
and memory does not follow their size (CLIP gets its own size). A still
video is best at being steady: a clip in which nothing moves is in no mean of steadiness,
it is counted and named, and so is one whose motion does not go on, as that of shuffled
frames. Each measure says what it does not see.

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
    control_metrics,
    cuts,
    long_video,
    motion,
)
from sora_jax.evals.videos import clip_files

SHORT_SIDE = 128  # pixels
MOST_FRAMES, LEAST_FRAMES = 300, 4
MOST_CLIPS = 256
LEAST_SIDE = 8
FPS = 8.0  # of clips whose files do not say
# Smoothness of a clip that moves without going on. Of the toy world's clips none is
# below, and of the same with their frames shuffled 86 to 98 % are.
UNSTEADY = 0.1

STILL, JUMPS, CUTS = "still", "motion does not go on", "cuts"
SEAM = control_metrics.SEAM
FOLLOWED = "followed"
FRAMES_ALIKE = "frame consistency, CLIP"
AGREES, OTHERS = "agreement with caption", "agreement with other captions"
ABOVE = "agreement above that"
_OF_CLIP = (FRAMES_ALIKE, AGREES, OTHERS, ABOVE)
_CODE = (
    "evals/videos/clip_measures.py",
    "evals/metrics/agreement.py",
    "data/clip_tokenizer.py",
)
_CODE += (
    "evals/metrics/motion.py",
    "evals/metrics/consistency.py",
    "evals/metrics/long_video.py",
)
_CODE += ("evals/metrics/cuts.py", "evals/metrics/control_metrics.py", *clip_files.CODE)


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure with a value a clip.

    Attributes:
      name: for tables; in files with underscores.
      better: "less", "more", or "" for an amount.
      moving: whether clips in which nothing moves are in no mean.
      share: whether each value is 0 or 1.
      note: what it does not see.
    """

    name: str
    better: str
    moving: bool = False
    share: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        return self.name.replace(",", "").replace(" ", "_")


_AMOUNTS = ("dynamic degree", "dynamic", "sharpness", "loop score")
_ASKED = ("cut where asked", "no cut unasked")  # mean something only where asked
_TABLE = {m.name: m for m in control_metrics.METRICS if m.name not in _ASKED}
MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(STILL, "less", share=True, note="a slow zoom may count as still"),
        Measure(
            JUMPS, "less", True, True,
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
            FOLLOWED, "more",
            note="share of pixels with a partner in the next frame; a still clip has all",
        ),
        Measure(CUTS, "", note="a dissolve, and a cut between shots that look alike"),
        Measure(FRAMES_ALIKE, "more", True, note="order of frames"),
        Measure(AGREES, "more", note="order of frames; 100 times the cosine (CLIPSIM)"),
        Measure(OTHERS, "", note="the control: what any caption of the set would have"),
        Measure(ABOVE, "more", note="order of frames"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How clips are measured.

    Attributes:
      num_clips: draws so many; None: all, and `MOST_CLIPS` of more.
      num_frames: first frames that are used; None: all, and `MOST_FRAMES` of more.
      stride: one frame in so many is used.
      chunk_frames: a new chunk of the generator begins at each multiple; None: the seam
        score is left out.
      fps: frames a second of clips whose files do not say.
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
            raise ValueError("seams between chunks are seen at a stride of 1 only")

    @property
    def most_clips(self) -> int:
        """How many clips are measured at most."""
        return self.num_clips or MOST_CLIPS

    def to_json(self, captions: agreement.Agreement | None) -> dict[str, Any]:
        """What two sets of measures must have alike, as JSON values."""
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
    """One clip.

    Attributes:
      source: where it lies.
      frames, size: that were measured, and (height, width) as seen.
      fps: frames a second of those that were measured.
      values: name -> value; None where it is not defined.
      cuts: seconds at which new shots begin.
      caption: None where there is none, or none was asked for.
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
        """Whether the clip is in the mean of a measure."""
        if self.values.get(measure.name) is None:
            return False
        return not (measure.moving and self.values[STILL])

    def to_json(self) -> dict[str, Any]:
        """A line of clips.jsonl."""
        found = {"clip": self.name, "frames": self.frames, "size": list(self.size)}
        found |= {"fps": self.fps, "cut_seconds": list(self.cuts)}
        found |= {MEASURES[name].key: x for name, x in self.values.items()}
        return found | ({"caption": self.caption} if self.caption is not None else {})


@dataclasses.dataclass(frozen=True)
class Set:
    """The clips of a folder.

    Attributes:
      clips: those that were measured.
      found: how many there are.
      failures: one sentence for each clip or file that could not be measured.
      notes: one sentence for what else is left out, or looks better than it is.
    """

    clips: tuple[Measured, ...]
    found: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    def values(self, name: str) -> np.ndarray:
        """Values of the clips that are in the mean of a measure, float64 [n]."""
        measure = MEASURES[name]
        return np.array([c.values[name] for c in self.clips if c.counts(measure)])

    def estimate(self, name: str) -> statistics.Estimate | None:
        """The mean of a measure, whose count is that of clips; None where no clip counts.

        Fewer than two clips have no interval, except for a share.
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
        # No mean of a resample is beyond the values.
        ends = np.clip([mean.low, mean.high], values_n.min(), values_n.max())
        return statistics.Estimate(mean.value, *ends.tolist(), count)

    def flagged(self, name: str) -> int:
        """How many clips have the value 1 in a measure that is a share."""
        return sum(bool(clip.values[name]) for clip in self.clips)

    def worst(self, name: str, count: int) -> list[Measured]:
        """The clips with the worst values of a measure, worst first."""
        measure = MEASURES[name]
        there = [clip for clip in self.clips if clip.counts(measure)]
        there.sort(key=lambda c: c.values[name], reverse=measure.better == "less")
        return there[:count]


def difference(first: Set, second: Set, name: str) -> statistics.Estimate | None:
    """How much more the mean of the first set is, with its 95 % interval.

    Newcombe's interval for shares; else each set is resampled by itself. None where a
    set has fewer than two values.
    """
    values = first.values(name), second.values(name)
    if min(map(len, values)) < 2:
        return None
    if MEASURES[name].share:
        return statistics.newcombe(*((int(of.sum()), len(of)) for of in values))
    return statistics.bootstrap(
        lambda rng: np.subtract(*(statistics.resample(v, rng).mean() for v in values)),
        float(values[0].mean() - values[1].mean()),
        num_resamples=1000,
    )


def working_size(frame_hwc: np.ndarray) -> np.ndarray:
    """A frame uint8 as it is measured."""
    return shrink(frame_hwc, SHORT_SIDE)


def shrink(frame_hwc: np.ndarray, short_side: int) -> np.ndarray:
    """A frame uint8 whose short side is no longer than that, by an antialiased filter."""
    h, w = frame_hwc.shape[:2]
    if min(h, w) <= short_side:
        return frame_hwc
    scale = short_side / min(h, w)
    size = round(w * scale), round(h * scale)
    bilinear = PIL.Image.Resampling.BILINEAR  # over a pixel's whole area in Pillow
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
      settings: how.
      captions: what is said about them; with `clip`.
      clip: the network that compares them with their captions.
      tell: is called once for each clip that is done with.

    Raises:
      ValueError: not one clip can be measured; the sentence says why.
    """
    most = settings.num_frames or MOST_FRAMES
    read = clip_files.Reader(
        most, settings.stride, least=LEAST_FRAMES, shrink=working_size
    )
    # A clip is read twice rather than kept at both sizes, or at its full one.
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
            (longer, f"go on after the {most} frames that are measured"),
            (unsaid, f"do not say their frame rate: {settings.fps:g} is taken"),
            (smaller, f"are measured at a short side of {SHORT_SIDE} pixels"),
        )
        if count
    ]
    if (left := len(found.sources) - len(clips)) > len(failures) - len(found.failures):
        notes.append(f"{len(clips)} clips are drawn, {left} are not measured")
    notes += clip_files.told(done, len(clips))
    notes += _named(clips, captions)
    total = len(found.sources) + len(found.failures)
    return Set(tuple(clips), total, tuple(failures), tuple(notes))


def _measure(source, read: clip_files.Clip, settings, captions) -> Measured:
    size = read.size
    if min(size) < LEAST_SIDE:
        raise clip_files.UnusableClip(
            f"{source.name}: its frames are {size[1]} x {size[0]}, and {LEAST_SIDE} "
            "pixels a side are needed"
        )
    video_1thwc = read.video_thwc[None]
    fps = (read.fps or settings.fps) / settings.stride
    length = len(read.video_thwc)
    seams = range(length)[:: settings.chunk_frames][1:] if settings.chunk_frames else ()
    view = control_metrics.Clips(video_1thwc, fps, seams)
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
    """A clip with how alike CLIP finds its frames, and the mean of their features [d]."""
    frames_td = networks.unit(clip.network.frames(video_thwc[None])[0])
    alike = {FRAMES_ALIKE: float(consistency.similarity(frames_td[None])[0])}
    one = dataclasses.replace(one, values=dict(one.values) | alike)
    return one, frames_td.mean(axis=0)


def _values(view: control_metrics.Clips) -> Iterator[tuple[str, float | None]]:
    for name, metric in _TABLE.items():
        if name == SEAM and not _seams_can_be_judged(view):
            if view.seams:
                yield name, None
            continue
        value = float(metric.measure(view)[0])
        yield name, value if np.isfinite(value) else None


def _seams_can_be_judged(view: control_metrics.Clips) -> bool:
    steps = view.video_nthwc.shape[1] - 1
    return bool(view.seams) and steps - len(view.seams) >= long_video.LEAST_OTHERS


def _with_agreement(clips, vectors, clip: agreement.Agreement) -> list[Measured]:
    """The clips with how they agree with their captions, and with those of others."""
    told = [number for number, one in enumerate(clips) if one.caption is not None]
    scores = clip.compare(
        np.array([vectors[n] for n in told]), [clips[n].caption for n in told]
    )
    result = list(clips)
    for n, own, others in zip(told, *scores, strict=True):
        values = {AGREES: own, OTHERS: others}
        values[ABOVE] = None if others is None else own - others
        values = dict(clips[n].values) | values
        result[n] = dataclasses.replace(clips[n], values=values)
    return result


def _named(clips: list[Measured], captions) -> Iterator[str]:
    """Notes that name clips which a mean must not hide."""
    for name, what in (
        (STILL, "are still and in no mean of steadiness"),
        (JUMPS, "move without going on, as shuffled frames do"),
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
                f"{len(silent)} of {len(clips)} clips have no caption and are in no mean "
                f"of agreement: {listed(silent)}"
            )


def listed(names: list[str], most: int = 8) -> str:
    """The first of some names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
