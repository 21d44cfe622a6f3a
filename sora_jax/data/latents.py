"""Cached latents: what the video VAE makes of each clip, computed once.

A folder holds latents.array_record-* files whose records are safetensors bytes with one
float32 tensor `latents` and the clip's id, captions, fps and state beside it, and
`latents.json`: which VAE, which clips and which preprocessing they come from, and the
mean and standard deviation of each channel. A cache of other weights or other clips is
refused with the reason.

Letters: n clips, t time, h height, w width, c channel.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import safetensors.numpy

from sora_jax.core import paths, progress
from sora_jax.data import array_files, records

_MANIFEST = "latents.json"
_FEW = 4  # batches; less than that is not worth a forecast


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """One clip's latents, float32[t, h, w, c], and its text.

    `header` is the record's safetensors header, which says all of it once more.
    """

    id: str
    latents: np.ndarray
    captions: Mapping[str, str]
    fps: float
    header: bytes

    @property
    def state_json(self) -> str | None:
        """The toy world's scene, where there is one."""
        metadata = json.loads(self.header)["__metadata__"]
        return json.loads(metadata["record"])["state_json"]


class Clips(Protocol):
    """The clips that are encoded: `shards.Shards`."""

    manifest: Mapping[str, Any]

    def __len__(self) -> int: ...

    def read(
        self, indices: Sequence[int]
    ) -> list[records.ClipRecord | records.CorruptRecord]: ...


# encode(clips) -> float32[n, t, h, w, c]
Encode = Callable[[list[records.ClipRecord]], np.ndarray]


def write_latents(
    out_dir: str | os.PathLike,
    clips: Clips,
    encode: Encode,
    *,
    vae_digest: str,
    preprocessing: Mapping[str, Any],
    batch_size: int = 32,
    clips_per_file: int = 512,
    process: int = 0,
    num_processes: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Encodes all clips and stores the latents; goes on where it was interrupted.

    A clip that is damaged is left out and listed in the manifest. Before the work
    begins, a few clips are timed, and what all of them will take is printed.

    Args:
      out_dir: a new folder, one that an interrupted run has left, or a finished one.
      clips: where the clips come from.
      encode: gives the latents of up to `batch_size` clips; the same clips must give
        the same latents.
      vae_digest: hash of the VAE's weights and config.
      preprocessing: JSON values that say what is done to frames before encoding.
      batch_size: clips in one call of `encode`.
      clips_per_file: clips in one file; what an interruption can cost.
      process, num_processes: each of several processes that share the folder makes
        every so-many-eth file, and the first one writes the manifest.
      barrier: waits until all of them are there.

    Returns:
      The manifest.

    Raises:
      OSError: the disk has no room for what is to come; nothing was written yet.
      ShardsError: the folder belongs to another VAE, other clips or other settings.
      ValueError: `encode` gives something that is not finite or has a wrong shape.
    """
    out = pathlib.Path(out_dir)
    settings = array_files.plain(
        {
            "format": array_files.FORMAT,
            "vae": vae_digest,
            "clips": clips.manifest["digest"],
            "preprocessing": dict(preprocessing),
            "clips_per_file": clips_per_file,
        }
    )
    if process:
        barrier("claimed")
    finished = array_files.claim(out, _MANIFEST, settings)
    if not process:
        barrier("claimed")
    if finished:
        return json.loads((out / _MANIFEST).read_text())
    parts = [
        range(start, min(start + clips_per_file, len(clips)))
        for start in range(0, len(clips), clips_per_file)
    ]
    mine = range(process, len(parts), num_processes)
    missing = [part for part in mine if not array_files.has_part(out, part)]
    ahead = sum(len(parts[part]) for part in missing)
    _predict(out, clips, encode, batch_size, ahead, num_processes)
    total = sum(len(parts[part]) for part in mine)
    with progress.Progress(
        total, "encode", "clips", start=total - ahead, process_index=process
    ) as bar:
        for part in missing:
            summary: dict[str, Any] = {"dropped": []}
            items = _encoded(clips, parts[part], encode, batch_size, summary, bar)
            # Floats do not shrink; a fast compressor is for the text.
            array_files.store_part(out, part, items, summary, compression="snappy")
    barrier("encoded")
    if process:
        barrier("collected")
        return json.loads((out / _MANIFEST).read_text())
    files, summaries = array_files.collect(out, len(parts), "latents")
    if not files:
        raise array_files.ShardsError(f"{out}: none of the clips could be read")
    manifest = {
        "settings": settings,
        "count": sum(file["count"] for file in files),
        "dropped": [item for summary in summaries for item in summary["dropped"]],
        **_statistics(summaries),
        **_sizes(summaries),
        "digest": array_files.digest(summaries),
        "files": files,
    }
    paths.write_atomically(out / _MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(out / ".partial")
    barrier("collected")
    return manifest


def _predict(out, clips, encode, batch_size: int, ahead: int, num_processes: int):
    """Says what encoding `ahead` clips takes; OSError where the disk is too small."""
    if ahead < _FEW * batch_size:
        return
    batch = [
        clip
        for clip in clips.read(range(batch_size))
        if not isinstance(clip, records.CorruptRecord)
    ]
    if not batch:
        return
    encode(batch)  # compiles
    began = time.monotonic()
    latents_nthwc = encode(batch)
    seconds = (time.monotonic() - began) / len(batch) * ahead
    texts = sum(len(text.encode()) for clip in batch for text in clip.captions.values())
    whole = (latents_nthwc.nbytes + texts) / len(batch) * ahead * num_processes
    free = shutil.disk_usage(out).free
    print(
        f"encode: {ahead} clips to go here, about {progress.clock(seconds)} and "
        f"{whole / num_processes / 2**20:.0f} MiB",
        file=sys.stderr,
    )
    if whole > free:
        raise OSError(
            f"{out} has room for {free / 2**30:.1f} GiB, and the latents will take "
            f"about {whole / 2**30:.1f} GiB"
        )


def _encoded(clips, indices, encode, batch_size, summary, bar):
    """Yields (bytes, index entry) and fills the part's summary with its sums."""
    sums = np.zeros(())
    squares = np.zeros(())
    positions = 0
    for start in range(0, len(indices), batch_size):
        batch = []
        for clip in clips.read(indices[start : start + batch_size]):
            if isinstance(clip, records.CorruptRecord):
                summary["dropped"].append({"id": clip.id, "reason": str(clip)})
            else:
                batch.append(clip)
        if batch:
            latents_nthwc = np.asarray(encode(batch), np.float32)
            if latents_nthwc.ndim != 5 or len(latents_nthwc) != len(batch):
                raise ValueError(
                    f"encode gave {latents_nthwc.shape} for {len(batch)} clips; "
                    "latents are [n, t, h, w, c]"
                )
            if not np.isfinite(latents_nthwc).all():
                raise ValueError(f"latents of {batch[0].id!r} and on are not finite")
            wide = latents_nthwc.astype(np.float64)
            sums = sums + wide.sum((0, 1, 2, 3))
            squares = squares + (wide**2).sum((0, 1, 2, 3))
            positions += math.prod(latents_nthwc.shape[:4])
            for clip, latents_thwc in zip(batch, latents_nthwc, strict=True):
                yield _pack(clip, latents_thwc)
        bar.update(min(batch_size, len(indices) - start))
    summary |= {
        "sums": sums.tolist(),
        "squares": squares.tolist(),
        "positions": positions,
    }


def _statistics(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    kept = [summary for summary in summaries if summary["positions"]]
    positions = sum(summary["positions"] for summary in kept)
    mean_c = sum(np.array(summary["sums"]) for summary in kept) / positions
    square_c = sum(np.array(summary["squares"]) for summary in kept) / positions
    std_c = np.sqrt(np.maximum(square_c - mean_c**2, 0))
    return {"mean": mean_c.tolist(), "std": std_c.tolist()}


def _sizes(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the different shapes and frame rates, and how many captions there are."""
    entries = [entry for summary in summaries for entry in summary["index"]]
    return {
        "shape": [list(s) for s in sorted({tuple(e["shape"]) for e in entries})],
        "fps": sorted({entry["fps"] for entry in entries}),
        "captions": array_files.count_captions(entries),
    }


def _pack(clip: records.ClipRecord, latents_thwc: np.ndarray):
    latents_thwc = np.ascontiguousarray(latents_thwc)
    digest = hashlib.sha256(latents_thwc.tobytes()).hexdigest()
    entry = {
        "id": clip.id,
        "sha256": digest,
        "shape": list(latents_thwc.shape),
        "fps": float(clip.fps),
        "captions": dict(clip.captions),
    }
    record = {
        "id": clip.id,
        "sha256": digest,
        "captions": dict(clip.captions),
        "fps": float(clip.fps),
        "state_json": clip.state_json,
    }
    # One key of metadata: safetensors writes several in no fixed order.
    metadata = {"record": json.dumps(record)}
    return safetensors.numpy.save({"latents": latents_thwc}, metadata), entry


class Latents(array_files.Records):
    """A finished cache; `[i]` gives a verified `LatentRecord`.

    Records that have been read stay in memory until `memory_bytes` are used, so that
    from the second epoch on nothing is read, parsed or hashed.
    """

    def __init__(
        self, folder: pathlib.Path, manifest: dict[str, Any], memory_bytes: int
    ):
        super().__init__(folder, manifest)
        self._memory_bytes = memory_bytes
        self._kept: dict[int, LatentRecord] = {}
        self._used = 0
        self._keeping = threading.Lock()

    def __reduce__(self):
        return open_latents, (self.folder,), {"_memory_bytes": self._memory_bytes}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents, which all have the same."""
        return self._common("shape")

    @property
    def fps(self) -> float:
        """Frames a second of the clips, which is the same for all."""
        return self._common("fps")

    def _common(self, field: str) -> Any:
        values = self.manifest[field]
        if len(values) != 1:
            raise array_files.ShardsError(
                f"the latents in {self.folder} differ in {field}: {values}"
            )
        return tuple(values[0]) if field == "shape" else values[0]

    @property
    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, float32[c] each."""
        mean, std = self.manifest["mean"], self.manifest["std"]
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def read(self, indices: Sequence[int]) -> list[LatentRecord | Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""
        missing = [index for index in indices if index not in self._kept]
        read = dict(zip(missing, super().read(missing), strict=True))
        with self._keeping:
            for index, record in read.items():
                if index in self._kept or not isinstance(record, LatentRecord):
                    continue
                size = record.latents.nbytes + len(record.header)
                if self._used + size <= self._memory_bytes:
                    self._kept[index] = record
                    self._used += size
        return [self._kept.get(index) or read[index] for index in indices]

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> LatentRecord:
        # Text and shape come from the index, which has been parsed already: reading
        # a record is then little more than hashing its latents.
        start = 8 + int.from_bytes(raw[:8], "little")
        content = raw[start:]
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("the SHA-256 of its latents is not that of the index")
        return LatentRecord(
            id=entry["id"],
            latents=np.frombuffer(content, "<f4").reshape(entry["shape"]),
            captions=entry["captions"],
            fps=entry["fps"],
            header=raw[8:start],
        )


def open_latents(
    folder: str | os.PathLike,
    *,
    vae_digest: str | None = None,
    clips_digest: str | None = None,
    memory_bytes: int = 1 << 30,
) -> Latents:
    """Opens a finished cache of latents.

    Args:
      folder: what `write_latents` has written.
      vae_digest: the VAE that the latents must come from.
      clips_digest: the clips (`manifest["digest"]` of the shards) they must come from.
      memory_bytes: how much of the cache may stay in memory.

    Raises:
      ShardsError: there is none, or it comes from another VAE or other clips.
    """
    folder = pathlib.Path(folder)
    manifest = array_files.read_manifest(folder, _MANIFEST, "latents")
    for name, asked in (("vae", vae_digest), ("clips", clips_digest)):
        found = manifest["settings"][name]
        if asked is not None and found != asked:
            raise array_files.ShardsError(
                f"the latents in {folder} come from {name} {found[:12]}, not "
                f"{asked[:12]}; encode them again into another folder"
            )
    return Latents(folder, manifest, memory_bytes)
