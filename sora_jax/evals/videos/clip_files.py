"""Folders of clips: video files, folders of frames, arrays.

A clip is a video file, a folder of numbered .jpg, .png or .webp frames, an array uint8
[t, h, w, 3] in a .npy or .npz file, or one of an array [n, t, h, w, 3]. What cannot be
used is said in one sentence and counted, whatever it is: no file is skipped in silence.

Letters: n clips, t frames, h height, w width.
"""

import collections
import dataclasses
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from sora_jax.data import folders, frame_folders, video_io

# What decides the pixels of a clip, for manifests.
CODE = ("evals/videos/clip_files.py", "data/video_io.py", "data/containers.py")
CODE += ("data/frames.py", "data/colour.py", "data/pictures.py")
CODE += ("data/frame_folders.py",)
ARRAYS = (".npy", ".npz")
_LIMITS = video_io.Limits(max_total_pixels=400_000_000)  # of a clip as used, 1.2 GB
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class UnusableClip(ValueError):
    """A clip that cannot be read, or has not the frames that are needed."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one clip lies.

    Attributes:
      name: of the clip, from the folder on.
      path: of its file, or of its folder of frames.
      kind: suffix of its file; of frames the lossy one, where there is any.
      member: of a .npz file.
      index: in an array of many clips.
      colour: see `video_io.read`.
      frames: names of the files in a folder of frames.
    """

    name: str
    path: pathlib.Path
    kind: str
    member: str | None = None
    index: int | None = None
    colour: str | None = None
    frames: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
      sources: the clips, in the order of files, and within one as they lie.
      failures: one sentence for each file that holds none.
      notes: one sentence for what is not read at all.
    """

    sources: tuple[Source, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames uint8 [t, h, w, 3] of a clip, and whether it goes on after them.

    `size` is (height, width) as seen. `fps` is of the file, before the stride; None
    where it does not say. `notes` are those of `video_io.Video`.
    """

    video_thwc: np.ndarray
    longer: bool
    size: tuple[int, int]
    fps: float | None = None
    notes: tuple[str, ...] = ()


def find(folder: pathlib.Path, colour: str | None = None) -> Found:
    """Lists the clips of a folder and of the folders in it.

    Pictures that lie beside clips are no frames, and are not read. `colour` is for
    videos that do not say how their colours are coded: see `video_io.read`.

    Raises:
      FileNotFoundError: there is no such folder, or it is empty.
      ValueError: it is one clip's folder of frames, or nothing in it can be a clip.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    sources, failures = [], []
    names, skipped = folders.walk(folder, follow_links=True)
    files = [name for name in names if _suffix(name) in (*video_io.SUFFIXES, *ARRAYS)]
    framed, read = frame_folders.find(folder, names, files), set(files)
    for name in files:
        path, kind = folder / name, _suffix(name)
        if kind in ARRAYS:
            try:
                sources += _in_arrays(name, path)
            except UnusableClip as error:
                failures.append(str(error))
        else:
            sources.append(Source(name, path, kind, colour=colour))
    for name, frames in framed.clips.items():
        kind = min({_suffix(frame) for frame in frames} - {".png"}, default=".png")
        sources.append(Source(name, folder / name, kind, frames=frames))
        read.update(f"{name}/{frame}" for frame in frames)
    others = collections.Counter(
        _suffix(name) or "no suffix" for name in names if name not in read
    )
    notes = [f"{one.file}: {one.reason}" for one in skipped]
    if not sources:
        raise _nothing(folder, [*failures, *notes], others)
    if others:
        notes.append(
            f"{others.total()} files of other kinds are not read ("
            f"{', '.join(sorted(others))})"
        )
    sources.sort(key=lambda s: (s.path.as_posix(), s.member or "", s.index or 0))
    return Found(tuple(sources), tuple(failures), tuple(notes))


def _suffix(name: str) -> str:
    return pathlib.PurePath(name).suffix.lower()


def drawn(
    count: int, num_clips: int | None, usable: Callable[[], int], *, seed: int = 0
) -> Iterator[int]:
    """Yields which of so many clips to read, whatever their names.

    They come in the order of names, since a file of arrays is read as a whole; those that
    fail are replaced until there are as many as wanted.

    Args:
      count: clips that there are.
      num_clips: how many are wanted; None: all.
      usable: says how many of those that were yielded can be used.
      seed: of the draw.
    """
    if num_clips is None or num_clips >= count:
        yield from range(count)
        return
    order, position = np.random.default_rng(seed).permutation(count), 0
    while position < count and (missing := num_clips - usable()) > 0:
        chosen = order[position : position + missing]
        position += len(chosen)
        yield from sorted(map(int, chosen))


def _nothing(folder, failures, others) -> Exception:
    if failures:
        return ValueError(f"{folder} holds no clip that can be read: {failures[0]}")
    if others:
        return ValueError(
            f"{folder} holds no clips, only files of other kinds "
            f"({', '.join(sorted(others))}): videos, .png or .jpg frames, .npy or .npz "
            "are read"
        )
    return FileNotFoundError(f"{folder} is empty")


def _in_arrays(name: str, path: pathlib.Path) -> list[Source]:
    """The clips of a file of arrays, by its headers alone."""
    shapes = {}
    try:
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                shapes[None] = _header(file)
        else:
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.namelist()):
                    with archive.open(member) as file:
                        shapes[member.removesuffix(".npy")] = _header(file)
    except _BROKEN as error:
        raise UnusableClip(f"{name}: not an array that can be read: {error}") from None
    result = []
    for member, (shape, dtype) in shapes.items():
        label = name if member is None else f"{name}/{member}"
        if len(shape) not in (4, 5) or shape[-1] != 3:
            raise UnusableClip(
                f"{label}: an array of shape {list(shape)}, and a clip is [t, h, w, 3]"
            )
        if dtype != np.uint8:
            raise UnusableClip(
                f"{label}: an array of {dtype}, and only uint8 says what is black and "
                "what is white"
            )
        if len(shape) == 4:
            result.append(Source(label, path, path.suffix.lower(), member))
        for index in range(shape[0] if len(shape) == 5 else 0):
            clip = f"{label}[{index}]"
            result.append(Source(clip, path, path.suffix.lower(), member, index))
    if not result:
        raise UnusableClip(f"{name}: it holds no clips")
    return result


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in the .npy format; the values stay unread."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def told(notes: collections.Counter, count: int) -> list[str]:
    """Sentences of what was done to how many of the clips."""
    return [f"{n} of {count} clips: {what}" for what, n in sorted(notes.items())]


class Reader:
    """Reads chosen frames of clips; keeps the last file of arrays open.

    Args:
      num_frames: how many frames of a clip are used.
      least: how many a clip must have; None: as many as are used.
      stride: one frame in so many.
      start: "first", or "random" for a window somewhere in the clip, which its name
        decides; videos are then decoded as a whole.
      shrink: makes a frame uint8 [h, w, 3] smaller as it is read, so that no clip lies
        in memory at its full size, but for an array that is compressed; None: frames
        as they are.
    """

    def __init__(
        self,
        num_frames: int,
        stride: int,
        start: str = "first",
        *,
        least: int | None = None,
        shrink: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._stride, self._random = stride, start == "random"
        self._shrink = shrink
        self._span = (num_frames - 1) * stride + 1
        self._least = ((least or num_frames) - 1) * stride + 1
        self._opened = (None, None)

    def __call__(self, source: Source) -> Clip:
        """Returns the frames that are used.

        Raises:
          UnusableClip: with the sentence.
        """
        try:
            if source.frames:
                return self._frames(source)
            if source.kind in ARRAYS:
                array = self._array(source)
                array = array if source.index is None else array[source.index]
                return self._used(source, array, array.shape[1:3], shrink=self._shrink)
            most = None if self._random else self._span + 1
            decoded = video_io.decode(
                source.path,
                max_frames=most,
                shrink=self._shrink,
                colour=source.colour,
                limits=_LIMITS,
            )
            clip = self._used(source, decoded.frames, decoded.size, decoded.fps)
            return dataclasses.replace(clip, notes=decoded.notes)
        except video_io.UnreadableVideo as error:
            reason = str(error).removeprefix(f"{source.path}: ")
            raise UnusableClip(f"{source.name}: {reason}") from None

    def _used(self, source: Source, video_thwc, size, fps=None, shrink=None) -> Clip:
        """The window of a clip, of which an array's frames are not made smaller yet."""
        self._check_length(source, len(video_thwc))
        used_thwc = video_thwc[self._window(source, len(video_thwc))]
        if shrink:
            used_thwc = np.stack([shrink(frame_hwc) for frame_hwc in used_thwc])
        longer = len(video_thwc) > self._span
        return Clip(np.ascontiguousarray(used_thwc), longer, size, fps)

    def _window(self, source: Source, length: int) -> slice:
        """The frames of a clip that are used."""
        first = 0
        if self._random:
            rng = np.random.default_rng(zlib.crc32(source.name.encode()))
            first = int(rng.integers(0, length - self._span + 1))
        return slice(first, first + self._span, self._stride)

    def _check_length(self, source: Source, length: int) -> None:
        if length < self._least:
            some = f", of which one in {self._stride} is used" * (self._stride > 1)
            raise UnusableClip(
                f"{source.name}: it has {length} frames, and {self._least} are "
                f"needed{some}"
            )

    def _array(self, source: Source) -> np.ndarray:
        key = source.path, source.member
        if self._opened[0] != key:
            self._opened = (None, None)  # let the last one go before the next is read
            try:
                mode = "r" if source.member is None else None
                array = np.load(source.path, mmap_mode=mode, allow_pickle=False)
                if source.member is not None:
                    with array:
                        array = array[source.member]
            except _BROKEN as error:
                raise UnusableClip(f"{source.name}: {error}") from None
            self._opened = key, array
        return self._opened[1]

    def _frames(self, source: Source) -> Clip:
        """Reads a folder of frames."""
        clip = frame_folders.FrameFolder(source.path, source.frames, _LIMITS)
        self._check_length(source, len(clip))
        kept = range(len(clip))[self._window(source, len(clip))]
        pictures, size, notes = clip.gather(kept, self._shrink)
        return Clip(np.stack(pictures), len(clip) > self._span, size, notes=notes)
