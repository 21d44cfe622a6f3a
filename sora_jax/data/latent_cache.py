"""Cached latents: the video VAE's encoding of each clip, computed once.

A folder holds latents.array_record-* files, whose records are safetensors bytes with a
float32 tensor `latents`, the tensors of `Views` if there are any, and the clip's id,
captions, scores, fps and state as metadata, and `latents.json`, which names the VAE, the
clips and the preprocessing that they come from, and has the mean and standard deviation
of each channel. Opening a cache of other weights or other clips raises an error.

Letters: n clips, t time, h height, w width, c channel.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from sora_jax.data import array_files, caches, records

_NAME = "latents"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """What else was encoded of a clip, which the denoiser may be given.

    Attributes:
      frames: which video frames were encoded alone.
      pictures: their latents, float32[p, h, w, c].
      kept: latents of the clip with the rest of a region in grey, float32[t, h, w, c].
      region: which of them are known, bool[t, h, w].
    """

    frames: tuple[int, ...] = ()
    pictures: np.ndarray | None = None
    kept: np.ndarray | None = None
    region: np.ndarray | None = None

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        names = "pictures", "kept", "region"
        return {n: x for n in names if (x := getattr(self, n)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """One clip's latents, float32[t, h, w, c], other views of it, and its text.

    `header` is the record's safetensors header, with the text and the state as JSON.
    """

    id: str
    latents: np.ndarray
    views: Views = Views()
    captions: Mapping[str, str]
    scores: Mapping[str, float]
    fps: float
    header: bytes

    @property
    def state_json(self) -> str | None:
        """The toy world's scene as JSON; None for other clips."""
        metadata = json.loads(self.header)["__metadata__"]
        return json.loads(metadata["record"])["state_json"]


# encode(clips) -> float32[n, t, h, w, c]
Encode = Callable[[list[records.ClipRecord]], np.ndarray]


def write(
    out_dir: str | os.PathLike,
    clips: array_files.Records,
    encode: Encode,
    *,
    vae_digest: str,
    preprocessing: Mapping[str, Any],
    views: Callable[[list[records.ClipRecord]], list[Views]] | None = None,
    batch_size: int | Callable[[tuple[int, int, int]], int] = 32,
    clips_per_file: int = 512,
    processes: caches.Processes = caches.Processes(),
) -> dict[str, Any]:
    """Encodes all clips and stores the latents; continues an interrupted run.

    A damaged clip is left out and listed in the manifest. Clips of several sizes are
    stored in the order of their sizes.

    Args:
      out_dir: see `caches.write`.
      clips: to encode: `shards.Shards`.
      encode: returns the latents of up to `batch_size` clips of one size; the same clips
        must give the same latents.
      vae_digest: hash of the VAE's weights and config.
      preprocessing: JSON values that say what is done to frames before encoding, and
        which views there are.
      views: encodes what else is stored of these clips.
      batch_size: clips in one call of `encode`, or a function that says it for clips of
        (frames, height, width).
      clips_per_file: clips in one file, which is what an interruption can cost.
      processes: that share the folder.

    Returns:
      The manifest.

    Raises:
      ValueError: `encode` returns numbers that are not finite, or a wrong shape.
      OSError, ShardsError: see `caches.write`.
    """
    settings = {
        "vae": vae_digest,
        "clips": clips.manifest["digest"],
        "preprocessing": dict(preprocessing),
        "clips_per_file": clips_per_file,
    }
    # Latents of before they held scores are not continued: half of them would lack these.
    if any(clips.entry(index).get("scores") for index in range(len(clips))):
        settings["scores"] = True
    shapes = _shapes(clips)
    at_once = batch_size if callable(batch_size) else lambda shape: batch_size
    # By size, so that few batches are not full.
    order = sorted(range(len(clips)), key=shapes.__getitem__)
    files = [
        _batches(shapes, indices, at_once)
        for indices in itertools.batched(order, clips_per_file)
    ]
    source = _Source(settings, files, clips, encode, views, shapes)
    return caches.write(out_dir, source, processes)


def _shapes(clips: array_files.Records) -> list[tuple[int, int, int]]:
    """The (frames, height, width) of every clip."""
    usual = tuple(clips.manifest[name] for name in ("num_frames", "height", "width"))
    if not any(isinstance(number, list) for number in usual):
        return [usual] * len(clips)
    return [records.shape_of(clips.entry(index)) for index in range(len(clips))]


def _batches(
    shapes: Sequence[tuple[int, int, int]],
    indices: Sequence[int],
    at_once: Callable[[tuple[int, int, int]], int],
) -> list[tuple[int, ...]]:
    """Batches of clips of one size, which are adjacent."""
    return [
        batch
        for shape, same in itertools.groupby(indices, key=shapes.__getitem__)
        for batch in itertools.batched(same, at_once(shape))
    ]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Clips as a `caches.Source`: batches are their indices, items the records."""

    settings: Mapping[str, Any]
    files: Sequence[Sequence[Sequence[int]]]
    clips: array_files.Records
    encode_clips: Encode
    encode_views: Callable[[list[records.ClipRecord]], list[Views]] | None
    shapes: Sequence[tuple[int, int, int]]
    name, unit = _NAME, "clips"

    def read(self, batch, summary):
        dropped = summary.setdefault("dropped", [])
        good = []
        for clip in self.clips.read(batch):
            if isinstance(clip, records.CorruptRecord):
                dropped.append({"id": clip.id, "reason": str(clip)})
            else:
                good.append(clip)
        return good

    def encode(self, items, summary):
        latents_nthwc = np.asarray(self.encode_clips(items), np.float32)
        if latents_nthwc.ndim != 5 or len(latents_nthwc) != len(items):
            raise ValueError(
                f"encode returned shape {latents_nthwc.shape} for {len(items)} clips; "
                "latents are [n, t, h, w, c]"
            )
        if not np.isfinite(latents_nthwc).all():
            raise ValueError(
                f"latents in the batch that begins with {items[0].id!r} are not finite"
            )
        wide_nthwc = latents_nthwc.astype(np.float64)
        for name, values in (("sums", wide_nthwc), ("squares", wide_nthwc**2)):
            total_c = np.array(summary.get(name, 0.0)) + values.sum((0, 1, 2, 3))
            summary[name] = total_c.tolist()
        positions = math.prod(latents_nthwc.shape[:4])
        summary["positions"] = summary.get("positions", 0) + positions
        views = (
            self.encode_views(items) if self.encode_views else [Views()] * len(items)
        )
        return [*zip(latents_nthwc, views, strict=True)]

    def pack(self, item, array):
        latents_thwc, views = np.ascontiguousarray(array[0]), array[1]
        more = records.relations(item)
        if views.frames:
            more["pictures"] = list(views.frames)
        if views.region is not None:
            more["region"] = True
        tensors = {"latents": latents_thwc} | {
            name: np.ascontiguousarray(x) for name, x in views.tensors.items()
        }
        # As safetensors lays them out: the widest types first, then by name.
        order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
        digest = hashlib.sha256()
        for name in order:
            digest.update(tensors[name].tobytes())
        entry = {
            "id": item.id,
            "sha256": digest.hexdigest(),
            "shape": list(latents_thwc.shape),
            "fps": float(item.fps),
            "captions": dict(item.captions),
        }
        # Clips without scores keep the bytes that they had before there were any.
        scores = {"scores": dict(item.scores)} if item.scores else {}
        record = {
            "id": item.id,
            "sha256": entry["sha256"],
            "captions": entry["captions"],
            "fps": entry["fps"],
            "state_json": item.state_json,
            **scores,
        }
        # One key of metadata: safetensors writes several in no fixed order.
        metadata = {"record": json.dumps(record)}
        return safetensors.numpy.save(tensors, metadata), entry | scores | more

    def cost(self, batch):
        return sum(math.prod(self.shapes[index]) for index in batch)

    def nbytes(self, batches, items, arrays):
        texts = [text for clip in items for text in clip.captions.values()]
        size = sum(len(text.encode()) for text in texts)
        for latents_thwc, views in arrays:
            size += latents_thwc.nbytes
            size += sum(x.nbytes for x in views.tensors.values())
        voxels = sum(clip.num_frames * clip.height * clip.width for clip in items)
        return size / voxels * sum(map(self.cost, batches))

    def describe(self, summaries):
        nonempty = [summary for summary in summaries if summary.get("positions")]
        positions = sum(summary["positions"] for summary in nonempty)
        mean_c = sum(np.array(summary["sums"]) for summary in nonempty) / positions
        square_c = sum(np.array(summary["squares"]) for summary in nonempty) / positions
        entries = [entry for summary in summaries for entry in summary["index"]]
        scores = collections.Counter(
            name for entry in entries for name in entry.get("scores", ())
        )
        return {
            "dropped": [item for summary in summaries for item in summary["dropped"]],
            "mean": mean_c.tolist(),
            "std": np.sqrt(np.maximum(square_c - mean_c**2, 0)).tolist(),
            "shape": [list(s) for s in sorted({tuple(e["shape"]) for e in entries})],
            "fps": sorted({entry["fps"] for entry in entries}),
            "captions": array_files.count_captions(entries),
            **({"scores": dict(sorted(scores.items()))} if scores else {}),
        }


class Latents(caches.Cache):
    """A finished cache; `[i]` gives a verified `LatentRecord`."""

    @property
    def parts(self) -> tuple["Latents", ...]:
        """Itself alone; see `Joined`."""
        return (self,)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents; ShardsError if they differ."""
        return self._common("shape")

    @property
    def fps(self) -> float:
        """Frames a second of the clips; ShardsError if they differ."""
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
        """The digest of the clips' ids, latents and captions."""
        return [self.manifest["digest"]]

    @property
    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, float32[c] each."""
        mean, std = self.manifest["mean"], self.manifest["std"]
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def nbytes_of(self, record: LatentRecord) -> int:
        views = sum(x.nbytes for x in record.views.tensors.values())
        return record.latents.nbytes + views + len(record.header)

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> LatentRecord:
        # Text and shape come from the index, which is already parsed, so that reading a
        # record is little more than hashing its latents.
        header, content = caches.split(raw, entry, "latents")
        views = Views()
        if entry.get("pictures") or entry.get("region"):
            arrays = safetensors.numpy.load(raw)
            latents_thwc = arrays.pop("latents")
            views = Views(frames=tuple(entry.get("pictures", ())), **arrays)
        else:
            latents_thwc = np.frombuffer(content, "<f4").reshape(entry["shape"])
        return LatentRecord(
            id=entry["id"],
            latents=latents_thwc,
            views=views,
            captions=entry["captions"],
            scores=entry.get("scores", {}),
            fps=entry["fps"],
            header=header,
        )


class Joined:
    """The concatenation of several caches of one video VAE, such as of several sizes.

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
        captions, scores = collections.Counter(), collections.Counter()
        for part in parts:
            captions.update(part.manifest["captions"])
            scores.update(part.manifest.get("scores", {}))
        self.manifest = {"captions": dict(captions), "scores": dict(scores)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digests(self) -> list[str]:
        """The digest of each cache, in order."""
        return [digest for part in self.parts for digest in part.digests]

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def entry(self, index: int) -> dict[str, Any]:
        """Returns a record's index entry, without reading the record."""
        part, place = self._locate(index)
        return self.parts[part].entry(place)

    def all_captions(self, tiers: Collection[str] = records.TIERS) -> Iterator[str]:
        """Yields every caption of these tiers."""
        for part in self.parts:
            yield from part.all_captions(tiers)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""
        places = [self._locate(index) for index in indices]
        result: list[Any] = [None] * len(places)
        for number, part in enumerate(self.parts):
            mine = [i for i, (owner, _) in enumerate(places) if owner == number]
            read = part.read([places[i][1] for i in mine]) if mine else []
            for i, record in zip(mine, read, strict=True):
                result[i] = record
        return result


def open(
    folder: str | os.PathLike,
    *,
    vae_digest: str | None = None,
    clips_digest: str | None = None,
    memory_bytes: int = 1 << 30,
) -> Latents:
    """Opens a finished cache of latents.

    Args:
      folder: written by `write`.
      vae_digest: of the VAE that the latents must come from; None: any.
      clips_digest: of the shards (`manifest["digest"]`) that they must come from.
      memory_bytes: how much of the cache may be kept in memory.

    Raises:
      ShardsError: the cache is missing or unfinished, or comes from another VAE or other
        clips.
    """
    folder = pathlib.Path(folder)
    wanted = {"vae": vae_digest, "clips": clips_digest}
    advice = "encode them again into another folder"
    manifest = caches.read_manifest(folder, _NAME, wanted, advice)
    return Latents(folder, manifest, memory_bytes)
