"""Lists the videos of a folder, their captions, and the files that are neither.

Captions of `a/clip.webm` are looked for in `a/clip.txt` or `a/clip.webm.txt` (the text),
in `a/clip.json` or `a/clip.webm.json` (an object with `caption`, with the `prompt` of a recipe, or with tiers:
alt, short, medium, dense, structured, and perhaps `licence` and `source`), and in lists:
    captions.jsonl, captions.csv     the same fields, and `file`
    metadata.jsonl, metadata.csv     as Hugging Face's data sets: `file_name`, `text`
    prompts.txt and videos.txt       line k of one belongs to line k of the other
A list names files relative to its own folder. A clip that is a folder of numbered
pictures, `a/clip/00001.jpg` and so on, is named `a/clip` and has its captions in
`a/clip.txt`. Several captions of a video, in rows or in a JSON array, are all kept. Where
captions conflict, the file next to the clip wins, then the list deeper in the folder,
then the list named first above.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pathlib
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from sora_jax.data import (
    frame_folders,
    records,
    remote,
    shards,
    tables,
    texts,
    video_io,
)

FILE_FIELDS = ("file", "file_name", "video", "path")
# A caption without a tier is the clip's original text; that of a recipe is its prompt.
TEXT_FIELDS = ("caption", "text", "prompt")
# Fields that are scores, besides those with `score` in their names.
_SCORES = ("aes", "flow", "match", "ocr")
# Fields that say where a video came from, the first that is there.
_ORIGINS = ("source", "url", "source_video")
# The names of lists; where two have captions of a video, the later one wins.
_PAIRED, _PROMPTS = "videos.txt", ("prompts.txt", "prompt.txt")
_LISTS = (
    _PAIRED,
    "metadata.csv",
    "metadata.jsonl",
    "captions.csv",
    "captions.jsonl",
)
_UNREAD = "its {} picture{} may be a clip's frames: --frames_fps says how many a second"
# Bytes of a file that holds the captions of one video.
CAPTION_BYTES = 1 << 20
_HIDDEN = "it is hidden: its name begins with a dot"
# Suffixes of files that may be a clip; they do not belong to the clip's name.
_OF_CLIPS = (*video_io.SUFFIXES, ".npy")


@dataclasses.dataclass(frozen=True)
class Text:
    """The texts of one video, and its scores; fields as in `records.ClipRecord`.

    But `edit_of` names a video of the folder, not a clip.
    """

    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str = ""
    source: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    subject: str = ""
    edit_of: str = ""

    def over(self, other: "Text") -> "Text":
        """Returns both merged; this one's values win."""
        return Text(
            {**other.captions, **self.captions},
            {**other.sources, **self.sources},
            self.licence or other.licence,
            self.source or other.source,
            {**other.scores, **self.scores},
            self.subject or other.subject,
            self.edit_of or other.edit_of,
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """What an archive says of a video that was a clip of ours, as `records.ClipRecord`."""

    sha256: str
    fps: float
    num_frames: int
    height: int
    width: int
    period: int
    state_json: str | None


class Rows:
    """The texts of one video from the rows of a list: each caption once, in order."""

    def __init__(self):
        self._captions = collections.defaultdict(dict)
        self._sources = collections.defaultdict(dict)
        self._licence = self._source = ""
        self._scores: dict[str, float] = {}
        self._subject = self._edit_of = ""

    def add(self, row: Text) -> None:
        for tier, several in row.captions.items():
            self._captions[tier] |= dict.fromkeys(records.variants(several))
            self._sources[tier][row.sources[tier]] = None
        self._licence = self._licence or row.licence
        self._source = self._source or row.source
        self._scores = {**row.scores, **self._scores}
        self._subject = self._subject or row.subject
        self._edit_of = self._edit_of or row.edit_of

    def text(self) -> Text:
        return Text(
            {tier: records.join([*of]) for tier, of in self._captions.items()},
            {tier: ", ".join(of) for tier, of in self._sources.items()},
            self._licence,
            self._source,
            self._scores,
            self._subject,
            self._edit_of,
        )


# -- captions -------------------------------------------------------------------------


def _clean(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{field} is {type(text).__name__}, not text")
    cleaned = texts.normalise(text)
    if len(cleaned) > texts.MAX_CHARACTERS:
        raise ValueError(
            f"{field} has {len(cleaned)} characters; the limit is "
            f"{texts.MAX_CHARACTERS}"
        )
    return cleaned


def _name(value: Any) -> str:
    """A name in words or as a number; anything else is none."""
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return texts.normalise(str(value)) if is_name else ""


def _captions(value: Any, tier: str) -> str:
    """One caption, or a list of captions, of a tier."""
    several = value if isinstance(value, list) else [value]
    return records.join([_clean(text, tier) for text in several])


def _scores_of(fields: Mapping[str, Any]) -> dict[str, float]:
    """The scores among an object's fields, and in its field `scores`."""
    scores: dict[str, float] = {}
    nested = fields.get("scores")
    for name, value in {
        **{name: value for name, value in fields.items() if is_score(name)},
        **(nested if isinstance(nested, dict) else {}),
    }.items():
        # Several numbers of one score are an object, as in cosmos-curate.
        inner = value if isinstance(value, dict) else {"": value}
        for part, number in inner.items():
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = float(number)
                if math.isfinite(number):
                    scores[texts.normalise(f"{name}_{part}" if part else name)] = number
    return scores


def is_score(field: str) -> bool:
    """Whether a field of this name is a score."""
    return field in _SCORES or ("score" in field.lower() and field != "scores")


def text_of(fields: Any, *, needs_caption: bool = True) -> Text:
    """Reads an object's captions, licence, source, scores, subject and edit_of.

    Raises:
      ValueError: one of them is no text, or it has no caption and needs one.
    """
    if not isinstance(fields, dict):
        raise ValueError("it is not an object with fields")
    nested = fields.get("captions") or {}
    if not isinstance(nested, dict):
        raise ValueError("captions is not an object of tiers")
    if unknown := sorted(set(nested) - set(records.TIERS)):
        raise ValueError(f"captions has unknown tiers {unknown}; see {records.TIERS}")
    by_tier = {}
    if plain := [fields[name] for name in TEXT_FIELDS if fields.get(name)]:
        by_tier["alt"] = plain[0]
    by_tier |= {tier: fields[tier] for tier in records.TIERS if fields.get(tier)}
    by_tier |= {tier: text for tier, text in nested.items() if text}
    cleaned = {tier: _captions(text, tier) for tier, text in by_tier.items()}
    cleaned = {tier: text for tier, text in cleaned.items() if text}
    if not cleaned and needs_caption:
        texts.check_named(fields, (*TEXT_FIELDS, *records.TIERS), "has no caption")
        raise ValueError("it has no caption: the field is empty")
    writer = _clean(fields.get("caption_source") or "original", "caption_source")
    writers = fields.get("caption_sources") or {}
    if not isinstance(writers, dict):
        raise ValueError("caption_sources is not an object of tiers")
    origins = [fields[name] for name in _ORIGINS if fields.get(name)]
    return Text(
        cleaned,
        {t: _clean(writers.get(t) or writer, "caption_sources") for t in cleaned},
        _clean(fields.get("licence") or fields.get("license") or "", "licence"),
        _clean(origins[0] if origins else "", "source"),
        _scores_of(fields),
        _name(fields.get("subject")),
        posixpath.normpath(name) if (name := _name(fields.get("edit_of"))) else "",
    )


def _check_header(header: Collection[str]) -> None:
    texts.check_named(header, FILE_FIELDS, "names no file")
    texts.check_named(header, (*TEXT_FIELDS, *records.TIERS), "has no caption")


def _named_file(fields: Mapping[str, Any], place: str, videos: set[str]) -> str:
    """Returns the video that a row names, of a list in the folder `place`.

    Raises:
      ValueError: it names no video of the folder.
    """
    texts.check_named(fields, FILE_FIELDS, "names no file")
    name = next((fields[key] for key in FILE_FIELDS if fields.get(key)), "")
    if not name or not isinstance(name, str):
        raise ValueError(f"it names no file: {name!r}")
    path = pathlib.PurePosixPath(os.path.normpath(name.replace("\\", "/")))
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the folder")
    video = posixpath.join(place, path.as_posix())
    if video not in videos:
        raise ValueError(f"{name!r} is not a video of the folder")
    return video


def _find_lists(files: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields (list, its file of prompts or ""); later lists win."""
    there = [file for file in files if posixpath.basename(file) in _LISTS]

    def rank(file: str) -> tuple[int, int, str]:
        return file.count("/"), _LISTS.index(posixpath.basename(file)), file

    for file in sorted(there, key=rank):
        if posixpath.basename(file) != _PAIRED:
            yield file, ""
            continue
        paths = [posixpath.join(posixpath.dirname(file), name) for name in _PROMPTS]
        if prompts := [path for path in paths if path in files]:
            yield file, prompts[0]


def _rows(
    folder: pathlib.Path, file: str, prompts: str, encoding: str | None
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yields (a row's place, its fields or why it cannot be read) of a list."""
    if not prompts:
        for line, fields in texts.rows(folder / file, _check_header, encoding):
            yield f"{file}:{line}", fields
        return
    lines = {}
    for name in (file, prompts):
        try:
            lines[name] = texts.lines(folder / name, encoding)
        except texts.BadLine as error:
            yield f"{name}:{error.line}", error
            return
    if len(lines[file]) != len(lines[prompts]):
        reason = (
            f"it has {len(lines[file])} lines and {prompts} {len(lines[prompts])}; "
            "line k of one belongs to line k of the other, so neither is used"
        )
        yield file, ValueError(reason)
        return
    for line, (name, text) in enumerate(zip(*lines.values(), strict=True), 1):
        yield f"{prompts}:{line}", {"file": name.strip(), "caption": text}


def read_captions(
    folder: pathlib.Path,
    videos: set[str],
    files: set[str],
    encoding: str | None = None,
) -> tuple[dict[str, Text], list[shards.Skipped]]:
    """Returns the texts of each video, and what could not be read.

    Args:
      folder: of the videos.
      videos: names relative to the folder. The captions of `x.mp4` are in `x.txt`; a
        name without the suffix of a clip's file, such as the folder `run.v1`, is kept
        whole: `run.v1.txt`.
      files: names of the other files that may be read.
      encoding: of files that are not UTF-8; see `texts.read_text`.
    """
    result: dict[str, Text] = {}
    skipped = []

    def skip(where: str, error: Exception) -> None:
        reason = error.reason if isinstance(error, texts.BadLine) else str(error)
        skipped.append(shards.Skipped(where, reason))

    for file, prompts in _find_lists(files):
        by_video = collections.defaultdict(Rows)
        try:
            for where, fields in _rows(folder, file, prompts, encoding):
                try:
                    if isinstance(fields, ValueError):
                        raise fields
                    video = _named_file(fields, posixpath.dirname(file), videos)
                    text = text_of(fields)
                    by_video[video].add(text)
                except ValueError as error:
                    skip(where, error)
        except (OSError, ValueError) as error:
            skip(file, error)
        for video, rows in by_video.items():
            result[video] = rows.text().over(result.get(video, Text()))
    for video in sorted(videos):
        stem = _stem(video)
        names = (f"{name}.{kind}" for name in (stem, video) for kind in ("txt", "json"))
        for file in dict.fromkeys(names):
            if file not in files:
                continue
            try:
                content = texts.read_text(folder / file, encoding, CAPTION_BYTES)
                if file.endswith(".txt"):
                    text = text_of({"caption": content})
                else:
                    text = text_of(json.loads(content))
                result[video] = text.over(result.get(video, Text()))
            except texts.BadLine as error:
                skip(f"{file}:{error.line}", error)
            except (OSError, ValueError, RecursionError) as error:
                skip(file, error)
    return result, skipped


def _stem(video: str) -> str:
    """The name that a video shares with its caption files."""
    stem, suffix = os.path.splitext(video)
    return stem if suffix.lower() in _OF_CLIPS else video


# -- files ----------------------------------------------------------------------------


def walk(
    folder: pathlib.Path, *, follow_links: bool = False
) -> tuple[list[str], list[shards.Skipped]]:
    """Lists the files of a folder at any depth, by names relative to it.

    Hidden files and folders are ignored, but a hidden file that is named like a video is
    among what was skipped. A link to a file in the folder counts as that
    file; other links are followed only with `follow_links`, and a folder that is reached
    twice, for instance by a loop of links, is listed once.

    Returns:
      The sorted names, and what was skipped.
    """
    root = os.path.realpath(folder)
    entered, waiting = {root}, [("", root)]  # names of folders, and their real paths
    files: list[str] = []
    skipped: list[shards.Skipped] = []
    while waiting:
        place, real_place = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / place), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"it cannot be listed: {error.strerror}"
            skipped.append(shards.Skipped(place or ".", reason))
            continue
        for entry in entries:
            name, real = posixpath.join(place, entry.name), f"{real_place}/{entry.name}"
            printable = os.fsencode(name).decode("utf-8", "backslashreplace")
            if entry.name.startswith("."):
                if _is_film(name):
                    skipped.append(shards.Skipped(printable, _HIDDEN))
                continue
            try:
                if printable != name:
                    raise ValueError("its name is not UTF-8, so it is not read")
                if entry.is_symlink():
                    real = _followed(entry, root, follow_links)
                if entry.is_dir():
                    if real in entered:
                        raise ValueError("it is a folder that is already listed")
                    entered.add(real)
                    waiting.append((name, real))
                elif entry.is_file():
                    files.append(name)
                else:
                    raise ValueError("it is not a regular file")
            except OSError as error:
                skipped.append(shards.Skipped(printable, _no_access(error)))
            except ValueError as error:
                skipped.append(shards.Skipped(printable, str(error)))
    return sorted(files), sorted(skipped, key=lambda one: one.file)


def _is_film(name: str) -> bool:
    return pathlib.PurePath(name).suffix.lower() in video_io.SUFFIXES


def _no_access(error: OSError) -> str:
    return f"it cannot be read: {error.strerror}"


def _followed(entry: os.DirEntry, root: str, follow_links: bool) -> str:
    """Returns a link's target; raises ValueError if it is not followed."""
    try:
        real = os.path.realpath(entry.path, strict=True)
    except OSError as error:
        raise ValueError(f"it is a broken link: {error.strerror}") from None
    if os.path.commonpath([real, root]) != root:
        if not follow_links:
            raise ValueError(
                f"it is a link out of the folder, to {real}; see --follow_links"
            )
    elif entry.is_dir() and "/." not in real[len(root) :]:
        raise ValueError("it is a link to a folder that is listed under its own name")
    return real


def matching(pattern: str, suffixes: Collection[str]) -> tuple[pathlib.Path, list[str]]:
    """Finds files by a file's name, a folder, or a pattern of names.

    Args:
      pattern: a file; a folder, at any depth; `DIR/*.tar`, with `**` for any depth; or
        `DIR/{00000..00012}.tar`, of which every file must be there.
      suffixes: of the files.

    Returns:
      A folder, and the sorted names of files relative to it.

    Raises:
      ValueError: there is none, or a file has another suffix.
    """
    path = pathlib.Path(pattern)
    if path.is_dir():
        root, named = path, [name for name in walk(path)[0] if name.endswith(suffixes)]
    elif braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern, re.DOTALL):
        before, first, last, after = braces.groups()
        numbers = range(int(first), int(last) + 1)
        named = [f"{before}{k:0{len(first)}d}{after}" for k in numbers]
        root = pathlib.Path(f"{before}x").parent
    else:
        fixed = itertools.takewhile(lambda p: not set(p) & set("*?["), path.parts[:-1])
        root, named = pathlib.Path(*fixed), glob.glob(pattern, recursive=True)
        named = named or [pattern]
    for name in named:
        file = root / name if path.is_dir() else pathlib.Path(name)
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        if not name.endswith(suffixes):
            raise ValueError(f"{file} is not {' or '.join(suffixes)}")
    if not named:
        raise ValueError(f"there is no file {' or '.join(suffixes)} in {pattern}")
    if not path.is_dir():
        named = [pathlib.Path(name).relative_to(root).as_posix() for name in named]
    return root, sorted(named)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of a folder, of tar archives, or of a list.

    Attributes:
      videos: size in bytes of each file or folder of frames, by name.
      frames: names of the frames in each folder of frames.
      frames_fps: of folders of frames.
      texts: captions by video.
      skipped: all other files, and the faults of files with captions.
      counts: how many files there are of each kind, "videos", "captions", or "others",
        which are in `skipped`. Each file of `walk` counts once, and so does each thing
        that it skips. Members of archives and rows of lists are counted likewise.
      counted: what `counts` counts: "files", "members" or "rows".
      places: where a video is, unless it is the file of its name in the folder.
      spans: the (start, end) in seconds of a video that is a part of a longer one.
      written: of videos that may be clips of ours.
      entries: where the videos are, of a folder at an address.
    """

    videos: Mapping[str, int]
    frames: Mapping[str, tuple[str, ...]]
    frames_fps: float | None
    texts: Mapping[str, Text]
    skipped: tuple[shards.Skipped, ...]
    counts: Mapping[str, int]
    counted: str = "files"
    places: Mapping[str, video_io.Region | tables.Cell | pathlib.Path] = (
        dataclasses.field(default_factory=dict)
    )
    spans: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Written] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, remote.Entry] = dataclasses.field(default_factory=dict)

    def only(self, videos: Collection[str]) -> "Listing":
        """Returns these videos' part of the listing, without other files."""

        def of(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: values[name] for name in videos if name in values}

        return dataclasses.replace(
            self,
            videos=of(self.videos),
            frames=of(self.frames),
            texts=of(self.texts),
            places=of(self.places),
            spans=of(self.spans),
            written=of(self.written),
            entries=of(self.entries),
            skipped=(),
            counts={},
        )

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """A hash of each video's size and captions, on which its clips depend.

        At an address it is also of the version that the file system tells.
        """
        result = {}
        for video, size in self.videos.items():
            *said, scores = dataclasses.astuple(self.texts.get(video, Text()))
            content = [size, said]
            if video in self.frames:
                content += [self.frames_fps, self.frames[video]]
            if scores:
                content.append(scores)
            if video in self.spans:
                content.append(self.spans[video])
            if video in self.written:
                content.append(dataclasses.astuple(self.written[video]))
            if video in self.entries:
                content.append(self.entries[video].version)
            text = json.dumps(content, sort_keys=True)
            result[video] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return result


def scan(
    folder: pathlib.Path | remote.RemoteFolder,
    *,
    follow_links: bool = False,
    frames_fps: float | None = None,
    encoding: str | None = None,
) -> Listing:
    """Lists a folder as `walk` does, and reads its captions.

    Args:
      folder: of the videos.
      follow_links: see `walk`.
      frames_fps: frames a second of folders of numbered pictures; None: such folders are
        skipped.
      encoding: of captions that are not UTF-8; see `texts.read_text`.

    Raises:
      ValueError: see `frame_folders.find`.
      remote.RemoteError: an address cannot be listed, or captions cannot be read.
    """
    entries = {}
    if isinstance(folder, remote.RemoteFolder):
        entries = folder.entries()
        names, skipped = _visible(entries)
    else:
        names, skipped = walk(folder, follow_links=follow_links)
    num_files = len(names) + len(skipped)
    counts = collections.Counter(others=len(skipped))
    videos: dict[str, int] = {}

    def add(video: str, parts: Collection[str], fault: str | None = None) -> None:
        """Adds a video of one or more files, or skips it."""
        try:
            size = sum(
                entries[part].size if entries else (folder / part).stat().st_size
                for part in parts
            )
        except OSError as error:
            fault = _no_access(error)
        if fault:
            skipped.append(shards.Skipped(video, fault))
            counts["others"] += len(parts)
        else:
            videos[video] = size
            counts["videos"] += len(parts)
        files.difference_update(parts)

    films = list(filter(_is_film, names))
    files = set(names).difference(films)
    pictures = frame_folders.find(folder, names, films)
    for name in films:
        add(name, [name])
    for clip, frames in pictures.clips.items():
        reason = _UNREAD.format(len(frames), "s" * (len(frames) != 1))
        parts = [f"{clip}/{frame}" for frame in frames]
        add(clip, parts, None if frames_fps else reason)
    clips = {*films, *pictures.clips}
    stems = clips | set(map(_stem, clips))
    with contextlib.ExitStack() as stack:
        place = folder
        if entries:
            may_be = [name for name in files if _may_be_captions(name, stems)]
            copies = folder.copied(entries, may_be, texts.MAX_BYTES)
            place = stack.enter_context(copies)
        texts_of, bad_captions = read_captions(place, clips, files, encoding)
    before = len(skipped)
    for name in sorted(files.difference(*_find_lists(files))):
        stem, _, suffix = name.rpartition(".")
        if name in pictures.loose:
            skipped.append(shards.Skipped(name, pictures.loose[name]))
        elif suffix not in ("txt", "json"):
            kinds = ", ".join(video_io.SUFFIXES)
            skipped.append(shards.Skipped(name, f"it is not a video ({kinds})"))
        elif stem not in stems:
            skipped.append(shards.Skipped(name, "there is no video of this name"))
    unused = len(skipped) - before
    counts.update(others=unused, captions=len(files) - unused)
    assert counts.total() == num_files, counts
    skipped += bad_captions
    counts = {kind: counts[kind] for kind in ("videos", "captions", "others")}
    return Listing(
        videos,
        pictures.clips,
        frames_fps,
        texts_of,
        tuple(skipped),
        counts,
        entries={name: entry for name, entry in entries.items() if name in videos},
    )


def _visible(files: Iterable[str]) -> tuple[list[str], list[shards.Skipped]]:
    """Leaves out hidden files as `walk` does; returns the others and what was skipped."""
    names, skipped = [], []
    for name in sorted(files):
        *places, last = name.split("/")
        if any(place.startswith(".") for place in places):
            continue
        if not last.startswith("."):
            names.append(name)
        elif _is_film(name):
            skipped.append(shards.Skipped(name, _HIDDEN))
    return names, skipped


def _may_be_captions(file: str, stems: Collection[str]) -> bool:
    stem, _, suffix = file.rpartition(".")
    is_list = posixpath.basename(file) in (*_LISTS, *_PROMPTS)
    return is_list or (suffix in ("txt", "json") and stem in stems)
