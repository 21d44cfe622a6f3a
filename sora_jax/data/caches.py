"""What a network makes of records, computed once: how such a cache is filled and read.

`latents` and `text_states` say what is stored; here is what they have in common: parts
that an interruption leaves whole and several processes share, what the work will take,
and records that stay in memory once they have been read.
"""

import hashlib
import json
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from sora_jax.core import digests, progress
from sora_jax.data import array_files, records

FEW = 4  # batches; less than that is not worth a forecast


def write(
    out: pathlib.Path,
    manifest_name: str,
    settings: Mapping[str, Any],
    parts: Sequence[Sized],
    *,
    prefix: str,
    unit: str,
    forecast: Callable[[list[Any]], None],
    encode: Callable[[Any, dict[str, Any], progress.Progress], Iterable],
    describe: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    process: int,
    num_processes: int,
    barrier: Callable[[str], None],
) -> dict[str, Any]:
    """Fills a folder part by part, those that are missing, and finishes it.

    Args:
      out: a new folder, one that an interrupted run has left, or a finished one.
      manifest_name: the file that makes the folder finished.
      settings: JSON values that decide what is stored.
      parts: what each file is made of.
      prefix: of the files' names.
      unit: plural name of what the length of a part counts.
      forecast: takes the parts that this process has to make; says what they will
        take, and raises OSError where the disk is too small.
      encode: (part, summary, bar) -> (bytes, index entry) of each record; fills the
        summary, and counts on the bar.
      describe: what the manifest says beside files and digest, from all summaries.
      process, num_processes: each of several processes that share the folder makes
        every so-many-eth file, and the first one writes the manifest.
      barrier: waits until all of them are there.

    Returns:
      The manifest.

    Raises:
      ShardsError: the folder was made with other settings, or nothing could be stored.
    """
    if process:
        barrier("claimed")
    finished = array_files.claim(out, manifest_name, settings)
    if not process:
        barrier("claimed")
    if finished:
        if not process:  # what is left where the job was killed as it finished
            array_files.discard_parts(out)
        return json.loads(digests.read(out / manifest_name))
    mine = range(process, len(parts), num_processes)
    missing = [part for part in mine if not array_files.has_part(out, part)]
    ahead = sum(len(parts[part]) for part in missing)
    forecast([parts[part] for part in missing])
    total = sum(len(parts[part]) for part in mine)
    with progress.Progress(
        total, "encode", unit, start=total - ahead, process_index=process
    ) as bar:
        for part in missing:
            summary: dict[str, Any] = {}
            items = encode(parts[part], summary, bar)
            # Floats do not shrink; a fast compressor is for the text.
            array_files.store_part(out, part, items, summary, compression="snappy")
    barrier("encoded")
    if process:
        barrier("collected")
        return json.loads(digests.read(out / manifest_name))
    files, summaries = array_files.collect(out, len(parts), prefix)
    if not files:
        raise array_files.ShardsError(f"{out}: none of the {unit} could be read")
    manifest = {
        "settings": settings,
        "count": sum(file["count"] for file in files),
        **describe(summaries),
        "digest": array_files.digest(e for s in summaries for e in s["index"]),
        "files": files,
    }
    digests.store(out / manifest_name, json.dumps(manifest, indent=1))
    array_files.discard_parts(out)
    barrier("collected")
    return manifest


def announce(
    out: pathlib.Path, what: str, work: str, seconds: float, here: float, whole: float
) -> None:
    """Says what the work of this process will take.

    Args:
      out: where it is stored.
      what: what is stored, in words.
      work: how much is to be done, in words.
      seconds: that it will take.
      here, whole: bytes that this process, and all of them, will write.

    Raises:
      OSError: the disk has no room for all of it.
    """
    free = shutil.disk_usage(out).free
    print(
        f"encode: {work} to go here, about {progress.clock(seconds)} and "
        f"{here / 2**20:.0f} MiB",
        file=sys.stderr,
    )
    if whole > free:
        raise OSError(
            f"{out} has room for {free / 2**30:.1f} GiB, and the {what} will take "
            f"about {whole / 2**30:.1f} GiB"
        )


def split(raw: bytes, entry: Mapping[str, Any], what: str) -> tuple[bytes, bytes]:
    """Returns header and content of a record, safetensors bytes of one tensor.

    Raises:
      ValueError: the content is not that of the index.
    """
    start = 8 + int.from_bytes(raw[:8], "little")
    header, content = raw[8:start], raw[start:]
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"the SHA-256 of its {what} is not that of the index")
    return header, content


class Cache(array_files.Records):
    """A finished folder, whose records stay in memory once they have been read.

    Until `memory_bytes` are used; from the second epoch on nothing is then read, parsed
    or hashed.
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
