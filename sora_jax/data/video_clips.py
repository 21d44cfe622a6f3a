"""Videos with captions as a source of clips: of a folder, of tar archives, of a list.

`folders`, `webdataset` and `video_lists` list the videos and find their captions; all
else is the same for the three. A folder of numbered pictures counts as a video.

A video is cut into adjacent windows of `num_frames` frames at `fps`; the remainder at the
end is dropped. A time range of a longer video is cut likewise, from the first frame that
begins in it. With `split_shots`, the windows begin anew at each cut, so that none holds
one, and the remainder of each shot is dropped. If clips may have several lengths, what is
left at the end of a video or shot is cut into shorter clips. Size and rate of the clips
are given, or follow from those of the video: see `shape_classes`. Each frame is the one on
screen at its time, so a window may end with the video. A window that shows nothing but the
frame that the one before it ended with is left out, so that a file of few bytes that
claims to last for hours gives few clips.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.data import (
    cuts,
    folders,
    frame_folders,
    frames,
    records,
    remote,
    shape_classes,
    shards,
    tables,
    texts,
    video_io,
    video_lists,
    webdataset,
    workers,
)

_CRF = 14
# A larger video is cut into slices of about this many bytes, so that workers share it.
_SLICE_BYTES = 64 << 20
_ITEMS_PER_PART = 16
# A file whose header promises this many seconds more than it has is truncated.
_MISSING = 0.5
# Seconds by which a frame may start before its time range: ranges are in milliseconds.
_EARLY = 2e-3
_REPEATED = "slower than the clips, with frames repeated"
_BETWEEN = "cut to other shots, and what is left of a shot is shorter than a clip"
_STILL = "still for whole clips, which are left out"
_TRIMMED = "scaled to the size of their clips, and cropped by {} % at most"
_CROPS = (1, 3, 6, 10, 25, 100)  # per cent, the steps in which crops are counted
_LEAST_FPS = 0.1
# Memory for reading a video: of the decoder, in bytes per pixel (twenty-six frames of
# 4:2:0 with 8 bits, or ten of 4:2:2 with 10); of the frames of a clip, per byte of them;
# and of all else.
_DECODER_BYTES, _CLIP_BYTES, _OTHER_BYTES = 40, 4, 128 << 20


def limits(
    gib: float, seconds: float, side: int | None, minutes: float
) -> video_io.Limits:
    """Limits of a video by the flags of `prepare`.

    Args:
      gib: of the file, in GiB.
      seconds: that it lasts.
      side: pixels a side; a frame may have `side` squared. None: as large as `video_io`
        allows by default.
      minutes: of work on it.

    Raises:
      ValueError: a limit is out of range.
    """
    for name, value in (
        ("max_gib", gib),
        ("max_seconds", seconds),
        ("max_minutes", minutes),
    ):
        if not 0 < value <= 1e9:
            raise ValueError(f"--{name} must be above 0 and at most 1e9, not {value}")
    usual = video_io.DEFAULT_LIMITS
    return dataclasses.replace(
        usual,
        max_bytes=round(gib * 2**30),
        max_seconds=seconds,
        max_frames=round(usual.max_frames * max(1, seconds / usual.max_seconds)),
        max_side=side or usual.max_side,
        max_pixels=side * side if side else usual.max_pixels,
        max_work_seconds=60 * minutes,
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the clips of a video are like.

    Attributes:
      size: (height, width).
      lengths: frames that clips may have, descending; at most those of the video, unless
        it has too few for any.
      fps: frames a second.
    """

    size: tuple[int, int]
    lengths: tuple[int, ...]
    fps: float


@dataclasses.dataclass(frozen=True)
class FolderClips:
    """Clips out of a folder of videos; see `shards.Source`.

    Args:
      folder: where the videos are, at any depth; a folder here or at an address.
      size: (height, width) of the clips; a video is scaled and its middle cut out. Or a
        budget, by which each video has a size for its aspect.
      num_frames: frames of a clip, 1 + 4n, or several such lengths.
      fps: frames a second of the clips; a video's frames are dropped or repeated. None:
        those of the video, see `shape_classes.rate`.
      lossless: keep the scaled frames exactly, at several times the bytes.
      split: name of the split that is written.
      limits: of a video file.
      follow_links: follow links that lead out of the folder.
      colour: one of `colour.MATRICES`, for videos with untagged colours; None: by their
        size, as players do.
      frames_fps: frames a second of videos that are folders of numbered pictures; None:
        such folders are left out.
      caption_encoding: of captions that are not UTF-8, such as "cp1252"; None: they are
        left out.
      split_shots: whether windows begin anew where the video cuts to another shot.
      max_fps: the limit for `fps` None.

    Raises:
      ValueError: an impossible size, or there is no such folder.
    """

    folder: pathlib.Path | remote.RemoteFolder
    size: tuple[int, int] | shape_classes.Budget
    num_frames: int | tuple[int, ...]
    fps: float | None
    lossless: bool = False
    split: str = "train"
    limits: video_io.Limits = video_io.DEFAULT_LIMITS
    follow_links: bool = False
    colour: str | None = None
    frames_fps: float | None = None
    caption_encoding: str | None = None
    split_shots: bool = False
    max_fps: float = 30.0
    unit = "videos"
    form = "folder"

    def __post_init__(self):
        if isinstance(self.folder, remote.RemoteFolder):
            if self.frames_fps is not None:
                raise ValueError(
                    f"{self.folder}: folders of numbered frames are not read from "
                    "addresses; leave out --frames_fps, or copy the folder"
                )
        elif not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        if not self.lengths:
            raise ValueError("--num_frames names no number of frames")
        for length in self.lengths:
            if length < 1 or length % 4 != 1:
                below = max(1, (length - 1) // 4 * 4 + 1)
                raise ValueError(
                    f"a clip must have 1 + 4n frames, such as {below} or {below + 4}, "
                    f"not {length}"
                )
        if isinstance(self.size, shape_classes.Budget):
            self.size.classes(self.lengths[0])  # raises if it holds none
        elif min(self.size) < 8 or any(side % 2 for side in self.size):
            raise ValueError(
                f"height and width must be even and at least 8, not {self.size}"
            )
        for name, rate in (("fps", self.fps), ("max_fps", self.max_fps)):
            if rate is not None and not 0 < rate <= 240:
                raise ValueError(f"{name} must be between 0 and 240, not {rate}")
        if self.fps is None and self.max_fps < _LEAST_FPS:
            raise ValueError(
                f"max_fps must be at least {_LEAST_FPS:g}, not {self.max_fps}"
            )
        if self.frames_fps is not None and not 0 < self.frames_fps <= 1000:
            raise ValueError(
                f"frames_fps must be between 0 and 1000, not {self.frames_fps}"
            )

        if self.caption_encoding is not None:
            texts.check_encoding(self.caption_encoding)

    @functools.cached_property
    def listing(self) -> folders.Listing:
        """The folder's contents; sent to the worker processes."""
        return folders.scan(
            self.folder,
            follow_links=self.follow_links,
            frames_fps=self.frames_fps,
            encoding=self.caption_encoding,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames that clips may have, descending."""
        given = self.num_frames
        return (given,) if isinstance(given, int) else tuple(sorted({*given})[::-1])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the clips of a video."""
        shots = {"split_shots": True} if self.split_shots else {}
        size = self.size
        if isinstance(size, shape_classes.Budget):
            size = dataclasses.asdict(size) | {"aspects": shape_classes.ASPECTS}
        return shots | {
            "source": self.form,
            "size": size if isinstance(size, dict) else list(size),
            "num_frames": self.lengths[0] if len(self.lengths) == 1 else self.lengths,
            "fps": {"at most": self.max_fps} if self.fps is None else self.fps,
            "encoding": "lossless" if self.lossless else f"crf {_CRF}",
            "colour": self.colour,
            "reading": frames.RULES,
        }

    @property
    def items(self) -> Mapping[str, str]:
        """The videos, each with a hash of its size and captions."""
        return self.listing.digests

    @property
    def admits(self) -> str:
        """The limits."""
        return "/".join(map(str, dataclasses.astuple(self.limits)))

    @property
    def bounds(self) -> workers.Bounds:
        """What a video may use in its process, by the limits and the size of a clip."""
        if isinstance(self.size, shape_classes.Budget):
            # A token is of four frames, or of one.
            clip = 3 * 4 * self.size.max_tokens * self.size.multiple_of**2
        else:
            clip = 3 * self.lengths[0] * math.prod(self.size)
        # FFmpeg has no larger frames than this.
        pixels = min(self.limits.max_pixels, 2**31)
        memory = _DECODER_BYTES * pixels + _CLIP_BYTES * clip
        return workers.Bounds(
            seconds=self.limits.max_work_seconds, memory=memory + _OTHER_BYTES
        )

    def plan(self, items: Collection[str]) -> tuple[list[Any], list[shards.Skipped]]:
        """Returns groups of (video, slice, number of slices), and the unusable files."""
        slices = []
        for video in items:
            size = 0 if video in self.listing.spans else self.listing.videos[video]
            count = max(1, math.ceil(size / _SLICE_BYTES))
            slices += [[video, number, count] for number in range(count)]
        per_part = max(1, min(_ITEMS_PER_PART, len(slices) // 8))
        parts = [list(part) for part in itertools.batched(slices, per_part)]
        return parts, list(self.listing.skipped)

    def expected(self, part: list) -> int:
        """Returns how many videos, or slices of long ones, a part has."""
        return len(part)

    def only(self, part: list) -> "FolderClips":
        """Returns a source that has listed the videos of a part only.

        Its folder is an absolute path, for processes in other working directories.
        """
        is_here = isinstance(self.folder, pathlib.Path)
        folder = self.folder.absolute() if is_here else self.folder
        source = dataclasses.replace(self, folder=folder)
        # The value of the cached property; the fields are frozen.
        vars(source)["listing"] = self.listing.only({video for video, _, _ in part})
        return source

    def clips(
        self, part: list, note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord | shards.Skipped | shards.Remark]:
        """Yields the clips of a part, what was skipped, and remarks."""
        by_video = self.listing.texts
        for video, number, slices in part:
            item = f"{video} ({number + 1} of {slices})" if slices > 1 else video
            if item in avoid:
                yield shards.Skipped(item, avoid[item], video)
            else:
                tell = functools.partial(note, item=item)
                text = by_video.get(video, folders.Text())
                header = None
                try:
                    self.fetch(video, f"copy of {item}", note, avoid)
                    tell()
                    opened, sample = self.opened(video, tell)
                    self.shape_of(video, opened)  # raises for the whole file
                    header = opened
                    yield from self._windows(
                        video, header, number, slices, text, sample
                    )
                except video_io.UnreadableVideo as error:
                    # Only the first slice reports an error of the whole file.
                    if header or number == 0:
                        reason = self.reason(video, error)
                        yield shards.Skipped(item if header else video, reason, video)
            note(finished=1)

    def fetch(
        self, video: str, item: str, note: workers.Note, avoid: Mapping[str, str]
    ) -> None:
        """Copies a video from its address, as an item of its own.

        So a slow network is not taken for a fault of the video.
        """
        if video not in self.listing.entries:
            return
        if item in avoid:
            where = f"{self.folder}/{video}"
            raise remote.RemoteError(f"{where} cannot be read: {avoid[item]}")
        note(item=item)
        self._path(video, functools.partial(note, item=item))

    def _path(
        self, video: str, tell: Callable[[], None]
    ) -> video_io.Region | tables.Cell | pathlib.Path:
        """Where a video, or its copy, is."""
        if entry := self.listing.entries.get(video):
            return self.folder.fetched(video, entry, self.limits, tell)
        place = self.listing.places.get(video)
        return self.folder / video if place is None else place

    def reason(self, video: str, error: video_io.UnreadableVideo) -> str:
        """Returns why a video cannot be read, without its name or that of its copy."""
        place = self.listing.places.get(video, f"{self.folder}/{video}")
        reason = str(error).removeprefix(f"{place}: ")
        return re.sub(r"^/proc/self/fd/\d+: ", "", reason)

    def opened(
        self, video: str, tell: Callable[[], None]
    ) -> tuple[video_io.Header, Callable[..., Iterator[np.ndarray]]]:
        """Returns a video's header and a function that yields its frames at given times.

        Args:
          video: one of `items`.
          tell: called from time to time, as a sign of life.

        Raises:
          UnreadableVideo: it cannot be read, or is beyond the limits.
          remote.RemoteError: its address cannot be read.
        """
        path = self._path(video, tell)
        if isinstance(path, tables.Cell):
            with workers.uncounted_memory():
                path = path.read()
        if frames_of := self.listing.frames.get(video):
            clip = frame_folders.FrameFolder(path, frames_of, self.limits)
            probe, sample = functools.partial(clip.probe, self.frames_fps), clip.sample
        else:
            probe = functools.partial(video_io.probe, path, self.limits, tell)
            sample = functools.partial(
                video_io.sample, path, limits=self.limits, colour=self.colour
            )
        with workers.limited_memory():
            header = probe()

        def frames_at(times, size, notes: set[str]) -> Iterator[np.ndarray]:
            return workers.limited(
                sample(times, size, header=header, notes=notes, tell=tell)
            )

        return header, frames_at

    def span(self, video: str, header: video_io.Header) -> tuple[float, float]:
        """Returns when the clips of a video begin, and how long they may last, seconds.

        A time range begins with the first frame that starts in it: the one on screen
        before may belong to another scene.
        """
        start, end = self.listing.spans.get(video, (0.0, math.inf))
        begin = max(0, math.ceil((start - _EARLY) * header.fps)) / header.fps
        return begin, min(end, header.seconds) - begin

    def shape_of(self, video: str, header: video_io.Header) -> Shape:
        """Returns what the clips of a video are like.

        Raises:
          UnreadableVideo: it is too small or too slow for clips.
        """
        fps = self.fps or shape_classes.rate(header.fps, self.max_fps)
        if self.fps is None and header.fps < _LEAST_FPS:
            raise video_io.UnreadableVideo(
                f"its {header.fps:g} frames a second are fewer than {_LEAST_FPS:g}"
            )
        ticks = video_io.ticks(self.span(video, header)[1], fps)
        lengths = tuple(length for length in self.lengths if length <= ticks)
        lengths = lengths or self.lengths[-1:]
        size = self.size
        if isinstance(size, shape_classes.Budget):
            size = size.size_of(header.shown, lengths[0])
            if size is None:
                raise video_io.UnreadableVideo(
                    f"its frames of {header.shown[1]}x{header.shown[0]} pixels are smaller "
                    f"than a token of {self.size.multiple_of}, or too narrow for "
                    f"{self.size.max_tokens} tokens"
                )
        return Shape(size, lengths, fps)

    def clips_by_shape(
        self, video: str, header: video_io.Header
    ) -> dict[tuple[int, int, int], int]:
        """Returns how many clips of each (frames, height, width) a video of one shot has.

        Raises:
          UnreadableVideo: as for `shape_of`.
        """
        shape, (_, seconds) = self.shape_of(video, header), self.span(video, header)
        ticks = video_io.ticks(seconds, shape.fps)
        lengths = collections.Counter(shape_classes.pieces(ticks, shape.lengths))
        return {(length, *shape.size): count for length, count in lengths.items()}

    def too_short(self, video: str, header: video_io.Header) -> str:
        """Returns why a video has no window."""
        begin, seconds = self.span(video, header)
        shape = self.shape_of(video, header)
        due = (
            f"the last of {shape.lengths[-1]} frames at {shape.fps:g} fps is due at "
            f"{(shape.lengths[-1] - 1) / shape.fps:.2f} s"
        )
        if begin >= header.seconds:
            return f"it begins at {begin:.2f} s, and its file ends at {header.seconds:.2f} s"
        return f"it lasts {seconds:.2f} s, and {due}"

    def _windows(
        self,
        video: str,
        header: video_io.Header,
        number: int,
        slices: int,
        text: folders.Text,
        sample: Callable[..., Iterator[np.ndarray]],
    ) -> Iterator[records.ClipRecord | shards.Skipped | shards.Remark]:
        shape = self.shape_of(video, header)
        begin, seconds = self.span(video, header)
        longest, shortest = shape.lengths[0], shape.lengths[-1]
        total = video_io.ticks(seconds, shape.fps) // longest
        said, missing = header.seconds + header.missing, header.missing
        ends = f"its header says {said:.2f} s, but it ends earlier"
        if span := self.listing.spans.get(video):
            missing = span[1] - header.seconds if total else 0.0
            ends = f"its list says {span[1]:.2f} s, but its file ends earlier"
        if total == 0 and number == 0:
            yield shards.Skipped(video, self.too_short(video, header), video)
        first, end = total * number // slices, total * (number + 1) // slices
        if first < end:
            until = end * longest
            if (self.split_shots or longest > shortest) and number == slices - 1:
                # What is left at the end may hold one more.
                until = video_io.ticks(seconds, shape.fps)
            ticks = range(first * longest, until)
            notes: set[str] = set()
            times = (begin + tick / shape.fps for tick in ticks)
            frames_hwc = sample(times, shape.size, notes=notes)
            made, repeated, still, last_hwc = 0, 0, 0, None
            between, left, at = 0, 0, ticks.start
            for tick, clip in self._windowed(frames_hwc, ticks.start, shape.lengths):
                between, left, at = between + left, 0, tick + len(clip)
                if len(clip) < shortest:
                    left = len(clip)
                    continue
                if all(one is last_hwc for one in clip):
                    still += len(clip)
                    continue
                pairs = itertools.pairwise([last_hwc, *clip])
                repeated += sum(one is another for one, another in pairs)
                made, last_hwc = made + len(clip), clip[-1]
                start = begin + tick / shape.fps
                yield self._record(video, tick, start, shape.fps, np.stack(clip), text)
            if at < ticks.stop:
                where = f"{video} from {begin + (at - left) / shape.fps:.2f} s on"
                yield shards.Skipped(where, ends, video)
            elif not made:
                part = f"{video} ({number + 1} of {slices})" if slices > 1 else video
                yield shards.Skipped(part, self._no_shot(shape), video)
            for what in sorted(notes) if made else ():
                yield shards.Remark(video, what, made)
            if repeated:
                yield shards.Remark(video, _REPEATED, repeated)
            if still:
                yield shards.Remark(video, _STILL, still)
            if made and between:
                yield shards.Remark(video, _BETWEEN, between)
            if made and (what := self._trimmed(header, shape)):
                yield shards.Remark(video, what, made)
        if number == slices - 1 and missing > _MISSING:
            where = f"{video} from {header.seconds:.2f} s on"
            yield shards.Skipped(where, ends, video)

    def _no_shot(self, shape: Shape) -> str:
        return f"none of its shots has {shape.lengths[-1]} frames at {shape.fps:g} fps"

    def _trimmed(self, header: video_io.Header, shape: Shape) -> str:
        """Says how much of its frames is cropped, if a video has a size for its aspect."""
        if not isinstance(self.size, shape_classes.Budget):
            return ""
        lost = 100 * shape_classes.cropped(header.shown, shape.size)
        most = next(most for most in _CROPS if lost <= most)
        return _TRIMMED.format(most) if lost else ""

    def _windowed(
        self, frames_hwc: Iterator[np.ndarray], tick: int, lengths: tuple[int, ...]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields windows: the tick of the first frame, and the frames.

        What is left where a cut or the end of the video comes, and is shorter than any of
        the lengths, is a window as well.
        """
        shown = ((frame_hwc, False) for frame_hwc in frames_hwc)
        if self.split_shots and lengths[0] > 1:
            shown = cuts.flagged(frames_hwc)

        def cut(window: list[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
            first = 0
            for length in shape_classes.pieces(len(window), lengths):
                yield tick + first, window[first : first + length]
                first += length
            if first < len(window):
                yield tick + first, window[first:]

        window: list[np.ndarray] = []
        for frame_hwc, new_shot in shown:
            if window and (new_shot or len(window) == lengths[0]):
                yield from cut(window)
                tick, window = tick + len(window), []
            window.append(frame_hwc)
        yield from cut(window)

    def _record(
        self,
        video: str,
        tick: int,
        start: float,
        fps: float,
        frames_thwc: np.ndarray,
        text: folders.Text,
    ) -> records.ClipRecord:
        if self.lossless:
            encoded = video_io.encode_lossless(frames_thwc, fps)
        else:
            encoded = video_io.encode_mp4(frames_thwc, fps, crf=_CRF)
        # The windows of a slice do not overlap, so that no two have the same number.
        window = tick // self.lengths[-1]
        one_shot = ((0, len(frames_thwc)),)
        shots = one_shot if self.split_shots else cuts.shots(frames_thwc)
        size = frames_thwc.shape[:3]
        return self._record_of(video, window, start, fps, size, shots, encoded, text)

    def _record_of(
        self,
        video: str,
        window: int,
        start: float,
        fps: float,
        size: tuple[int, int, int],
        shots: tuple[tuple[int, int], ...],
        encoded: bytes,
        text: folders.Text,
    ) -> records.ClipRecord:
        return records.ClipRecord(
            id=_clip_id(video, window),
            video=encoded,
            # Measured rates have digits without meaning, which differ between videos.
            fps=round(fps, 3) if self.fps is None else fps,
            num_frames=size[0],
            height=size[1],
            width=size[2],
            captions=text.captions,
            caption_sources=text.sources,
            shots=shots,
            scores=text.scores,
            licence=text.licence,
            source=text.source or f"{video} from {start:.3f} s",
            subject=text.subject,
            edit_of=_clip_id(text.edit_of, window) if text.edit_of else "",
        )


def _clip_id(video: str, window: int) -> str:
    """The id of a video's clip, by its number."""
    return f"{video}#{window:05d}"


@dataclasses.dataclass(frozen=True)
class TarClips(FolderClips):
    """Clips out of tar archives of videos and captions; see `webdataset`.

    A clip of ours, of the same size, rate and length, keeps its encoded bytes.

    Args:
      folder: of the archives.
      archives: their names, relative to the folder.
      ...: as for `FolderClips`.
    """

    archives: tuple[str, ...] = ()
    form = "webdataset"

    @functools.cached_property
    def listing(self) -> folders.Listing:
        """The members of the archives; sent to the worker processes."""
        folder = self.folder.absolute()  # for processes in other working directories
        return webdataset.scan(folder, self.archives, self.caption_encoding)

    def _windows(self, video, header, number, slices, text, sample):
        if clip := self._kept(video, header, text):
            yield clip
        else:
            yield from super()._windows(video, header, number, slices, text, sample)

    def _kept(
        self, video: str, header: video_io.Header, text: folders.Text
    ) -> records.ClipRecord | None:
        """The clip that a video is, as it is encoded; None if it has to be encoded.

        The bytes are decoded as training does it, so that what they do is found here.
        """
        written, place = self.listing.written.get(video), self.listing.places[video]
        if written is None or place.size > _SLICE_BYTES:
            return None
        shape = self.shape_of(video, header)
        size = (shape.lengths[0], *shape.size)
        if size != (written.num_frames, written.height, written.width):
            return None
        rates = np.array([written.fps, header.fps])
        kind = (header.container, header.codec)
        if kind != ("mov", "h264") or not np.allclose(rates, shape.fps, rtol=1e-4):
            return None
        encoded = place.read()
        if hashlib.sha256(encoded).hexdigest() != written.sha256:
            return None
        with workers.limited_memory():
            decoded = video_io.decode(
                encoded, max_frames=size[0] + 1, limits=self.limits
            )
        if decoded.frames.shape[:3] != size or decoded.notes:
            return None
        shots = cuts.shots(decoded.frames)
        if self.split_shots and len(shots) > 1:
            return None
        fps = written.fps if self.fps is None else self.fps
        clip = self._record_of(video, 0, 0.0, fps, size, shots, encoded, text)
        own = {name: getattr(written, name) for name in ("period", "state_json")}
        return dataclasses.replace(clip, **own)


@dataclasses.dataclass(frozen=True)
class ListClips(FolderClips):
    """Clips out of the videos, or parts of videos, that lists name; see `video_lists`.

    Args:
      folder: of the videos.
      lists: the lists by name.
      ...: as for `FolderClips`.
    """

    lists: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    form = "list"

    @functools.cached_property
    def listing(self) -> folders.Listing:
        """The videos of the lists; sent to the worker processes."""
        return video_lists.scan(
            self.folder.absolute(),  # for processes in other working directories
            {name: path.absolute() for name, path in self.lists.items()},
            follow_links=self.follow_links,
            encoding=self.caption_encoding,
        )
