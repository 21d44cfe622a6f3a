"""Folders of clips: video files, folders of frames, arrays.

A clip is a video file, a folder of numbered .jpg, .png or .webp frames, an array uint8
[t, h, w, 3] in a .npy or .npz file, or one of an array [n, t, h, w, 3]. Every file that
cannot be used is reported in one sentence and counted.

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

# Sources that decide the pixels of a clip, for manifests.
CODE = (
    "evals/videos/clip_files.py",
    "data/video_io.py",
    "data/containers.py",
    "data/frames.py",
    "data/colour.py",
    "data/pictures.py",
    "data/frame_folders.py",
)
ARRAYS = (".npy", ".npz")
_LIMITS = video_io.Limits(max_total_pixels=400_000_000)  # per clip, 1.2 GB
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class UnusableClip(ValueError):
    """A clip that cannot be read, or that has too few frames."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one clip is stored.

    Attributes:
      name: path relative to the folder, with member and index.
      path: the file, or the folder of frames.
      kind: suffix of the file; of frames, the lossy suffix if there is one.
      member: in a .npz file.
      index: in an array of many clips.
      colour: see `video_io.read`.
      frames: file names in a folder of frames.
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
    """The clips of a folder.

    Attributes:
      sources: the clips, sorted by file, member and index.
      failures: one sentence for each file that cannot be used.
      notes: one sentence for each kind of file that is not read.
    """

    sources: tuple[Source, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames uint8 [t, h, w, 3] of a clip.

    Attributes:
      video_thwc: the frames that are used.
      longer: whether the clip has more frames after them.
      size: (height, width) as displayed, before `shrink`.
      fps: of the file, before the stride; None where it is not stored.
      notes: those of `video_io.Video`.
    """

    video_thwc: np.ndarray
    longer: bool
    size: tuple[int, int]
    fps: float | None = None
    notes: tuple[str, ...] = ()


def find(folder: pathlib.Path, colour: str | None = None) -> Found:
    """Lists the clips of a folder and its subfolders.

    Pictures beside clips are not frames and are not read. `colour` is for videos without
    a colour tag: see `video_io.read`.

    Raises:
      FileNotFoundError: there is no such folder, or it is empty.
      ValueError: it is the folder of frames of one clip, or holds no clips.
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
    """Yields the indices of randomly drawn clips, replacing those that cannot be used.

    Each round of draws is in ascending order, so that a file of arrays is read once.

    Args:
      count: number of clips in the folder.
      num_clips: number of usable clips wanted; None: all.
      usable: returns how many of the yielded clips could be used.
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
    """Lists the clips in a file of arrays, reading its headers only."""
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
        raise UnusableClip(f"{name}: the array cannot be read: {error}") from None
    result = []
    for member, (shape, dtype) in shapes.items():
        label = name if member is None else f"{name}/{member}"
        if len(shape) not in (4, 5) or shape[-1] != 3:
            raise UnusableClip(
                f"{label}: the array has shape {list(shape)}, a clip has [t, h, w, 3]"
            )
        if dtype != np.uint8:
            raise UnusableClip(
                f"{label}: the array is {dtype}, only uint8 is accepted since its range is "
                "known"
            )
        if len(shape) == 4:
            result.append(Source(label, path, path.suffix.lower(), member))
        for index in range(shape[0] if len(shape) == 5 else 0):
            clip = f"{label}[{index}]"
            result.append(Source(clip, path, path.suffix.lower(), member, index))
    if not result:
        raise UnusableClip(f"{name}: the file holds no clips")
    return result


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and type of an array in .npy format without reading its values."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def count_notes(notes: collections.Counter, count: int) -> list[str]:
    """Returns sentences that say to how many of the clips each note applies."""
    return [f"{n} of {count} clips: {what}" for what, n in sorted(notes.items())]


class Reader:
    """Reads frames of clips; keeps the last file of arrays open.

    Args:
      num_frames: frames of a clip that are used.
      stride: every stride-th frame is used.
      start: "first", or "random" for a window whose position follows from the clip's
        name; videos are then decoded completely.
      least: frames that a clip must have; None: num_frames.
      shrink: resizes a frame uint8 [h, w, 3] as it is read, so that clips other than
        compressed arrays are never in memory at full size; None: no resizing.
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
          UnusableClip: the clip cannot be read or is too short; in one sentence.
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
        """Cuts the window out of a clip; `shrink` is for the frames of an array."""
        self._check_length(source, len(video_thwc))
        used_thwc = video_thwc[self._window(source, len(video_thwc))]
        if shrink:
            used_thwc = np.stack([shrink(frame_hwc) for frame_hwc in used_thwc])
        longer = len(video_thwc) > self._span
        return Clip(np.ascontiguousarray(used_thwc), longer, size, fps)

    def _window(self, source: Source, length: int) -> slice:
        """Returns the frames that are used."""
        first = 0
        if self._random:
            rng = np.random.default_rng(zlib.crc32(source.name.encode()))
            first = int(rng.integers(0, length - self._span + 1))
        return slice(first, first + self._span, self._stride)

    def _check_length(self, source: Source, length: int) -> None:
        if length < self._least:
            stride = f" at a stride of {self._stride}" * (self._stride > 1)
            raise UnusableClip(
                f"{source.name}: {length} frames, but {self._least} are needed{stride}"
            )

    def _array(self, source: Source) -> np.ndarray:
        key = source.path, source.member
        if self._opened[0] != key:
            self._opened = (None, None)  # free the last file before the next is read
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
