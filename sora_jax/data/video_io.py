"""Video files in and out through PyAV, with limits for files that nobody trusts.

Everything that can go wrong inside the decoder leaves this module as one exception,
`UnreadableVideo`. Decoders notice only part of the damage that a file can have (about
half of bit-flipped H.264 files decode without a word), so stored clips carry a checksum
besides. The container format is chosen from the first bytes and given to FFmpeg, which
therefore never guesses a playlist format that opens further files or addresses.

Letters: t time, h height, w width, c channel (RGB). Frames are uint8.
"""

import contextlib
import dataclasses
import fractions
import io
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import av
import av.video.reformatter
import numpy as np
import PIL.Image
import PIL.ImageOps

# Suffixes that a folder is searched for; what a file is, its first bytes decide.
SUFFIXES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".gif")
# Atoms that an MP4 or QuickTime file may begin with, behind four bytes of length.
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class UnreadableVideo(ValueError):
    """A video or picture that cannot be decoded or is beyond the limits."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may ask for; checked on its header before anything is decoded.

    Attributes:
      max_bytes: size of the file.
      max_side: width or height of a frame.
      max_pixels: pixels of a frame.
      max_aspect: the longer side over the shorter.
      max_frames: frames in the file.
      max_seconds: length of the file.
      max_total_pixels: pixels of all frames that `decode` returns at once.
    """

    max_bytes: int = 4 << 30
    max_side: int = 8192
    max_pixels: int = 4096 * 2304
    max_aspect: float = 20.0
    max_frames: int = 1_000_000
    max_seconds: float = 6 * 3600.0
    max_total_pixels: int = 3_000_000_000


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded frames, uint8[t, h, w, 3], and how many there are in a second.

    `size` is (height, width) as stored.
    """

    frames: np.ndarray
    fps: float
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about itself; width and height as stored, before rotation."""

    container: str
    codec: str
    width: int
    height: int
    fps: float
    seconds: float


class _Refused(Exception):
    """A reason of ours; the boundary puts the name of the file in front."""


@contextlib.contextmanager
def _boundary(name: str) -> Iterator[None]:
    """Turns every failure of a decoder into UnreadableVideo."""
    try:
        yield
    except _Refused as error:
        raise UnreadableVideo(f"{name}: {error}") from None
    except Exception as error:
        # A damaged file was seen to raise seven unrelated types here (InvalidDataError,
        # EOFError, IndexError, MemoryError, UnicodeDecodeError, ...), so all are caught.
        reason = str(error) or "no reason given"
        raise UnreadableVideo(f"{name}: {type(error).__name__}: {reason}") from error


def _container_format(head: bytes) -> str:
    if head[4:8] in _MOV_ATOMS:
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    raise _Refused("it is not an MP4, MOV, WebM, MKV or GIF file")


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise _Refused(f"it has frames of {width}x{height} pixels")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise _Refused(
            f"its frames of {width}x{height} are beyond the limit of "
            f"{limits.max_side} a side and {limits.max_pixels} pixels"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise _Refused(
            f"its frames of {width}x{height} are longer than {limits.max_aspect:g}:1"
        )


@contextlib.contextmanager
def _opened(source: bytes | str | os.PathLike, limits: Limits):
    """Yields (container, video stream, Header) of a file that is within the limits."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            name, file = "video bytes", io.BytesIO(source)
            size = len(source)
        else:
            name, file = os.fspath(source), None
            size = 0
        stack.enter_context(_boundary(name))
        if file is None:
            # Opened here, so that FFmpeg sees bytes and never a name or an address.
            file = stack.enter_context(open(source, "rb"))
            size = os.fstat(file.fileno()).st_size
        if size > limits.max_bytes:
            raise _Refused(f"{size} bytes are beyond the limit of {limits.max_bytes}")
        head = file.read(16)
        file.seek(0)
        container_format = _container_format(head)
        options = {"max_pixels": str(limits.max_pixels)}
        container = stack.enter_context(
            av.open(
                file,
                format=container_format,
                options=options,
                metadata_errors="replace",
            )
        )
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams or streams[0].codec_context is None:
            raise _Refused("it has no video stream that can be decoded")
        stream = streams[0]
        stream.codec_context.options = options
        stream.thread_count = 1
        yield container, stream, _header(container, stream, limits)


def _header(container, stream, limits: Limits) -> Header:
    context = stream.codec_context
    _check_size(context.width, context.height, limits)
    fps = stream.average_rate or stream.guessed_rate
    if not fps or not 0 < fps <= 1000:
        raise _Refused(f"it has no usable frame rate ({fps})")
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    else:
        seconds = stream.frames / float(fps)
    if seconds > limits.max_seconds or stream.frames > limits.max_frames:
        raise _Refused(
            f"its {stream.frames} frames in {seconds:.0f} s are beyond the limit of "
            f"{limits.max_frames} frames and {limits.max_seconds:.0f} s"
        )
    return Header(
        container.format.name,
        context.name,
        context.width,
        context.height,
        float(fps),
        max(0.0, seconds),
    )


def probe(source: bytes | str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Reads a file's header without decoding its frames.

    `seconds` is 0 where the header does not say; then the packets are counted.

    Raises:
      UnreadableVideo: it is no video, is damaged, or is beyond the limits.
    """
    with _opened(source, limits) as (container, stream, header):
        if header.seconds > 0:
            return header
        last = fractions.Fraction(0)
        for packet in container.demux(stream):
            if packet.pts is not None:
                last = max(last, (packet.pts + (packet.duration or 0)))
        seconds = float(last * stream.time_base)
        return dataclasses.replace(header, seconds=seconds)


def read_comment(
    source: bytes | str | os.PathLike, limits: Limits = DEFAULT_LIMITS
) -> str | None:
    """Reads the comment that is stored in a video file; None where there is none.

    Raises:
      UnreadableVideo: it is no video, is damaged, or is beyond the limits.
    """
    with _opened(source, limits) as (container, _, _):
        tags = {name.lower(): text for name, text in container.metadata.items()}
        return tags.get("comment")  # Matroska's names are in capitals


def _frames(container, stream, limits: Limits) -> Iterator[av.VideoFrame]:
    """Yields the decoded frames and refuses those that lie about their size."""
    for count, frame in enumerate(container.decode(stream)):
        if count >= limits.max_frames:
            raise _Refused(f"it has more than {limits.max_frames} frames")
        if frame.is_corrupt:
            raise _Refused(f"frame {count} is damaged")
        _check_size(frame.width, frame.height, limits)
        yield frame


def decode(
    source: bytes | str | os.PathLike,
    *,
    max_frames: int | None = None,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Video:
    """Decodes a video as stored: no rotation, no resampling.

    Args:
      source: the file's bytes or its path.
      max_frames: decode only so many from the start.
      shrink: is applied to each frame uint8[h, w, 3] as soon as it is decoded, so that
        memory follows what it returns, not what is stored.
      limits: what the file may ask for.

    Returns:
      Frames uint8[t, h, w, 3] and the mean frame rate.

    Raises:
      UnreadableVideo: it is no video, is damaged, has no frames, changes its size on
        the way, or is beyond the limits.
    """
    with _opened(source, limits) as (container, stream, header):
        reformatter = av.video.reformatter.VideoReformatter()
        frames_hwc, size, pixels = [], None, 0
        for frame in _frames(container, stream, limits):
            if max_frames is not None and len(frames_hwc) == max_frames:
                break
            frame_hwc = _rgb(frame, reformatter)
            size = size or frame_hwc.shape[:2]
            if frame_hwc.shape[:2] != size:
                raise _Refused(
                    f"its frames change from {size} to {frame_hwc.shape[:2]}"
                )
            frame_hwc = shrink(frame_hwc) if shrink else frame_hwc
            pixels += frame_hwc.shape[0] * frame_hwc.shape[1]
            if pixels > limits.max_total_pixels:
                raise _Refused(
                    f"it has more than {limits.max_total_pixels} pixels in all"
                )
            frames_hwc.append(frame_hwc)
        if not frames_hwc:
            raise _Refused("it has no frames")
        return Video(np.stack(frames_hwc), header.fps, size)


def _rgb(frame: av.VideoFrame, reformatter) -> np.ndarray:
    if frame.format.name != "gbrp":
        # One reformatter for all frames: a fresh one costs more than the decoding.
        frame = reformatter.reformat(frame, format="rgb24")
    return frame.to_ndarray()


def sample(
    source: bytes | str | os.PathLike,
    seconds: Sequence[float],
    size: tuple[int, int],
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """Yields the frames that are on screen at the given times, cropped and resized.

    A frame is turned upright, its pixels are made square, it is scaled until it covers
    the size, and its middle is cut out.

    Args:
      source: the file's bytes or its path.
      seconds: ascending times from the file's start.
      size: (height, width) of the result.
      limits: what the file may ask for.

    Yields:
      uint8[h, w, 3] for each time, until the file ends; a file that is shorter than it
      says yields fewer frames than times.

    Raises:
      UnreadableVideo: as for `decode`.
    """
    with _opened(source, limits) as (container, stream, _):
        reformatter = av.video.reformatter.VideoReformatter()
        origin = stream.start_time or 0
        if seconds[0] > 2.0:
            # To the key frame before it; what lies in between is decoded and dropped.
            offset = origin + int(seconds[0] / stream.time_base)
            container.seek(offset, stream=stream)
        wanted, shown = 0, None
        for frame in _frames(container, stream, limits):
            if frame.pts is None:
                raise _Refused("a frame has no time stamp")
            starts = float((frame.pts - origin) * stream.time_base)
            if shown is None and wanted == 0 and starts > seconds[0] + 1e-3:
                shown = frame  # nothing is on screen earlier than the first frame
            picture_hwc = None
            while wanted < len(seconds) and seconds[wanted] < starts - 1e-3:
                if picture_hwc is None:
                    picture_hwc = _fit(shown, size, reformatter)
                yield picture_hwc
                wanted += 1
            if wanted == len(seconds):
                return
            shown = frame
        if shown is None:
            raise _Refused("it has no frames")
        ends = float((shown.pts - origin) * stream.time_base) + 1 / float(
            stream.average_rate or stream.guessed_rate
        )
        picture_hwc = _fit(shown, size, reformatter)
        while wanted < len(seconds) and seconds[wanted] < ends - 1e-3:
            yield picture_hwc
            wanted += 1


def _fit(frame: av.VideoFrame, size: tuple[int, int], reformatter) -> np.ndarray:
    quarter_turns = round(frame.rotation / 90) % 4
    height, width = size if quarter_turns % 2 == 0 else size[::-1]
    aspect = float(getattr(frame, "sample_aspect_ratio", None) or 1)
    if not 0.1 <= aspect <= 10:
        aspect = 1.0
    scale = max(width / (frame.width * aspect), height / frame.height)
    scaled = reformatter.reformat(
        frame,
        width=max(width, round(frame.width * aspect * scale)),
        height=max(height, round(frame.height * scale)),
        format="rgb24",
        interpolation="AREA" if scale < 1 else "BICUBIC",
    )
    picture_hwc = scaled.to_ndarray()
    top = (picture_hwc.shape[0] - height) // 2
    left = (picture_hwc.shape[1] - width) // 2
    picture_hwc = picture_hwc[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(picture_hwc, quarter_turns))


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

    4:2:0 in BT.709, index in front of the data.

    Args:
      frames_thwc: the frames; height and width even.
      fps: frames a second.
      crf: x264's quality, lower is better; 18 looks lossless, 23 is x264's default.
      metadata: texts stored in the file, such as {"comment": "..."}.

    Raises:
      ValueError: an odd height or width.
    """
    _check_even(frames_thwc)
    options = {"crf": str(crf), "preset": "medium"}
    # The index is moved to the front by reading the file again, which takes a real one.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        _encode(path, frames_thwc, fps, "libx264", "yuv420p", options, metadata)
        return path.read_bytes()


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
        file, frames_thwc, fps, "libvpx-vp9", "yuv420p", options, metadata,
        container="webm",
    )  # fmt: skip
    return file.getvalue()


def _check_even(frames_thwc: np.ndarray) -> None:
    height, width = frames_thwc.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"4:2:0 video has an even size, not {width}x{height}")


def _encode(
    file, frames_thwc, fps, codec, pixel_format, options, metadata=None, container="mp4"
):
    if frames_thwc.dtype != np.uint8 or frames_thwc.shape[3:] != (3,):
        raise ValueError(
            f"frames are uint8[t, h, w, 3], not {frames_thwc.dtype}{frames_thwc.shape}"
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


def read_image(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Reads a picture (PNG, JPEG, WebP, BMP, GIF), upright, as uint8[h, w, 3].

    Raises:
      UnreadableVideo: it is no picture, is damaged, or is beyond the limits.
    """
    with _boundary(os.fspath(path)), warnings.catch_warnings():
        # Pillow only warns of a picture that unpacks to something huge.
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_size(image.width, image.height, limits)
            return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
