"""Folders of ArrayRecord files: written part by part, read by index, verified.

A folder is written as numbered parts under `.partial/`. A part is complete or absent, so
an interrupted job continues with the missing parts. When all are written, they get their
final names, `index/00000.jsonl` lists the records of each file, and the manifest is
written last; a folder with a manifest is finished.

ArrayRecord hashes every chunk, so a flipped byte raises inside the reader; this module
returns the reason as a value, and the caller decides.
"""

import bisect
import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from array_record.python import array_record_module

from sora_jax.core import digests, paths
from sora_jax.data import records

FORMAT = 2
# One record a chunk, for random access; TFDS and grain expect it too.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_FILES = 128
_REMOVED = ".removed"


class ShardsError(ValueError):
    """A folder cannot be written or read as requested; the message says why."""


# -- array record files ---------------------------------------------------------------


def _write_file(
    path: pathlib.Path, raw_records: Iterable[bytes], compression: str
) -> tuple[int, str]:
    """Writes a file atomically; returns its size and its SHA-256."""
    options = f"{_WRITER_OPTIONS},{compression}"
    with paths.replacing(path) as temporary:
        with _writer_errors(path):
            writer = array_record_module.ArrayRecordWriter(str(temporary), options)
        for raw in raw_records:
            with _writer_errors(path):
                writer.write(raw)
        with _writer_errors(path):
            writer.close()
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        size, digest = temporary.stat().st_size, paths.sha256_file(temporary)
    return size, digest


@contextlib.contextmanager
def _writer_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns ArrayRecord's RuntimeError for a full disk and the like into OSError."""
    try:
        yield
    except RuntimeError as error:
        raise paths.error_of(str(error), path) from error


class _Files:
    """The records of several files under one index; safe to use from threads."""

    def __init__(self, files: Sequence[pathlib.Path], counts: Sequence[int]):
        self._files, self._counts = list(files), list(counts)
        self._ends = list(itertools.accumulate(counts))
        self._readers = collections.OrderedDict()
        self._lock = threading.Lock()
        for file in files:
            if not file.exists():
                raise ShardsError(f"{file} is missing; prepare the folder again")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (file, position in it) of a record."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file] - self._counts[file])

    def path(self, file: int) -> pathlib.Path:
        return self._files[file]

    def _reader(self, file: int):
        with self._lock:
            reader = self._readers.get(file)
            if reader is None:
                reader = array_record_module.ArrayRecordReader(
                    str(self._files[file]),
                    _READER_OPTIONS,
                    file_reader_buffer_size=32768,
                )
                self._readers[file] = reader
                if len(self._readers) > _OPEN_FILES:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(file)
            return reader

    def read(self, indices: Sequence[int]) -> list[bytes | str]:
        """Returns each record's bytes, or the reason why it cannot be read."""
        by_file = collections.defaultdict(list)
        for place, index in enumerate(indices):
            file, position = self.locate(index)
            by_file[file].append((place, position))
        result: list[bytes | str] = [""] * len(indices)
        for file, wanted in by_file.items():
            places, positions = zip(*wanted, strict=True)
            raw = self._read_positions(file, positions)
            for place, content in zip(places, raw, strict=True):
                result[place] = content
        return result

    def _read_positions(self, file: int, positions: Sequence[int]) -> list[bytes | str]:
        try:
            reader = self._reader(file)
            count = reader.num_records()
            if count != self._counts[file]:
                reason = f"the file has {count} records, not {self._counts[file]}"
                return [reason] * len(positions)
            return reader.read(list(positions))
        except (RuntimeError, IndexError, ValueError) as error:
            if len(positions) == 1:
                return [str(error)]
            # One of them is damaged; read one by one, the others are still available.
            return [self._read_positions(file, [p])[0] for p in positions]

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()


# -- building a folder ----------------------------------------------------------------


def claim(out: pathlib.Path, manifest_name: str, settings: Mapping[str, Any]) -> bool:
    """Claims a folder for these settings; returns whether it is already finished.

    Raises:
      ShardsError: it was made with other settings, or holds other files.
    """
    partial = out / ".partial" / "settings.json"
    for place in (out / manifest_name, partial):
        if place.exists():
            existing = json.loads(digests.read(place))["settings"]
            if differences := _differences(existing, settings):
                raise ShardsError(
                    f"{out} was made with other settings; choose another folder or "
                    "delete this one:\n  " + "\n  ".join(differences)
                )
    if (out / manifest_name).exists():
        return True
    if not partial.exists():
        ours = {"report.json", digests.FILE, partial.parent.name, _REMOVED, paths.LOCK}
        # Curation and recaptioning write these before there are clips.
        ours |= {"decisions.jsonl", "fingerprints.jsonl", "curation.json"}
        ours |= {"captions.jsonl"}
        if out.exists() and {path.name for path in out.iterdir()} - ours:
            raise ShardsError(f"{out} is not empty, and its files are not shards")
        digests.store(partial, json.dumps({"settings": settings}, indent=1))
    return False


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else key
            lines += _differences(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{name}: was {old}, is {new}"]


def plain(value: Any) -> Any:
    """Returns the value after a round trip through JSON."""
    return json.loads(json.dumps(value, sort_keys=True))


# Each part has its own folder and list of digests, since several processes write them.
def _part_file(folder: pathlib.Path, part: int) -> pathlib.Path:
    return folder / ".partial" / f"{part:05d}" / "part.array_record"


def _part_summary(folder: pathlib.Path, part: int) -> pathlib.Path:
    return folder / ".partial" / f"{part:05d}" / "part.json"


def has_part(folder: pathlib.Path, part: int) -> bool:
    """Returns whether a part is complete."""
    return _part_summary(folder, part).exists()


def store_part(
    folder: pathlib.Path,
    part: int,
    raw_and_entries: Iterable[tuple[bytes, Mapping[str, Any]]],
    summary: dict[str, Any],
    compression: str = "zstd",
) -> None:
    """Writes one part's records, then its summary, which marks it as complete.

    `summary` may be filled while the records are iterated over.
    """
    entries: list[Mapping[str, Any]] = []

    def raw_records():
        for raw, entry in raw_and_entries:
            entries.append(entry)
            yield raw

    _part_file(folder, part).parent.mkdir(parents=True, exist_ok=True)
    size, digest = _write_file(_part_file(folder, part), raw_records(), compression)
    written = {"index": entries, "bytes": size, "sha256": digest, **summary}
    digests.store(_part_summary(folder, part), json.dumps(written))


def collect(
    out: pathlib.Path, num_parts: int, prefix: str, after: int = 0
) -> tuple[list, list]:
    """Moves the finished parts to their final names and writes their index.

    The names do not hold the number of files, so that files can be added behind the
    `after` files that the folder has.

    Returns:
      The manifest's entry of each file, and the summaries of all parts.
    """
    summaries = [
        json.loads(digests.read(_part_summary(out, part))) for part in range(num_parts)
    ]
    nonempty = [part for part in range(num_parts) if summaries[part]["index"]]
    files, seen = [], set()
    for number, part in enumerate(nonempty, after):
        name = f"{prefix}.array_record-{number:05d}"
        if _part_file(out, part).exists():  # otherwise an interrupted run moved it
            os.replace(_part_file(out, part), out / name)
        entries = summaries[part]["index"]
        ids = {entry["id"] for entry in entries}
        if len(ids) < len(entries) or ids & seen:
            raise ShardsError(f"{out / name} holds an id that occurs twice")
        seen |= ids
        index = "".join(json.dumps(entry) + "\n" for entry in entries)
        paths.write_atomically(out / "index" / f"{number:05d}.jsonl", index)
        files.append(
            {
                "file": name,
                "count": len(entries),
                "bytes": summaries[part]["bytes"],
                "sha256": summaries[part]["sha256"],
                "index_sha256": hashlib.sha256(index.encode()).hexdigest(),
            }
        )
    return files, summaries


def discard_parts(out: pathlib.Path) -> None:
    """Removes `.partial/` of a finished folder, if it exists.

    It is renamed first: if the job were killed while removing it, digests could be
    missing, or its parts be taken for those of another run.
    """
    removed = out / _REMOVED
    shutil.rmtree(removed, ignore_errors=True)  # left by a job that was killed here
    if (out / ".partial").exists():
        os.replace(out / ".partial", removed)
        shutil.rmtree(removed, ignore_errors=True)


def digest(entries: Iterable[Mapping[str, Any]]) -> str:
    """Hashes ids, contents, captions and scores in order, whatever the files' layout.

    Text states have no captions in the index.
    """
    hashed = hashlib.sha256()
    for entry in entries:
        texts = json.dumps(entry.get("captions"), sort_keys=True)
        if entry.get("scores"):
            texts += f" {json.dumps(entry['scores'], sort_keys=True)}"
        hashed.update(f"{entry['id']} {entry['sha256']} {texts}\n".encode())
    return hashed.hexdigest()


# -- reading --------------------------------------------------------------------------


class Records:
    """Verified records by index; the base of shards and caches."""

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._file_records = _Files(
            [folder / file["file"] for file in manifest["files"]],
            [file["count"] for file in manifest["files"]],
        )
        self._indices: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._file_records)

    def entry(self, index: int) -> dict[str, Any]:
        """Returns a record's index entry, without reading the record."""
        file, position = self._file_records.locate(index)
        if file not in self._indices:
            path = self.folder / "index" / f"{file:05d}.jsonl"
            if paths.sha256_file(path) != self.manifest["files"][file]["index_sha256"]:
                raise ShardsError(
                    f"{path} has changed since it was written; prepare it again"
                )
            lines = path.read_text().splitlines()
            self._indices[file] = [json.loads(line) for line in lines]
        return self._indices[file][position]

    def captions(self, index: int) -> dict[str, str]:
        """Returns a record's captions by tier, without reading the record."""
        return self.entry(index)["captions"]

    def all_captions(self, tiers: Collection[str] = records.TIERS) -> Iterator[str]:
        """Yields every caption of these tiers."""
        for index in range(len(self)):
            yield from records.captions_of(self.captions(index), tiers)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""
        result = []
        for index, raw in zip(indices, self._file_records.read(indices), strict=True):
            entry = self.entry(index)
            file = str(self._file_records.path(self._file_records.locate(index)[0]))
            try:
                if isinstance(raw, str):
                    raise ValueError(raw)
                result.append(self.parse(raw, entry))
            except (ValueError, LookupError) as error:
                reason = (
                    error.reason if isinstance(error, records.CorruptRecord) else error
                )
                result.append(records.CorruptRecord(file, entry["id"], str(reason)))
        return result

    def __getitem__(self, index: int) -> Any:
        """Returns one record; raises `records.CorruptRecord` if it is damaged."""
        (result,) = self.read([index])
        if isinstance(result, records.CorruptRecord):
            raise result
        return result

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> Any:
        """Returns the record; raises ValueError or LookupError if it is damaged."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._file_records.close()


def count_captions(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns how many captions each tier has; tiers without any are left out."""
    tiers = collections.Counter()
    for entry in entries:
        for tier, text in entry["captions"].items():
            tiers[tier] += len(records.variants(text))
    return {tier: tiers[tier] for tier in records.TIERS if tiers[tier]}


def read_manifest(folder: pathlib.Path, name: str, what: str) -> dict[str, Any]:
    """Returns the manifest of a finished folder.

    Args:
      folder: the folder.
      name: of the manifest's file.
      what: the folder should hold, in words, for the message.

    Raises:
      ShardsError: the folder is not finished, or has another format.
      digests.Damaged: the manifest differs from what was written.
    """
    if not (folder / name).exists():
        unfinished = (folder / ".partial").exists()
        raise ShardsError(
            f"{folder} holds no finished {what}"
            + (": prepare was interrupted; run it again" if unfinished else "")
        )
    manifest = json.loads(digests.read(folder / name))
    stored = manifest["settings"]["format"]
    if stored != FORMAT:
        raise ShardsError(f"{folder} has format {stored}; this code reads {FORMAT}")
    return manifest
