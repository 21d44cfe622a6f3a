"""A folder of videos with captions beside them as a source of clips.

What lies in the folder, and where captions are looked for, `folders` says.

A video is cut into windows that follow one another without a gap, each of `num_frames`
frames at `fps`; what is left over at the end is dropped.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.data import cuts, folders, records, shards, video_io, workers

_CRF = 14
# A longer video is cut into slices of about so many bytes, so that workers can share it.
_SLICE_BYTES = 64 << 20
_ITEMS_PER_PART = 16


def limits(gib: float, seconds: float, side: int | None) -> video_io.Limits:
    """What a video may ask for: size, length, and pixels a side, their square in all.

    Without `side` that is what `video_io` allows by default.

    Raises:
      ValueError: a limit is not above zero.
    """
    for name, value in (("max_gib", gib), ("max_seconds", seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is above 0, not {value}")
    usual = video_io.DEFAULT_LIMITS
    return dataclasses.replace(
        usual,
        max_bytes=round(gib * 2**30),
        max_seconds=seconds,
        max_frames=round(usual.max_frames * max(1, seconds / usual.max_seconds)),
        max_side=side or usual.max_side,
        max_pixels=side * side if side else usual.max_pixels,
    )


@dataclasses.dataclass(frozen=True)
class FolderClips:
    """Clips of one size out of a folder of videos; see `shards.Source`.

    Args:
      folder: where the videos are, at any depth.
      size: (height, width) of the clips; a video is scaled and its middle cut out.
      num_frames: frames of a clip, 1 + 4n.
      fps: frames a second of the clips; a video's frames are dropped or repeated.
      lossless: keep the scaled frames exactly, at several times the bytes.
      split: name of the split that is written.
      limits: what a video may ask for.
      follow_links: list what links that lead out of the folder point to.

    Raises:
      ValueError: sizes that no clip can have, or no such folder.
    """

    folder: pathlib.Path
    size: tuple[int, int]
    num_frames: int
    fps: float
    lossless: bool = False
    split: str = "train"
    limits: video_io.Limits = video_io.DEFAULT_LIMITS
    follow_links: bool = False
    unit = "videos"

    def __post_init__(self):
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            below = max(1, (self.num_frames - 1) // 4 * 4 + 1)
            raise ValueError(
                f"a clip has 1 + 4n frames, such as {below} or {below + 4}, not "
                f"{self.num_frames}"
            )
        if min(self.size) < 8 or any(side % 2 for side in self.size):
            raise ValueError(
                f"height and width are even and at least 8, not {self.size}"
            )
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps is between 0 and 240, not {self.fps}")

    @functools.cached_property
    def listing(self) -> folders.Listing:
        """What the folder holds; travels to the worker processes."""
        return folders.scan(self.folder, follow_links=self.follow_links)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the clips of a video."""
        return {
            "source": "folder",
            "size": list(self.size),
            "num_frames": self.num_frames,
            "fps": self.fps,
            "encoding": "lossless" if self.lossless else f"crf {_CRF}",
        }

    @property
    def items(self) -> Mapping[str, str]:
        """The videos, each with a hash of its size and captions."""
        return self.listing.digests

    @property
    def admits(self) -> str:
        """The limits."""
        return "/".join(map(str, dataclasses.astuple(self.limits)))

    def plan(self, items: Collection[str]) -> tuple[list[Any], list[shards.Skipped]]:
        """Returns groups of (video, slice, number of slices), and what is no video."""
        pieces = []
        for video in items:
            slices = max(1, math.ceil(self.listing.videos[video] / _SLICE_BYTES))
            pieces += [[video, number, slices] for number in range(slices)]
        per_part = max(1, min(_ITEMS_PER_PART, len(pieces) // 8))
        parts = [list(part) for part in itertools.batched(pieces, per_part)]
        return parts, list(self.listing.skipped)

    def expected(self, part: list) -> int:
        """Returns how many videos, or slices of long ones, a part has."""
        return len(part)

    def clips(
        self, part: list, note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord | shards.Skipped]:
        """Yields the clips of a part and what was left out of it."""
        texts = self.listing.texts
        for video, number, slices in part:
            item = f"{video} ({number + 1} of {slices})" if slices > 1 else video
            if item in avoid:
                yield shards.Skipped(item, avoid[item])
            else:
                note(item=item)
                text, path = texts.get(video, folders.Text()), self.folder / video
                header = None
                try:
                    header = video_io.probe(path, self.limits)
                    yield from self._windows(video, header, number, slices, text)
                except video_io.UnreadableVideo as error:
                    # What is wrong with the whole file, its first slice says.
                    if header or number == 0:
                        reason = str(error).removeprefix(f"{path}: ")
                        yield shards.Skipped(item if header else video, reason)
            note(finished=1)

    def _windows(
        self,
        video: str,
        header: video_io.Header,
        number: int,
        slices: int,
        text: folders.Text,
    ) -> Iterator[records.ClipRecord | shards.Skipped]:
        path = self.folder / video
        total = int(header.seconds * self.fps + 0.01) // self.num_frames
        if total == 0:
            if number == 0:
                needed = self.num_frames / self.fps
                reason = f"it lasts {header.seconds:.2f} s; a clip takes {needed:.2f} s"
                yield shards.Skipped(video, reason)
            return
        first, end = total * number // slices, total * (number + 1) // slices
        if first == end:
            return
        times = np.arange(first * self.num_frames, end * self.num_frames) / self.fps
        frames = video_io.sample(path, times.tolist(), self.size, self.limits)
        for window in range(first, end):
            frames_hwc = list(itertools.islice(frames, self.num_frames))
            if len(frames_hwc) < self.num_frames:
                reason = f"it says {header.seconds:.2f} s but ends earlier"
                at = window * self.num_frames / self.fps
                yield shards.Skipped(f"{video} from {at:.2f} s on", reason)
                return
            yield self._record(video, window, np.stack(frames_hwc), text)

    def _record(
        self, video: str, window: int, frames_thwc: np.ndarray, text: folders.Text
    ) -> records.ClipRecord:
        if self.lossless:
            encoded = video_io.encode_lossless(frames_thwc, self.fps)
        else:
            encoded = video_io.encode_mp4(frames_thwc, self.fps, crf=_CRF)
        start = window * self.num_frames / self.fps
        return records.ClipRecord(
            id=f"{video}#{window:05d}",
            video=encoded,
            fps=self.fps,
            num_frames=self.num_frames,
            height=self.size[0],
            width=self.size[1],
            captions=text.captions,
            caption_sources=text.sources,
            shots=cuts.shots(frames_thwc),
            licence=text.licence,
            source=text.source or f"{video} from {start:.3f} s",
        )
