"""Reads and writes video files with PyAV, with limits for untrusted files.

All reading of video goes through `read`. `containers` has the limits and opens files;
`frames` converts frames to pictures.

Letters: t time, h height, w width, c channel (RGB). Frames are uint8.
"""

import dataclasses
import fractions
import io
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import av
import av.video.reformatter
import numpy as np

from sora_jax.data import containers, frames
from sora_jax.data.containers import DEFAULT_LIMITS as DEFAULT_LIMITS
from sora_jax.data.containers import Header as Header
from sora_jax.data.containers import Limits as Limits
from sora_jax.data.containers import Origin as Origin
from sora_jax.data.containers import Region as Region
from sora_jax.data.containers import UnreadableVideo as UnreadableVideo
from sora_jax.data.pictures import read_image as read_image

# Suffixes of videos in a folder; a file's format is detected from its first bytes.
SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".webm",
    ".mkv",
    ".gif",
    ".avi",
    ".ts",
    ".m2ts",
    ".mts",
    ".mpg",
    ".mpeg",
)
# Seconds; Matroska's time stamps are whole milliseconds, so frames may start late.
_SLACK = 1e-3
# Seconds; for later times it is worth seeking the key frame before them.
_SEEK_FROM = 2.0
UNEVEN = "of an uneven frame rate, taken at its mean"


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded frames, uint8[t, h, w, 3], and their rate.

    `size` is (height, width) as displayed, before any shrinking; `notes` lists
    conversions of the frames, such as "interlaced, ...".
    """

    frames: np.ndarray
    fps: float
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shown:
    """A frame with the times at which it is on screen.

    Attributes:
      starts: seconds from the first frame of the file.
      fps: the file's mean rate.
      view: converts it to a picture.
    """

    frame: av.VideoFrame
    starts: float
    fps: float
    view: frames.View

    def whole(self) -> np.ndarray:
        """The picture uint8[h, w, 3] at its full size."""
        return self.view.whole(self.frame)

    def fit(self, size: tuple[int, int]) -> np.ndarray:
        """The picture scaled to cover (height, width) and cropped to its centre."""
        return self.view.fit(self.frame, size)


def probe(
    source: Origin,
    limits: Limits = DEFAULT_LIMITS,
    tell: Callable[[], None] = lambda: None,
) -> Header:
    """Measures a file by its first frame and its last packets.

    Args:
      source: the file's bytes, its path, or a part of a file.
      limits: of the file.
      tell: called for each packet, since some files must be read completely.

    Raises:
      UnreadableVideo: it is not a video, is damaged, or is beyond the limits.
    """
    first = _first(source, limits)
    begins, shown = containers.seconds_of(first.frame), first.view.size(first.frame)
    origin = begins
    with containers.opened(source, limits) as (container, stream, header):
        # A format without an index is read from its start.
        containers.seek(container, stream, 2 * limits.max_seconds)
        ends, last, dts = 0.0, None, 0
        for packet in container.demux():
            tell()
            time = packet.pts
            if time is None or containers.has_no_times(container):
                time = packet.dts
            if time is None or packet.is_discard:
                continue
            starts = float(time * packet.time_base)
            end = starts + containers.lasts(packet, header.fps)
            ends = max(ends, end)
            if packet.stream.index == stream.index:
                last = (starts, end) if last is None else max(last, (starts, end))
                dts = packet.dts
        if last is None:
            raise frames.Refused("its last frames cannot be found")
        missing = max(0.0, header.seconds - ends)
        starts, end = last
        is_mp4, entries = header.container == "mov", stream.index_entries
        if is_mp4 and stream.duration and len(entries) and entries[-1].timestamp == dts:
            # The file is complete, and MP4 stores when its last frame ends; durations of
            # single packets are in decoding order. The index of other formats may hold
            # only the packets that were read.
            whole = (stream.start_time or 0) + stream.duration
            end = max(starts, float(whole * stream.time_base))
        if containers.has_no_times(container):
            origin = float((stream.start_time or 0) * stream.time_base)
        header = dataclasses.replace(
            header,
            seconds=end - origin,
            last=starts - origin,
            missing=missing,
            shown=shown,
            begins=begins,
        )
        containers.check_length(header, stream.frames, limits)
        return header


def _first(source: Origin, limits: Limits) -> Shown:
    """The first frame; raises if it cannot be decoded."""
    with containers.boundary(source):
        for first in read(source, limits=limits):
            return first
        raise frames.Refused("it has no frames")


def ticks(seconds: float, fps: float) -> int:
    """How many of the times 0, 1 / fps, 2 / fps, ... are before the end of a file."""
    return max(0, math.ceil((seconds - _SLACK) * fps))


def read_comment(source: Origin) -> str | None:
    """Reads the comment stored in a video file; None if it has none.

    Raises:
      UnreadableVideo: it is not a video, is damaged, or is beyond the limits.
    """
    with containers.opened(source, DEFAULT_LIMITS) as (container, _, _):
        tags = {name.lower(): text for name, text in container.metadata.items()}
        return tags.get("comment")  # Matroska's names are in capitals


def read(
    source: Origin,
    start: float = 0.0,
    *,
    colour: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    begins: float | None = None,
) -> Iterator[Shown]:
    """Yields a video's frames as players show them.

    Rotated and mirrored as the file says, with square pixels, progressive, in BT.709.

    Args:
      source: the file's bytes, its path, or a part of a file.
      start: seconds from the first frame; frames before the one on screen at that time
        may be skipped.
      colour: one of `colour.MATRICES`, for untagged video; None: by its size.
      limits: of the file.
      begins: the file's own time of its first frame, from `probe`; None: it is found.

    Raises:
      UnreadableVideo: it is not a video, is damaged, or is beyond the limits.
    """
    if start > _SEEK_FROM:
        origin = begins
        if origin is None:
            origin = containers.seconds_of(_first(source, limits).frame)
        with containers.opened(source, limits) as (container, stream, header):
            # Frames after a key frame may refer to one before it; they are skipped.
            if containers.seek(container, stream, origin + start - 0.5):
                decoded = containers.decoded(container, stream, limits, after_seek=True)
                shown = _shown(decoded, stream, header, origin, colour, limits)
                first = next(shown, None)
                if first is not None and first.starts <= start + _SLACK:
                    yield first
                    yield from shown
                    return
    with containers.opened(source, limits) as (container, stream, header):
        decoded = containers.decoded(container, stream, limits)
        yield from _shown(decoded, stream, header, None, colour, limits)


def _shown(decoded, stream, header, origin, colour, limits) -> Iterator[Shown]:
    first = next(decoded, None)
    if first is None:
        return
    turn, aspect = frames.turn_of(first), frames.aspect_of(stream)
    reformatter = av.video.reformatter.VideoReformatter()
    view = frames.View(turn, aspect, colour, reformatter)
    decoded = itertools.chain([first], decoded)
    for frame in containers.progressive(decoded, view.notes):
        starts = containers.seconds_of(frame)
        origin = starts if origin is None else origin
        containers.check_size(*view.size(frame)[::-1], limits)
        view.check_colours(frame)
        yield Shown(frame, starts - origin, header.fps, view)


def on_screen(
    shown: Iterable[Shown], seconds: Iterable[float], header: Header
) -> Iterator[Shown]:
    """Yields the frame that is on screen at each of ascending times, until the end.

    Times before the first frame give the first frame; the last one stays on screen until
    the end in the header of `probe`.
    """
    due, last = iter(seconds), None
    time = next(due, None)
    for now in shown:
        while last is not None and time is not None and time < now.starts - _SLACK:
            yield last
            time = next(due, None)
        if time is None:
            return
        last = now
    if last is None:
        raise frames.Refused("it has no frames")
    ends = header.seconds
    if last.starts < header.last - _SLACK:
        ends = last.starts + 1 / header.fps  # frames after it are lost
    while time is not None and time < ends - _SLACK:
        yield last
        time = next(due, None)


def sample(
    source: Origin,
    seconds: Iterable[float],
    size: tuple[int, int],
    limits: Limits = DEFAULT_LIMITS,
    *,
    header: Header | None = None,
    colour: str | None = None,
    notes: set[str] | None = None,
    tell: Callable[[], None] = lambda: None,
) -> Iterator[np.ndarray]:
    """Yields the frames that are on screen at the given times, resized and cropped.

    A frame is scaled to cover the size and cropped to its centre.

    Args:
      source: the file's bytes, its path, or a part of a file.
      seconds: ascending times from the file's first frame.
      size: (height, width) of the result.
      limits: of the file.
      header: the result of `probe`; None: `probe` is called.
      colour: see `read`.
      notes: collects the notes of `Video.notes`.
      tell: called for each decoded frame.

    Yields:
      uint8[h, w, 3] for each time until the file ends; a truncated file yields fewer
      frames than times. A frame that is on screen at several of the times is the same
      array each time.

    Raises:
      UnreadableVideo: as for `read`.
    """
    with containers.boundary(source):
        header = header or probe(source, limits, tell)
        due = iter(seconds)
        first = next(due)
        shown = read(source, first, colour=colour, limits=limits, begins=header.begins)
        shown = _telling(shown, tell)

        def fit(now: Shown) -> np.ndarray:
            picture_hwc = now.fit(size)
            if notes is not None:
                notes.update(now.view.notes)
            return picture_hwc

        yield from pictures_at(shown, itertools.chain([first], due), header, fit)


def pictures_at(
    shown: Iterable[Shown],
    seconds: Iterable[float],
    header: Header,
    picture_of: Callable[[Shown], np.ndarray],
) -> Iterator[np.ndarray]:
    """Yields the pictures of `on_screen`; repeated frames are converted once."""
    last = picture_hwc = None
    for now in on_screen(shown, seconds, header):
        if now is not last:
            last, picture_hwc = now, picture_of(now)
        yield picture_hwc


def fitter(size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that fits pictures uint8[h, w, 3] to a size, as `Shown.fit`."""
    reformatter = av.video.reformatter.VideoReformatter()
    view = frames.View(frames.Turn(), 1.0, None, reformatter)

    def fit(picture_hwc: np.ndarray) -> np.ndarray:
        picture_hwc = np.ascontiguousarray(picture_hwc)
        return view.fit(av.VideoFrame.from_ndarray(picture_hwc, format="rgb24"), size)

    return fit


def _telling(shown: Iterator[Shown], tell: Callable[[], None]) -> Iterator[Shown]:
    for one in shown:
        tell()
        yield one


def decode(
    source: Origin,
    *,
    max_frames: int | None = None,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
    colour: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Video:
    """Decodes a video; one with an uneven frame rate is resampled at its mean rate.

    Args:
      source: the file's bytes, its path, or a part of a file.
      max_frames: decode only this many from the start.
      shrink: applied to each frame uint8[h, w, 3] as soon as it is decoded, so that only
        its results are kept in memory.
      colour: see `read`.
      limits: of the file.

    Returns:
      Frames uint8[t, h, w, 3] and the mean frame rate.

    Raises:
      UnreadableVideo: it is not a video, is damaged, has no frames, changes its size, or
        is beyond the limits.
    """
    with containers.boundary(source):
        shown = read(source, colour=colour, limits=limits)
        pictures, size, taken = _pictures(shown, max_frames, shrink, limits)
        fps, notes = taken[0].fps, taken[0].view.notes
        starts = np.array([one.starts for one in taken])
        if len(starts) > 1 and not _steady(starts, fps):
            fps = float((len(starts) - 1) / max(starts[-1], _SLACK))
            if not _steady(starts, fps):
                del pictures
                seconds = (index / fps for index in itertools.count())
                shown = read(source, colour=colour, limits=limits)
                shown = on_screen(shown, seconds, probe(source, limits))
                pictures, size, taken = _pictures(shown, max_frames, shrink, limits)
                notes = taken[0].view.notes | {UNEVEN}
        return Video(np.stack(pictures), fps, size, tuple(sorted(notes)))


def _steady(starts: np.ndarray, fps: float) -> bool:
    """Whether frames start within a quarter of a frame of their regular times."""
    late = np.abs(starts - np.arange(len(starts)) / fps)
    return bool(late.max() < 0.25 / fps + _SLACK)


def _pictures(shown, max_frames, shrink, limits):
    """Pictures of frames, their size before `shrink`, and the frames without pixels."""
    taken = []

    def whole():
        for one in itertools.islice(shown, max_frames):
            taken.append(dataclasses.replace(one, frame=None))
            yield one.whole()

    return *frames.gather(whole(), shrink, limits.max_total_pixels), taken


def encode_lossless(frames_thwc: np.ndarray, fps: float) -> bytes:
    """Encodes uint8[t, h, w, 3] so that `decode` returns exactly the same numbers.

    H.264 on RGB with quantiser 0 (High 4:4:4 Predictive) in MP4, one thread, no
    B-frames; equal frames give equal bytes.
    """
    file = io.BytesIO()
    options = {"qp": "0", "preset": "veryfast", "bf": "0"}
    _encode(file, frames_thwc, fps, "libx264rgb", "rgb24", options)
    return file.getvalue()


def encode_mp4(
    frames_thwc: np.ndarray,
    fps: float,
    *,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Encodes uint8[t, h, w, 3] as the H.264 MP4 that every browser plays.

    4:2:0 in BT.709, index in front of the data, one thread; equal frames give equal
    bytes.

    Args:
      frames_thwc: the frames; height and width even.
      fps: frames a second.
      crf: x264's quality, lower is better; 18 looks lossless, 23 is x264's default.
      metadata: texts stored in the file, such as {"comment": "..."}.

    Raises:
      ValueError: an odd height or width.
    """
    _check_even(frames_thwc)
    options = {
        "crf": str(crf),
        "preset": "medium",
        # Plain C code: the AVX-512 rate control reads past the end of rows whose length
        # is not a multiple of 128 pixels, so that equal frames gave different videos.
        "x264-params": "cpu-independent=1",
    }
    # Moving the index to the front reads the file again, which needs a real file.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        _encode(path, frames_thwc, fps, "libx264", "yuv420p", options, metadata)
        return path.read_bytes()


_DELAY = 2  # frames by which x264's preset "medium" decodes before it shows


def join_mp4(
    parts: Iterable[bytes],
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes videos one after the other into one .mp4, as they are encoded.

    Each keeps its bytes, so its frames do not depend on those around it.

    Args:
      parts: of `encode_mp4`, of one size and frame rate; taken one at a time.
      path: of the file.
      metadata: as of `encode_mp4`.

    Raises:
      ValueError: they differ in size or frame rate, or there are none.
    """
    settings = {"movflags": "+faststart+use_metadata_tags"}
    with av.open(
        os.fspath(path), "w", format="mp4", container_options=settings
    ) as container:
        container.metadata.update(metadata or {})
        stream, frames, count, first = None, 0, 0, None
        for part in parts:
            with av.open(io.BytesIO(part)) as source:
                video = source.streams.video[0]
                rate, base = video.average_rate, video.time_base
                form = (video.width, video.height, rate, base)
                if stream is None:
                    stream = container.add_stream_from_template(video)
                    first = form
                if form != first:
                    raise ValueError(
                        f"videos of {form[0]}x{form[1]} at {float(rate):g} frames a "
                        f"second and {first[0]}x{first[1]} at {float(first[2]):g} cannot "
                        "be joined"
                    )
                step = round(1 / rate / base)
                for packet in source.demux(video):
                    if packet.dts is None:  # the end of the stream
                        continue
                    packet.pts += frames * step
                    # One packet a frame, as late as any video needs: short ones have
                    # less delay, and their times would overlap.
                    packet.dts = (count - _DELAY) * step
                    packet.stream, count = stream, count + 1
                    container.mux(packet)
                frames += video.frames
        if stream is None:
            raise ValueError("there are no videos to join")


def encode_webm(
    frames_thwc: np.ndarray, fps: float, *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Encodes uint8[t, h, w, 3] as a VP9 WebM: free of patents, smaller than H.264.

    4:2:0 in BT.709, one thread; equal frames give equal bytes. Arguments as those of
    `encode_mp4`.
    """
    _check_even(frames_thwc)
    options = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}
    file = io.BytesIO()
    _encode(
        file,
        frames_thwc,
        fps,
        "libvpx-vp9",
        "yuv420p",
        options,
        metadata,
        container="webm",
    )
    return file.getvalue()


def _check_even(frames_thwc: np.ndarray) -> None:
    height, width = frames_thwc.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"4:2:0 video needs an even size, not {width}x{height}")


def _encode(
    file, frames_thwc, fps, codec, pixel_format, options, metadata=None, container="mp4"
):
    if frames_thwc.dtype != np.uint8 or frames_thwc.shape[3:] != (3,):
        raise ValueError(
            f"frames must be uint8[t, h, w, 3], not "
            f"{frames_thwc.dtype}{frames_thwc.shape}"
        )
    target, settings = file, {"fflags": "+bitexact"} if container == "webm" else {}
    if isinstance(file, os.PathLike):
        target = os.fspath(file)
        settings = {"movflags": "+faststart+use_metadata_tags"}
    rate = fractions.Fraction(fps).limit_denominator(1001)
    yuv = pixel_format != "rgb24"
    with av.open(
        target, "w", format=container, container_options=settings
    ) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames_thwc.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.thread_count = 1
        if yuv:
            stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
            stream.color_range = av.video.reformatter.ColorRange.MPEG
        reformatter = av.video.reformatter.VideoReformatter()
        for frame_hwc in frames_thwc:
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame_hwc), format="rgb24"
            )
            if yuv:
                frame = reformatter.reformat(
                    frame, format=pixel_format, dst_colorspace="ITU709"
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
