"""Opens untrusted video files with PyAV and decodes their frames, within limits.

All failures inside the decoder become one exception, `UnreadableVideo`. Decoders notice
only some damage (about half of bit-flipped H.264 files decode without an error), so
stored clips also have a checksum. The container format is chosen from the first bytes and
passed to FFmpeg, so that it never guesses a playlist format that opens other files or
addresses.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator

import av

from sora_jax.data import frames

# Atoms that an MP4 or QuickTime file may begin with, behind four bytes of length.
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


@dataclasses.dataclass(frozen=True)
class Region:
    """A video that is a part of a file, such as a member of a tar archive.

    Attributes:
      path: the file.
      start: of the video, in bytes.
      size: of the video, in bytes.
    """

    path: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.path} from byte {self.start}"

    def read(self) -> bytes:
        """Returns the video's bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class _RegionFile(io.RawIOBase):
    """The bytes of a region as a file that is read and sought in."""

    def __init__(self, file: io.BufferedReader, region: Region):
        self._file, self._region, self._position = file, region, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_CUR: self._position, os.SEEK_END: self._region.size}
        position = origin.get(whence, 0) + offset
        if position < 0:
            raise ValueError(f"byte {position} is before the file")
        self._position = position
        return position

    def readinto(self, buffer) -> int:
        left = max(0, self._region.size - self._position)
        self._file.seek(self._region.start + self._position)
        read = self._file.readinto(memoryview(buffer)[:left])
        self._position += read
        return read


# What a video is read from: its bytes, its path, or a part of a file.
type Origin = bytes | str | os.PathLike | Region


class UnreadableVideo(ValueError):
    """A video or picture that cannot be decoded or is beyond the limits."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a file, checked on its header before anything is decoded.

    What a header does not tell is checked while the file is decoded.

    Attributes:
      max_bytes: size of the file.
      max_side: width or height of a frame.
      max_pixels: pixels of a frame.
      max_aspect: the longer side over the shorter.
      max_frames: frames in the file.
      max_seconds: length of the file.
      max_total_pixels: pixels of all frames that `decode` returns at once.
      max_expansion: pixels of all frames per byte of the file, so that the work that a
        file makes is bounded by its size. A recording of a still 4K screen has 100,000.
      max_work_seconds: seconds that a file, or a slice of a long one, may take in a
        process that can be ended.
    """

    max_bytes: int = 64 << 30
    max_side: int = 8192
    max_pixels: int = 4096 * 2304
    max_aspect: float = 20.0
    max_frames: int = 24 * 3600 * 60
    max_seconds: float = 24 * 3600.0
    max_total_pixels: int = 3_000_000_000
    max_expansion: int = 200_000
    max_work_seconds: float = 3600.0


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Header:
    """A file's properties by its header; width and height as stored, before rotation.

    From `video_io.probe`, `seconds` is the time from the first frame to the end of the
    last, which starts at `last`, `missing` by how much the file ends too early, and `shown`
    the (height, width) at which players show it: upright, with square pixels. `begins` is
    the file's own time of its first frame.
    """

    container: str
    codec: str
    width: int
    height: int
    fps: float
    seconds: float
    last: float = 0.0
    missing: float = 0.0
    shown: tuple[int, int] = (0, 0)
    begins: float | None = None


@contextlib.contextmanager
def boundary(source: Origin) -> Iterator[None]:
    """Turns every failure of a decoder into UnreadableVideo."""
    name = "video bytes" if isinstance(source, bytes) else str(source)
    try:
        yield
    except UnreadableVideo:
        raise
    except frames.Refused as error:
        raise UnreadableVideo(f"{name}: {error}") from None
    except Exception as error:
        # Damaged files raise many unrelated types (InvalidDataError, EOFError,
        # IndexError, MemoryError, UnicodeDecodeError, ...), so all are caught.
        reason = getattr(error, "strerror", None)  # of FFmpeg or the file system
        reason = reason or str(error) or type(error).__name__
        raise UnreadableVideo(f"{name}: it cannot be read: {reason}") from error


def _container_format(head: bytes) -> str:
    if head[4:8] in _MOV_ATOMS:
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    # Packets of 188 bytes, or behind four of their times in .m2ts, begin with a G.
    if head[::188][:3] == b"GGG" or head[4::192][:3] == b"GGG":
        return "mpegts"
    raise frames.Refused("it is not an MP4, MOV, WebM, MKV, AVI, MPEG or GIF file")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raises Refused for frames beyond the limits."""
    if width < 1 or height < 1:
        raise frames.Refused(f"it has frames of {width}x{height} pixels")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise frames.Refused(
            f"its frames of {width}x{height} are beyond the limit of "
            f"{limits.max_side} a side and {limits.max_pixels} pixels"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise frames.Refused(
            f"its frames of {width}x{height} are longer than {limits.max_aspect:g}:1"
        )


def check_expansion(pixels: int, size: int, limits: Limits) -> None:
    """Raises Refused if a file of `size` bytes unpacks to too many pixels."""
    if pixels > limits.max_expansion * size:
        raise frames.Refused(
            f"its {size} bytes unpack to more than {limits.max_expansion} pixels a byte"
        )


@contextlib.contextmanager
def opened(source: Origin, limits: Limits):
    """Yields (container, video stream, Header) of a file that is within the limits."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(boundary(source))
        if isinstance(source, bytes):
            file, size = io.BytesIO(source), len(source)
        elif isinstance(source, Region):
            whole = stack.enter_context(open(source.path, "rb"))
            file, size = io.BufferedReader(_RegionFile(whole, source)), source.size
        else:
            # Opened here, so that FFmpeg sees bytes and never a name or an address.
            file = stack.enter_context(open(source, "rb"))
            size = os.fstat(file.fileno()).st_size
        if size > limits.max_bytes:
            raise frames.Refused(
                f"{size} bytes are beyond the limit of {limits.max_bytes}"
            )
        head = file.read(600)
        file.seek(0)
        # FFmpeg takes no more than 2^31 - 1.
        options = {"max_pixels": str(min(limits.max_pixels, 2**31 - 1))}
        container = stack.enter_context(
            av.open(
                file,
                format=_container_format(head),
                options=options,
                metadata_errors="replace",
            )
        )
        stream = _chosen(container.streams.video)
        stream.codec_context.options = options
        stream.thread_count = 1
        yield container, stream, _header(container, stream, limits)


def _chosen(streams) -> av.VideoStream:
    """The stream that players show: the first that is marked as default, or the first."""
    kinds = av.stream.Disposition
    pictures = kinds.attached_pic | kinds.timed_thumbnails
    decodable = [
        stream
        for stream in streams
        if stream.codec_context is not None and not stream.disposition & pictures
    ]
    if not decodable:
        raise frames.Refused("it has no video stream that can be decoded")
    return next((s for s in decodable if s.disposition & kinds.default), decodable[0])


def _header(container, stream, limits: Limits) -> Header:
    context = stream.codec_context
    check_size(context.width, context.height, limits)
    fps = stream.average_rate or stream.guessed_rate
    if not fps or not 0 < fps <= 1000:
        raise frames.Refused(f"it has no usable frame rate ({fps})")
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    else:
        seconds = stream.frames / float(fps)
    if has_no_times(container):
        # FFmpeg takes what is left of an AVI that is cut off for its length.
        seconds = max(seconds, stream.frames / float(fps))
    header = Header(
        container.format.name,
        context.name,
        context.width,
        context.height,
        float(fps),
        max(0.0, seconds),
    )
    check_length(header, stream.frames, limits)
    pixels = context.width * context.height
    check_expansion(stream.frames * pixels, container.size, limits)
    return header


def check_length(header: Header, count: int, limits: Limits) -> None:
    if header.seconds > limits.max_seconds or count > limits.max_frames:
        raise frames.Refused(
            f"its {count} frames in {header.seconds:.0f} s are beyond the limit of "
            f"{limits.max_frames} frames and {limits.max_seconds:.0f} s"
        )


def seek(container, stream: av.VideoStream, seconds: float) -> bool:
    """Seeks the key frame before a time stamp; False if the format has no index."""
    try:
        container.seek(int(seconds / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def lasts(packet: av.Packet, fps: float) -> float:
    """Seconds that a packet lasts, by the file or by the frame rate."""
    return float(packet.duration * packet.time_base) if packet.duration else 1 / fps


def seconds_of(frame: av.VideoFrame) -> float:
    time = frame.dts if frame.pts is None else frame.pts
    if time is None:
        raise frames.Refused("a frame has no time stamp")
    return float(time * frame.time_base)


def has_no_times(container) -> bool:
    """Whether the format has decoding times of packets, but no presentation times."""
    return container.format.name == "avi"


def decoded(
    container, stream, limits: Limits, after_seek: bool = False
) -> Iterator[av.VideoFrame]:
    """Yields the decoded frames, refusing damaged ones and those beyond the limits."""
    decoder = stream.codec_context
    transparent = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if transparent and stream.metadata.get("alpha_mode") == "1":
        # FFmpeg's own decoder ignores the alpha channel.
        decoder = av.CodecContext.create(transparent, "r")
        decoder.options, decoder.thread_count = stream.codec_context.options, 1
    count, pixels, time, step = 0, 0, None, 0
    for packet in container.demux(stream):
        for frame in decoder.decode(packet):
            if has_no_times(container):
                # Frames come in order, each with a later packet, except the last ones.
                if frame.dts is not None:
                    step = step if time is None else frame.dts - time
                    time = frame.dts
                else:
                    time = (time or 0) + step
                frame.pts = time
            if frame.is_corrupt and after_seek and count == 0:
                continue  # it refers to frames before the key frame
            if frame.is_corrupt:
                raise frames.Refused(f"frame {count} is damaged")
            if count >= limits.max_frames:
                raise frames.Refused(f"it has more than {limits.max_frames} frames")
            check_size(frame.width, frame.height, limits)
            pixels += frame.width * frame.height
            check_expansion(pixels, container.size, limits)
            yield frame
            count += 1


def progressive(
    decoded: Iterator[av.VideoFrame], notes: set[str]
) -> Iterator[av.VideoFrame]:
    """Deinterlaces interlaced frames at the same rate; other videos are unchanged."""
    graph = None
    for frame in decoded:
        if graph is None and frame.interlaced_frame:
            notes.add(frames.INTERLACED)
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base=str(frame.time_base),
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        ),
        graph.add("bwdif", mode="send_frame", deint="interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
