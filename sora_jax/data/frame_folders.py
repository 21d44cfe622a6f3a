"""Folders of numbered pictures as clips, such as `clip7/00001.jpg`, `clip7/00002.jpg`.

All listing and reading of such folders is in this module. `pictures` reads each picture:
upright, 8 bits, in sRGB, on black where it is transparent.

Letters: h height, w width, c channel (RGB). Pictures are uint8.
"""

import collections
import dataclasses
import pathlib
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np

from sora_jax.data import containers, frames, pictures, video_io

_LOOSE = "it is a picture {}: the frames of a clip must be in a folder of their own"


@dataclasses.dataclass(frozen=True)
class Found:
    """The pictures of a folder.

    Attributes:
      clips: names of the frames in each folder, by the folder's (the clip's) name.
      loose: pictures that are not frames of a clip, each with the reason.
    """

    clips: Mapping[str, tuple[str, ...]]
    loose: Mapping[str, str]


def find(
    folder: pathlib.Path, names: Collection[str], others: Collection[str]
) -> Found:
    """Finds which pictures are frames of which clip.

    Args:
      folder: the folder.
      names: of all of its files, as `folders.walk` lists them.
      others: names of video files. A picture next to one of them, or in `folder`
        itself, is not a frame.

    Raises:
      ValueError: it holds nothing but pictures: it is the folder of a single clip.
    """
    by_folder = collections.defaultdict(list)
    for name in names:
        path = pathlib.PurePosixPath(name)
        if path.suffix.lower() in pictures.SUFFIXES:
            by_folder[path.parent.as_posix()].append(path.name)
    beside = {pathlib.PurePosixPath(name).parent.as_posix() for name in others}
    if [*by_folder] == ["."] and not others:
        raise ValueError(
            f"{folder} holds the frames of one clip: name the folder that holds the "
            "clips' folders"
        )
    loose = {}
    for place in {".", *beside} & {*by_folder}:
        where = "next to videos" if place in beside else "in the folder itself"
        for name in by_folder.pop(place):
            loose[posixpath.normpath(posixpath.join(place, name))] = _LOOSE.format(
                where
            )
    return Found({place: tuple(names) for place, names in by_folder.items()}, loose)


class FrameFolder:
    """One clip; its frames are read one at a time.

    Args:
      path: the folder.
      files: names of its frames, which end in their numbers.
      limits: of a frame.

    Raises:
      UnreadableVideo: a frame has no number or a repeated one, or numbers are missing.
    """

    def __init__(
        self,
        path: pathlib.Path,
        files: Collection[str],
        limits: video_io.Limits = video_io.DEFAULT_LIMITS,
    ):
        self._path, self._limits = path, limits
        with containers.boundary(path):
            self._files = _in_order(files)
        self._first: tuple[str, tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def picture(self, index: int, notes: set[str] | None = None) -> np.ndarray:
        """Reads a frame as uint8[h, w, 3].

        Args:
          index: of the frame, from 0 on, whatever its number.
          notes: collects what was done to it, as `video_io.Video.notes`.

        Raises:
          UnreadableVideo: it is not a picture, is damaged, is beyond the limits, or
            differs in size from the first frame that was read.
        """
        name = self._files[index]
        try:
            picture_hwc = pictures.read_image(self._path / name, self._limits, notes)
        except video_io.UnreadableVideo as error:
            reason = str(error).removeprefix(f"{self._path}/")
            raise video_io.UnreadableVideo(f"{self._path}: {reason}") from None
        size = picture_hwc.shape[:2]
        self._first = self._first or (name, size)
        if size != self._first[1]:
            raise video_io.UnreadableVideo(
                f"{self._path}: its frames differ in size: {name} is "
                f"{size[1]}x{size[0]}, and {self._first[0]} "
                f"{self._first[1][1]}x{self._first[1][0]}"
            )
        return picture_hwc

    def gather(
        self,
        indices: Iterable[int],
        shrink: Callable[[np.ndarray], np.ndarray] | None,
    ) -> tuple[list[np.ndarray], tuple[int, int], tuple[str, ...]]:
        """Reads frames as `video_io.decode` does: pictures, original size, notes.

        Raises:
          UnreadableVideo: as for `picture`, or they have too many pixels in total.
        """
        notes: set[str] = set()
        whole = (self.picture(index, notes) for index in indices)
        with containers.boundary(self._path):
            read, size = frames.gather(whole, shrink, self._limits.max_total_pixels)
        return read, size, tuple(sorted(notes))

    def probe(self, fps: float) -> video_io.Header:
        """Returns the clip's header, as `video_io.probe` does, at `fps`.

        Raises:
          UnreadableVideo: as for `picture`, or it is too long.
        """
        height, width = self.picture(0).shape[:2]
        count = len(self)
        header = video_io.Header(
            "folder",
            "frames",
            width,
            height,
            fps,
            count / fps,
            (count - 1) / fps,
            shown=(height, width),
        )
        with containers.boundary(self._path):
            containers.check_length(header, count, self._limits)
            size = sum((self._path / name).stat().st_size for name in self._files)
            containers.check_expansion(count * width * height, size, self._limits)
        return header

    def sample(
        self,
        seconds: Iterable[float],
        size: tuple[int, int],
        *,
        header: video_io.Header,
        notes: set[str],
        tell: Callable[[], None],
    ) -> Iterator[np.ndarray]:
        """Yields frames as `video_io.sample` does; frames between the times are not read.

        Raises:
          UnreadableVideo: as for `picture`.
        """
        fit = video_io.fitter(size)

        def seen(frame: _Frame) -> np.ndarray:
            tell()
            return fit(self.picture(frame.index, notes))

        due = (_Frame(index, index / header.fps) for index in range(len(self)))
        yield from video_io.pictures_at(due, seconds, header, seen)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A frame that is not read yet; `starts` as in `video_io.Shown`."""

    index: int
    starts: float


def _in_order(files: Collection[str]) -> list[str]:
    """Sorts frames by the number that their names end in."""
    numbered = {}
    for name in sorted(files):
        digits = re.search(r"(\d+)\D*$", pathlib.PurePath(name).stem)
        if digits is None or int(digits[1]) in numbered:
            fault = "has no number" if digits is None else "repeats a number"
            raise frames.Refused(f"the frame {name} {fault}")
        numbered[int(digits[1])] = name
    first, last = min(numbered), max(numbered)
    if missing := last - first + 1 - len(numbered):
        gap = next(n for n in range(first, last) if n not in numbered)
        raise frames.Refused(
            f"{missing} of the frames {first} to {last} are missing, the first of them "
            f"{gap}"
        )
    return [numbered[number] for number in range(first, last + 1)]
