"""Cached latents: what the video VAE makes of each clip, computed once.

A folder holds latents.array_record-* files whose records are safetensors bytes with one
float32 tensor `latents` and the clip's id, captions, fps and state beside it, and
`latents.json`: which VAE, which clips and which preprocessing they come from, and the
mean and standard deviation of each channel. A cache of other weights or other clips is
refused with the reason.

Letters: n clips, t time, h height, w width, c channel.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import safetensors.numpy

from sora_jax.data import array_files, caches, records

_MANIFEST = "latents.json"


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


def write(
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
      process, num_processes, barrier: see `caches.write`.

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
    parts = [
        range(start, min(start + clips_per_file, len(clips)))
        for start in range(0, len(clips), clips_per_file)
    ]
    return caches.write(
        out,
        _MANIFEST,
        settings,
        parts,
        prefix="latents",
        unit="clips",
        forecast=lambda missing: _predict(
            out, clips, encode, batch_size, sum(map(len, missing)), num_processes
        ),
        encode=lambda part, summary, bar: _encoded(
            clips, part, encode, batch_size, summary, bar
        ),
        describe=_describe,
        process=process,
        num_processes=num_processes,
        barrier=barrier,
    )


def _predict(out, clips, encode, batch_size: int, ahead: int, num_processes: int):
    """Says what encoding `ahead` clips takes; OSError where the disk is too small."""
    if ahead < caches.FEW * batch_size:
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
    here = (latents_nthwc.nbytes + texts) / len(batch) * ahead
    whole = here * num_processes
    caches.announce(out, "latents", f"{ahead} clips", seconds, here, whole)


def _encoded(clips, indices, encode, batch_size, summary, bar):
    """Yields (bytes, index entry) and fills the part's summary with its sums."""
    summary["dropped"] = []
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


def _describe(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of all clips together."""
    dropped = [item for summary in summaries for item in summary["dropped"]]
    return {"dropped": dropped, **_statistics(summaries), **_sizes(summaries)}


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


class Latents(caches.Cache):
    """A finished cache; `[i]` gives a verified `LatentRecord`."""

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
                f"the latents in {self.folder} differ in {field}: {values}; rows of "
                "several sizes need packing.shapes"
            )
        return tuple(values[0]) if field == "shape" else values[0]

    @property
    def digests(self) -> list[str]:
        """What names the clips, their latents and captions."""
        return [self.manifest["digest"]]

    @property
    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, float32[c] each."""
        mean, std = self.manifest["mean"], self.manifest["std"]
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def nbytes_of(self, record: LatentRecord) -> int:
        return record.latents.nbytes + len(record.header)

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> LatentRecord:
        # Text and shape come from the index, which has been parsed already: reading
        # a record is then little more than hashing its latents.
        header, content = caches.split(raw, entry, "latents")
        return LatentRecord(
            id=entry["id"],
            latents=np.frombuffer(content, "<f4").reshape(entry["shape"]),
            captions=entry["captions"],
            fps=entry["fps"],
            header=header,
        )


class Joined:
    """Several caches of one video VAE, one after the other: clips of several sizes.

    Raises:
      ShardsError: they come from different video VAEs.
    """

    def __init__(self, parts: Sequence[Latents]):
        self.parts, self.folder = tuple(parts), parts[0].folder
        for part in parts[1:]:
            vaes = [p.manifest["settings"]["vae"] for p in (parts[0], part)]
            if vaes[0] != vaes[1]:
                raise array_files.ShardsError(
                    f"the latents in {part.folder} come from video VAE {vaes[1][:12]}, "
                    f"those in {self.folder} from {vaes[0][:12]}"
                )
        self._ends = np.cumsum([len(part) for part in parts])
        counts = collections.Counter()
        for part in parts:
            counts.update(part.manifest["captions"])
        self.manifest = {"captions": dict(counts)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digests(self) -> list[str]:
        """The digest of each cache, in their order."""
        return [digest for part in self.parts for digest in part.digests]

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def entry(self, index: int) -> dict[str, Any]:
        """Returns what the index says of a record, without reading the record."""
        part, place = self._locate(index)
        return self.parts[part].entry(place)

    def all_captions(self, tiers: Collection[str] = records.TIERS) -> Iterator[str]:
        """Yields every caption of these tiers."""
        for part in self.parts:
            yield from part.all_captions(tiers)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""
        places = [self._locate(index) for index in indices]
        found: list[Any] = [None] * len(places)
        for number, part in enumerate(self.parts):
            mine = [i for i, (owner, _) in enumerate(places) if owner == number]
            read = part.read([places[i][1] for i in mine]) if mine else []
            for i, record in zip(mine, read, strict=True):
                found[i] = record
        return found


def open(
    folder: str | os.PathLike,
    *,
    vae_digest: str | None = None,
    clips_digest: str | None = None,
    memory_bytes: int = 1 << 30,
) -> Latents:
    """Opens a finished cache of latents.

    Args:
      folder: what `write` has written.
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
