"""Lists of videos with captions, time ranges and scores, as data sets are published.

A row of a .csv, .jsonl or .parquet file names a video and its captions:
    path, text, aes, flow, ...                  Open-Sora
    video, caption, `aesthetic score`, ...      OpenVid-1M
    videoID, url, timestamp, caption, clarity_score, ...    Koala-36M
    videoID, url, timestamp, caption, matching_score        Panda-70M
    file_name, text                             Hugging Face
In the last but one, `timestamp` is a list of [start, end], and `caption` and the scores
are lists of as many. `start` and `end`, in columns of their own, are a time range as well.
A time is a number of seconds or H:MM:SS.mmm.

A video is named by its path in the folder of videos, or by its file's name alone, with or
without the suffix; of a URL, by the video's id or the file's name.
"""

import ast
import collections
import json
import math
import pathlib
import posixpath
import re
import urllib.parse
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sora_jax.data import folders, records, shards, tables, texts, video_io

SUFFIXES = (".csv", ".jsonl", tables.SUFFIX)
_IDS = ("videoID", "video_id", "url")
_RANGES = ("timestamp", "timestamps")
_STARTS, _ENDS = ("start", "start_time"), ("end", "end_time")
_CAPTIONS = (*folders.TEXT_FIELDS, *records.TIERS, "captions")
# Columns that have no use, and need no mention: videos are measured when they are read.
_MEASURED = ("num_frames", "frame", "fps", "height", "width", "aspect_ratio")
_MEASURED += ("resolution", "seconds", "duration")
_OTHERS = (
    "caption_source",
    "caption_sources",
    "licence",
    "license",
    "source",
    "scores",
    "subject",
    "edit_of",
)
_KNOWN = {*folders.FILE_FIELDS, *_IDS, *_RANGES, *_STARTS, *_ENDS, *_CAPTIONS}
_KNOWN |= {*_MEASURED, *_OTHERS}
_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")


class _Videos:
    """The video files of a folder, found by the names that lists give them."""

    def __init__(self, folder: pathlib.Path, names: Collection[str]):
        self._folder, self._names = folder, set(names)
        self._loose = collections.defaultdict(list)
        for name in names:
            base = posixpath.basename(name)
            stem = posixpath.splitext(base)[0]
            for loose in {base, stem}:
                self._loose[loose].append(name)

    def find(self, fields: Mapping[str, Any]) -> str:
        """Returns the file that a row names.

        Raises:
          ValueError: there is none, or there are several.
        """
        texts.check_named(fields, (*folders.FILE_FIELDS, *_IDS), "names no video")
        given = [
            (field, fields[field])
            for field in (*folders.FILE_FIELDS, *_IDS)
            if fields.get(field)
        ]
        if not given:
            raise ValueError("it names no video: the field is empty")
        for field, value in given:
            if not isinstance(value, str):
                raise ValueError(f"{field} is {type(value).__name__}, not a name")
            value = _id_of(value) if field == "url" else self._relative(value)
            if value in self._names:
                return value
            several = self._loose.get(value, [])
            if len(several) > 1:
                raise ValueError(
                    f"{value!r} may be any of {', '.join(several[:3])}: name it with its "
                    "folder"
                )
            if several:
                return several[0]
        raise ValueError(f"there is no video {given[0][1]!r} in {self._folder}")

    def _relative(self, name: str) -> str:
        """A path as a name in the folder."""
        path = pathlib.PurePosixPath(name.replace("\\", "/"))
        root = self._folder.absolute().as_posix()
        inner = path.relative_to(root) if path.is_relative_to(root) else path
        if "\0" in name or inner.is_absolute() or ".." in inner.parts:
            raise ValueError(
                f"{name!r} leads out of {self._folder}: write names relative to the "
                "folder of the videos, see --videos"
            )
        return inner.as_posix()


def _id_of(url: str) -> str:
    """The id of a video on a site, or the name of the file that a URL leads to."""
    parts = urllib.parse.urlsplit(url)
    ids = urllib.parse.parse_qs(parts.query).get("v", [])
    return ids[0] if ids else posixpath.basename(parts.path)


# -- rows -----------------------------------------------------------------------------


def _value(field: Any) -> Any:
    """A field that may be a list written as text, in JSON or as Python prints it.

    Raises:
      ValueError: it begins as a list and is none.
    """
    if not isinstance(field, str) or not field.lstrip().startswith("["):
        return field
    try:
        return json.loads(field)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes in captions
            return ast.literal_eval(field.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{field[:60]!r} is not a list") from None


def _seconds(time: Any) -> float:
    """Reads a time in seconds, or as H:MM:SS.mmm."""
    if isinstance(time, (int, float)) and not isinstance(time, bool):
        seconds = float(time)
    elif isinstance(time, str) and (match := _TIME.fullmatch(time.strip())):
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    else:
        raise ValueError(f"{time!r} is not a time: write seconds, or 0:00:05.839")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{time!r} is not a time from the beginning of a video")
    return seconds


def _range(pair: Any) -> tuple[float, float]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(f"{pair!r} is not a time range: write [start, end]")
    start, end = map(_seconds, pair)
    if end <= start:
        raise ValueError(f"its time range of {start:g} to {end:g} s is empty")
    return start, end


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next(
        (fields[name] for name in names if fields.get(name) not in ("", None)), None
    )


def _parts(
    fields: Mapping[str, Any],
) -> Iterator[tuple[tuple[float, float] | None, dict[str, Any]] | ValueError]:
    """Yields (time range or None, fields) of each part of a video that a row names.

    A part whose time range is wrong gives a ValueError in its place.

    Raises:
      ValueError: the lists of a row have different lengths.
    """
    ranges = _value(_first(fields, _RANGES))
    start, end = _first(fields, _STARTS), _first(fields, _ENDS)
    if ranges is None:
        if start is None and end is None:
            yield None, dict(fields)
        else:
            yield _range([start, end]), dict(fields)
        return
    if not isinstance(ranges, (list, tuple)) or not ranges:
        raise ValueError(f"{ranges!r} is not a time range: write [start, end]")
    if not isinstance(ranges[0], (list, tuple)):
        yield _range(ranges), dict(fields)
        return
    lists = {
        name: values
        for name, field in fields.items()
        if name in _CAPTIONS or folders.is_score(name)
        if isinstance(values := _value(field), (list, tuple))
    }
    for name, values in lists.items():
        if len(values) != len(ranges):
            raise ValueError(
                f"it has {len(ranges)} time ranges and {len(values)} of {name}"
            )
    for index, pair in enumerate(ranges):
        try:
            own = {name: values[index] for name, values in lists.items()}
            yield _range(pair), {**fields, **own}
        except ValueError as error:
            yield error


def _rows(
    path: pathlib.Path, name: str, encoding: str | None, skipped: list[shards.Skipped]
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    def check_header(header: Sequence[str]) -> None:
        texts.check_named(header, (*folders.FILE_FIELDS, *_IDS), "names no video")
        texts.check_named(header, _CAPTIONS, "has no caption")
        if unread := [n for n in header if n not in _KNOWN and not folders.is_score(n)]:
            reason = f"its columns {', '.join(unread)} are not read"
            skipped.append(shards.Skipped(name, reason))

    if path.suffix == tables.SUFFIX:
        yield from tables.rows(path, check_header)
    else:
        yield from texts.rows(path, check_header, encoding)


def scan(
    folder: pathlib.Path,
    lists: Mapping[str, pathlib.Path],
    *,
    follow_links: bool = False,
    encoding: str | None = None,
) -> folders.Listing:
    """Lists the videos that lists name, with their captions.

    A video is named by its file, `a.mp4`; a part of it by its time range as well,
    `a.mp4@5.839-12.345`; one in a Parquet file by its row, `train.parquet:17`. Several
    rows of the same video or time range add their captions.

    Args:
      folder: of the videos.
      lists: files with the suffixes of `SUFFIXES`, by name.
      follow_links: see `folders.walk`.
      encoding: of lists that are not UTF-8; see `texts.read_text`.
    """
    names, skipped = folders.walk(folder, follow_links=follow_links)
    films = [n for n in names if pathlib.Path(n).suffix.lower() in video_io.SUFFIXES]
    there = _Videos(folder, films)
    # A list may name what is not followed or not readable; other files are no matter.
    skipped = [s for s in skipped if s.file.lower().endswith(video_io.SUFFIXES)]
    found = collections.defaultdict(folders.Rows)
    places, spans, sizes = {}, {}, {}
    counts = {"videos": 0, "others": 0}

    def skip(where: str, error: Exception) -> None:
        reason = error.reason if isinstance(error, texts.BadLine) else str(error)
        skipped.append(shards.Skipped(where, reason))
        counts["others"] += 1

    def add(where: str, row: str, fields, span) -> None:
        """Adds a video, or a part of one."""
        cells = [value for value in fields.values() if isinstance(value, tables.Cell)]
        if cells:
            video, place, size = row, cells[0], cells[0].size
        else:
            video = there.find(fields)
            place = folder / video
            size = place.stat().st_size
        if span:
            video = f"{video}@{span[0]:.3f}-{span[1]:.3f}"
        text = folders.text_of(fields, needs_caption=False)
        if not text.captions:
            reason = "it has no caption, and its clips have none"
            skipped.append(shards.Skipped(where, reason))
        found[video].add(text)
        places[video], sizes[video] = place, size
        if span:
            spans[video] = span
        counts["videos"] += 1

    for name, path in lists.items():
        try:
            for line, fields in _rows(path, name, encoding, skipped):
                where = f"{name}:{line}"
                try:
                    if isinstance(fields, ValueError):
                        raise fields
                    parts = list(_parts(fields))
                except ValueError as error:
                    skip(where, error)
                    continue
                for number, part in enumerate(parts, 1):
                    whose = f"{where} ({number} of {len(parts)})"
                    whose = whose if len(parts) > 1 else where
                    try:
                        if isinstance(part, ValueError):
                            raise part
                        add(whose, where, part[1], part[0])
                    except (OSError, ValueError) as error:
                        skip(whose, error)
        except (OSError, ValueError) as error:
            skip(name, error)
    return folders.Listing(
        dict(sorted(sizes.items())),
        {},
        None,
        {video: rows.text() for video, rows in found.items()},
        tuple(skipped),
        counts,
        counted="rows",
        places=places,
        spans=spans,
    )
