"""What a network computes of records, stored once: how such a cache is written and read.

`latent_cache` and `text_cache` say what is stored. Common to both: files that are either
whole or absent after an interruption and that several processes can share, a forecast of
time and disk space, and records that stay in memory once they have been read.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sora_jax.core import digests, progress
from sora_jax.data import array_files, records

_FEW = 4  # batches; a forecast of fewer is not worth its two calls of `encode`

Batch = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that write a cache together; each makes every `count`-th file.

    barrier: waits until all of them have called it with the same name.
    """

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] = lambda name: None


class Source(Protocol):
    """What a cache is made of, and how its records are made.

    Attributes:
      name: of the cache's files, such as "text_states".
      unit: plural name of what is encoded, such as "captions".
      settings: JSON values that decide what is stored.
      files: the batches that each file is made of.
    """

    name: str
    unit: str
    settings: Mapping[str, Any]
    files: Sequence[Sequence[Batch]]

    def read(self, batch: Batch, summary: dict[str, Any]) -> list[Any]:
        """Returns the items of a batch; lists damaged ones in the file's summary."""

    def encode(self, items: list[Any], summary: dict[str, Any]) -> Sequence[Any]:
        """Returns what is stored of each item; adds what `describe` needs to the summary.

        Raises:
          ValueError: the network returned something else.
        """

    def pack(self, item: Any, array: Any) -> tuple[bytes, dict[str, Any]]:
        """Returns a record's bytes and its index entry."""

    def cost(self, batch: Batch) -> int:
        """Returns how long a batch takes, in any unit."""

    def nbytes(self, batches: list[Batch], items: list, arrays: Sequence) -> float:
        """Returns the bytes that batches will take, from the items of one of them."""

    def describe(self, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns what the manifest says besides files and digest."""


def write(
    out_dir: str | os.PathLike, source: Source, processes: Processes
) -> dict[str, Any]:
    """Writes the files that a cache lacks, then the manifest, which makes it finished.

    Before the work begins, one batch is timed, and a forecast for all is printed.

    Args:
      out_dir: a new folder, one that an interrupted run has left, or a finished one.
      source: what is encoded.
      processes: that share the folder; the first one writes the manifest.

    Returns:
      The manifest.

    Raises:
      OSError: the disk has no room for the files; nothing was written yet.
      ShardsError: the folder was made with other settings, or nothing could be stored.
      ValueError: `source.encode` raises it.
    """
    out, manifest_file = pathlib.Path(out_dir), f"{source.name}.json"
    settings = array_files.plain({"format": array_files.FORMAT, **source.settings})
    process, barrier = processes.index, processes.barrier
    if process:
        barrier("claimed")
    finished = array_files.claim(out, manifest_file, settings)
    if not process:
        barrier("claimed")
    if finished:
        if not process:  # remains where the job was killed as it finished
            array_files.discard_parts(out)
        return json.loads(digests.read(out / manifest_file))
    mine = range(process, len(source.files), processes.count)
    missing = [number for number in mine if not array_files.has_part(out, number)]
    sizes = {number: sum(map(len, source.files[number])) for number in mine}
    _forecast(out, source, [source.files[n] for n in missing], processes.count)
    done = sum(sizes.values()) - sum(sizes[number] for number in missing)
    with progress.Progress(
        sum(sizes.values()), "encode", source.unit, start=done, process_index=process
    ) as bar:
        for number in missing:
            summary: dict[str, Any] = {}
            items = _records(source, source.files[number], summary, bar)
            # Floats do not shrink; a fast compressor is for the text.
            array_files.store_part(out, number, items, summary, compression="snappy")
    barrier("encoded")
    if process:
        barrier("collected")
        return json.loads(digests.read(out / manifest_file))
    files, summaries = array_files.collect(out, len(source.files), source.name)
    if not files:
        raise array_files.ShardsError(f"{out}: none of the {source.unit} could be read")
    manifest = {
        "settings": settings,
        "count": sum(file["count"] for file in files),
        **source.describe(summaries),
        "digest": array_files.digest(e for s in summaries for e in s["index"]),
        "files": files,
    }
    digests.store(out / manifest_file, json.dumps(manifest, indent=1))
    array_files.discard_parts(out)
    barrier("collected")
    return manifest


def _records(
    source: Source,
    batches: Sequence[Batch],
    summary: dict[str, Any],
    bar: progress.Progress,
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for batch in batches:
        if items := source.read(batch, summary):
            yield from map(source.pack, items, source.encode(items, summary))
        bar.update(len(batch))


def _forecast(
    out: pathlib.Path,
    source: Source,
    files: Sequence[Sequence[Batch]],
    num_processes: int,
) -> None:
    """Prints what making these files takes; OSError where the disk is too small."""
    batches = [batch for file in files for batch in file]
    if sum(map(len, batches)) < _FEW * max(map(len, batches), default=1):
        return
    sample = max(files[0], key=source.cost)  # a full batch
    items = source.read(sample, {})
    if not items:
        return
    source.encode(items, {})  # compiles
    began = time.monotonic()
    arrays = source.encode(items, {})
    seconds = time.monotonic() - began
    seconds *= sum(map(source.cost, batches)) / source.cost(sample)
    here = source.nbytes(batches, items, arrays)
    what = source.name.replace("_", " ")
    work = f"{sum(map(len, batches))} {source.unit}"
    _announce(out, what, work, seconds, here, here * num_processes)


def _announce(out, what: str, work: str, seconds: float, here: float, whole: float):
    """`here` and `whole` are the bytes that this process, and all of them, will write."""
    free = shutil.disk_usage(out).free
    print(
        f"encode: {work} to go here, about {datetime.timedelta(seconds=round(seconds))} and "
        f"{here / 2**20:.0f} MiB",
        file=sys.stderr,
    )
    if whole > free:
        raise OSError(
            f"{out} has room for {free / 2**30:.1f} GiB, and the {what} will take "
            f"about {whole / 2**30:.1f} GiB"
        )


def read_manifest(
    folder: pathlib.Path, name: str, wanted: Mapping[str, Any], advice: str
) -> dict[str, Any]:
    """Reads the manifest of a finished cache, and compares its settings.

    Args:
      folder: the cache.
      name: of its source.
      wanted: settings that it must have; None: any value.
      advice: ends the message where one differs.

    Raises:
      ShardsError: the cache is not finished, or a setting differs.
    """
    what = name.replace("_", " ")
    manifest = array_files.read_manifest(folder, f"{name}.json", what)
    for setting, value in wanted.items():
        stored = manifest["settings"][setting]
        if value is not None and stored != value:
            raise array_files.ShardsError(
                f"the {what} in {folder} come from {setting.replace('_', ' ')} "
                f"{str(stored)[:12]}, not {str(value)[:12]}: {advice}"
            )
    return manifest


def split(raw: bytes, entry: Mapping[str, Any], what: str) -> tuple[bytes, bytes]:
    """Returns header and content of a record, the safetensors bytes of one tensor.

    Raises:
      ValueError: the content's hash is not that of the index.
    """
    start = 8 + int.from_bytes(raw[:8], "little")
    header, content = raw[8:start], raw[start:]
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"the SHA-256 of its {what} is not that of the index")
    return header, content


class Cache(array_files.Records):
    """A finished folder that keeps records in memory, up to `memory_bytes`.

    Records that are kept are not read, parsed or hashed again in later epochs.
    """

    def __init__(
        self, folder: pathlib.Path, manifest: dict[str, Any], memory_bytes: int
    ):
        super().__init__(folder, manifest)
        self._memory_bytes = memory_bytes
        self._kept: dict[int, Any] = {}
        self._used = 0
        self._keeping = threading.Lock()

    def __reduce__(self):
        return type(self), (self.folder, self.manifest, self._memory_bytes)

    def nbytes_of(self, record: Any) -> int:
        """Returns the memory that a record takes."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""
        missing = [index for index in indices if index not in self._kept]
        read = dict(zip(missing, super().read(missing), strict=True))
        with self._keeping:
            for index, record in read.items():
                if index in self._kept or isinstance(record, records.CorruptRecord):
                    continue
                size = self.nbytes_of(record)
                if self._used + size <= self._memory_bytes:
                    self._kept[index] = record
                    self._used += size
        return [self._kept.get(index) or read[index] for index in indices]
