"""A folder of videos with captions beside them as a source of clips.

Captions of `a/clip.mp4` are looked for in `a/clip.txt` (the text), in `a/clip.json`
(an object with `caption`, with the `prompt` of a recipe, or with tiers: alt, short,
medium, dense, structured, and perhaps `licence` and `source`), and in `captions.jsonl` or `captions.csv` at the top of
the folder (the same fields, and `file`). What stands beside the clip wins.

A video is cut into windows that follow one another without a gap, each of `num_frames`
frames at `fps`; what is left over at the end is dropped.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.data import records, shards, video_io, workers

MAX_CAPTION = 4000  # characters
_MAX_CAPTION_FILE = 1 << 30  # bytes
_FILE_FIELDS = ("file", "file_name", "video", "path")
# A caption of no tier is the text the clip came with; a recipe's is its prompt.
_TEXT_FIELDS = ("caption", "text", "prompt")
# Suffixes of files that are one clip, or may be: they are no part of a clip's name.
_OF_CLIPS = (*video_io.SUFFIXES, ".npy")
_CRF = 14
# A longer video is cut into slices of about so many bytes, so that workers can share it.
_SLICE_BYTES = 64 << 20
_ITEMS_PER_PART = 16


@dataclasses.dataclass(frozen=True)
class Text:
    """What is said about one video."""

    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str = ""
    source: str = ""

    def over(self, other: "Text") -> "Text":
        """Returns both, with this one's word where they differ."""
        return Text(
            {**other.captions, **self.captions},
            {**other.sources, **self.sources},
            self.licence or other.licence,
            self.source or other.source,
        )


# -- captions -------------------------------------------------------------------------


def _clean(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{field} is {type(text).__name__}, not text")
    printable = "".join(c if c.isprintable() else " " for c in text)
    cleaned = " ".join(printable.split())
    if len(cleaned) > MAX_CAPTION:
        raise ValueError(
            f"{field} has {len(cleaned)} characters; {MAX_CAPTION} are the limit"
        )
    return cleaned


def _text_of(fields: Any) -> Text:
    """Reads an object's captions; raises ValueError where it has none."""
    if not isinstance(fields, dict):
        raise ValueError("it is not an object with fields")
    nested = fields.get("captions") or {}
    if not isinstance(nested, dict):
        raise ValueError("captions is not an object of tiers")
    if unknown := sorted(set(nested) - set(records.TIERS)):
        raise ValueError(f"captions has the tiers {unknown}, not of {records.TIERS}")
    found = {}
    if plain := [fields[name] for name in _TEXT_FIELDS if fields.get(name)]:
        found["alt"] = plain[0]
    found |= {tier: fields[tier] for tier in records.TIERS if fields.get(tier)}
    found |= {tier: text for tier, text in nested.items() if text}
    cleaned = {tier: _clean(text, tier) for tier, text in found.items()}
    cleaned = {tier: text for tier, text in cleaned.items() if text}
    if not cleaned:
        raise ValueError(
            f"it has no caption, under none of {(*_TEXT_FIELDS, *records.TIERS)}"
        )
    origin = _clean(fields.get("caption_source") or "original", "caption_source")
    return Text(
        cleaned,
        dict.fromkeys(cleaned, origin),
        _clean(fields.get("licence") or fields.get("license") or "", "licence"),
        _clean(fields.get("source") or "", "source"),
    )


def _read_text(path: pathlib.Path) -> str:
    if path.stat().st_size > _MAX_CAPTION_FILE:
        raise ValueError(f"it is larger than {_MAX_CAPTION_FILE} bytes")
    return path.read_bytes().decode("utf-8-sig")  # line ends as they are


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, fields) of a table; a line that does not parse gives its error."""
    content = _read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        while True:
            try:
                row = next(reader)
                yield reader.line_num, row
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, ValueError(str(error))
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"it is not JSON: {error}")


def _named_file(fields: Mapping[str, Any], videos: set[str]) -> str:
    """Returns which video a row speaks of; raises ValueError where it is none of ours."""
    names = [fields[key] for key in _FILE_FIELDS if fields.get(key)]
    if not names or not isinstance(names[0], str):
        raise ValueError(f"it names no file, under none of {_FILE_FIELDS}")
    name = names[0]
    path = pathlib.PurePosixPath(os.path.normpath(name.replace("\\", "/")))
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the folder")
    if path.as_posix() not in videos:
        raise ValueError(f"{name!r} is no video of the folder")
    return path.as_posix()


def read_captions(
    folder: pathlib.Path, videos: set[str], files: set[str]
) -> tuple[dict[str, Text], list[shards.Skipped]]:
    """Returns what is said about each video, and what could not be read.

    Args:
      folder: where they lie.
      videos: their names, from the folder on. Beside `x.mp4` lies `x.txt`, and beside
        what ends in no suffix of one clip's file, as the folder `run.v1`, `run.v1.txt`.
      files: names of the other files that may be read.
    """
    found: dict[str, Text] = {}
    skipped = []
    for table in ("captions.csv", "captions.jsonl"):
        if table not in files:
            continue
        try:
            for line, fields in _rows(folder / table):
                try:
                    if isinstance(fields, ValueError):
                        raise fields
                    if not isinstance(fields, dict):
                        raise ValueError("it is not an object with fields")
                    video = _named_file(fields, videos)
                    found[video] = _text_of(fields).over(found.get(video, Text()))
                except ValueError as error:
                    skipped.append(shards.Skipped(f"{table}:{line}", str(error)))
        except (OSError, ValueError) as error:
            skipped.append(shards.Skipped(table, str(error)))
    for video in sorted(videos):
        stem, suffix = os.path.splitext(video)
        if suffix.lower() not in _OF_CLIPS:
            stem = video
        for beside in (f"{stem}.txt", f"{stem}.json"):
            if beside not in files:
                continue
            try:
                content = _read_text(folder / beside)
                if beside.endswith(".txt"):
                    said = _text_of({"caption": content})
                else:
                    said = _text_of(json.loads(content))
                found[video] = said.over(found.get(video, Text()))
            except (OSError, ValueError, RecursionError) as error:
                skipped.append(shards.Skipped(beside, str(error)))
    return found, skipped


# -- the source -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder holds: videos with their sizes, their captions, and the rest."""

    videos: Mapping[str, int]
    texts: Mapping[str, Text]
    skipped: tuple[shards.Skipped, ...]

    def digest(self) -> str:
        """Hashes names, sizes and captions: what the clips depend on."""
        said = {video: dataclasses.astuple(text) for video, text in self.texts.items()}
        content = json.dumps([dict(self.videos), said], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def scan(folder: pathlib.Path) -> Listing:
    """Lists a folder; links that lead out of it and hidden files are not followed."""
    root = folder.resolve()
    videos: dict[str, int] = {}
    files, skipped = set(), []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if any(part.startswith(".") for part in relative.parts) or path.is_dir():
            continue
        printable = name.encode("utf-8", "backslashreplace").decode()
        if printable != name:
            skipped.append(shards.Skipped(printable, "its name is not UTF-8"))
        elif not path.resolve().is_relative_to(root):
            skipped.append(shards.Skipped(name, "it is a link out of the folder"))
        elif not path.is_file():
            skipped.append(shards.Skipped(name, "it is not a regular file"))
        elif path.suffix.lower() in video_io.SUFFIXES:
            videos[name] = path.stat().st_size
        else:
            files.add(name)
    texts, bad_captions = read_captions(folder, set(videos), files)
    stems = {video.rsplit(".", 1)[0] for video in videos}
    for name in sorted(files - {"captions.csv", "captions.jsonl"}):
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("txt", "json"):
            kinds = ", ".join(video_io.SUFFIXES)
            skipped.append(shards.Skipped(name, f"it is no video of a kind in {kinds}"))
        elif stem not in stems:
            skipped.append(shards.Skipped(name, "there is no video of this name"))
    return Listing(videos, texts, (*skipped, *bad_captions))


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
    def listing(self) -> Listing:
        """What the folder holds; travels to the worker processes."""
        return scan(self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the clips."""
        return {
            "source": "folder",
            "size": list(self.size),
            "num_frames": self.num_frames,
            "fps": self.fps,
            "encoding": "lossless" if self.lossless else f"crf {_CRF}",
            "limits": dataclasses.asdict(self.limits),
            "videos": len(self.listing.videos),
            "listing": self.listing.digest(),
        }

    def plan(self) -> tuple[list[Any], list[shards.Skipped]]:
        """Returns groups of (video, slice, number of slices), and what is no video."""
        items = []
        for video, size in self.listing.videos.items():
            slices = max(1, math.ceil(size / _SLICE_BYTES))
            items += [[video, number, slices] for number in range(slices)]
        per_part = max(1, min(_ITEMS_PER_PART, len(items) // 8))
        parts = [list(part) for part in itertools.batched(items, per_part)]
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
                text = texts.get(video, Text())
                try:
                    yield from self._windows(video, number, slices, text)
                except video_io.UnreadableVideo as error:
                    reason = str(error).removeprefix(f"{self.folder / video}: ")
                    yield shards.Skipped(item, reason)
            note(finished=1)

    def _windows(
        self, video: str, number: int, slices: int, text: Text
    ) -> Iterator[records.ClipRecord | shards.Skipped]:
        path = self.folder / video
        header = video_io.probe(path, self.limits)
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
        self, video: str, window: int, frames_thwc: np.ndarray, text: Text
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
            shots=((0, self.num_frames),),
            licence=text.licence,
            source=text.source or f"{video} from {start:.3f} s",
        )
