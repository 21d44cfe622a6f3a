"""Features of the clips of a folder with their manifest, and files that store them.

A file of statistics (.npz) holds features, moments and manifest. It replaces the folder of
a reference if everything else is measured the same way.

Letters: n clips, t frames, h height, w width, d features.
"""

import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.core import paths
from sora_jax.evals import protocol, statistics
from sora_jax.evals.videos import clip_files

_CODE = (
    "evals/metrics/set_metrics.py",
    "evals/videos/feature_sets.py",
    "evals/videos/published.py",
    "evals/features/weight_folders.py",
    *clip_files.CODE,
)
# Fields of a manifest that say how features are computed, whatever the clips.
MADE_WITH = (
    "features",
    "feature_weights",
    "resize",
    "num_frames",
    "stride",
    "start",
    "colour",
    "code",
)
_ARRAYS = {"features_nd", "count", "mean_d", "scatter_dd", "manifest", "digest"}


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of a set of clips.

    Attributes:
      features_nd: float32.
      manifest: how they were computed, and a SHA-256 over the clips' pixels; JSON values.
      found: number of clips in the folder, usable or not.
      failures: one sentence for each clip or file that could not be used.
      notes: one sentence for everything else that is left out.
    """

    features_nd: np.ndarray
    manifest: Mapping[str, Any]
    found: int
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def made_with(
    name: str,
    network,
    num_frames: int,
    stride: int,
    start: str,
    colour: str | None = None,
) -> dict[str, Any]:
    """Returns the fields `MADE_WITH` of a manifest."""
    return {
        "features": name,
        "feature_weights": network.sha256,
        "resize": network.resize,
        "num_frames": num_frames,
        "stride": stride,
        "start": start,
        "colour": colour,
        "code": protocol.code_version(*_CODE),
    }


def compute(
    found: clip_files.Found,
    network,
    fields: Mapping[str, Any],
    num_clips: int | None,
    tell: Callable[[], None],
) -> FeatureSet:
    """Computes the features of the clips of a folder.

    Only a few batches of clips are in memory at a time.

    Args:
      found: the clips.
      network: see `networks.open`.
      fields: what `made_with` returns.
      num_clips: number of usable clips to draw; None: all.
      tell: is called after each clip.

    Raises:
      ValueError: fewer than two clips can be used, or fewer than `num_clips`.
    """
    count = len(found.sources)
    reader = clip_files.Reader(*(fields[f] for f in ("num_frames", "stride", "start")))
    batches = _Batches(network, network.batch_size)
    failures, longer = {}, 0
    digests, sizes, kinds, rates = {}, set(), set(), set()
    done = collections.Counter()
    for index in clip_files.drawn(count, num_clips, lambda: len(digests)):
        source = found.sources[index]
        try:
            clip = reader(source)
        except clip_files.UnusableClip as error:
            failures[index] = str(error)
        else:
            longer += clip.longer
            digests[index] = _digest(clip.video_thwc)
            sizes.add(clip.video_thwc.shape[1:3])
            kinds.add(source.kind)
            done.update(clip.notes)
            rates |= {round(clip.fps, 3)} if clip.fps else set()
            batches.add(index, clip.video_thwc)
        tell()
    features = batches.finish()
    for index in sorted(features):
        if not np.isfinite(features[index]).all():
            name = found.sources[index].name
            failures[index] = f"{name}: the features hold NaN or infinity"
            del features[index], digests[index]
    sentences = (*found.failures, *(failures[index] for index in sorted(failures)))
    _check_count(len(features), num_clips, sentences)
    notes = list(found.notes)
    if longer:
        notes.append(
            f"{longer} of {len(digests) + len(failures)} clips have more frames than "
            f"the {fields['num_frames']} that are used (start: {fields['start']})"
        )
    notes += clip_files.count_notes(done, len(digests) + len(failures))
    if len(rates) > 1:
        notes.append(f"the clips have {len(rates)} frame rates and are not resampled")
    if len(sizes) > 1:
        notes.append(f"the clips have {len(sizes)} sizes; each is resized")
    manifest = dict(fields) | {
        "clips": protocol.text_digest(digests[index] for index in sorted(digests)),
        "fps": sorted(rates),
        "kinds": sorted(kinds),
        "num_clips": len(features),
        "sizes": sorted(map(list, sizes)),
    }
    rows = [features[index] for index in sorted(features)]
    return FeatureSet(
        np.stack(rows), manifest, count + len(found.failures), sentences, tuple(notes)
    )


def _check_count(count: int, num_clips: int | None, failures: Sequence[str]) -> None:
    least = num_clips or 2
    if count < least:
        because = f" ({len(failures)} cannot: {failures[0]})" if failures else ""
        raise ValueError(
            f"{least} clips or more are needed, but {count} can be used{because}"
        )


def _digest(video_thwc: np.ndarray) -> str:
    shape = ",".join(map(str, video_thwc.shape)).encode()
    return hashlib.sha256(shape + video_thwc.tobytes()).hexdigest()


class _Batches:
    """Batches clips of equal shape; keeps less than two batches waiting."""

    def __init__(self, network, batch_size: int):
        self._network, self._batch_size = network, batch_size
        self._waiting = collections.defaultdict(list)
        self._features: dict[int, np.ndarray] = {}

    def add(self, index: int, video_thwc: np.ndarray) -> None:
        waiting = self._waiting[video_thwc.shape]
        waiting.append((index, video_thwc))
        if len(waiting) == self._batch_size:
            self._compute(video_thwc.shape)
        elif sum(map(len, self._waiting.values())) >= 2 * self._batch_size:
            self._compute(max(self._waiting, key=lambda s: len(self._waiting[s])))

    def _compute(self, shape: tuple[int, ...]) -> None:
        indices, videos = zip(*self._waiting.pop(shape), strict=True)
        rows = np.asarray(self._network(np.stack(videos)), np.float32)
        self._features.update(zip(indices, rows, strict=True))

    def finish(self) -> dict[int, np.ndarray]:
        """Computes the waiting clips; returns the features of all clips by index."""
        for shape in list(self._waiting):
            self._compute(shape)
        return self._features


def save(file: pathlib.Path, reference: FeatureSet, *, force: bool = False) -> None:
    """Writes a file of statistics.

    Raises:
      UnequalProtocols: the file exists with another manifest, and force is not set.
    """
    if file.exists() and not force:
        differing = _differing(load(file).manifest, reference.manifest)
        if differing:
            raise protocol.UnequalProtocols(
                f"{file} holds statistics with another manifest ({differing}); "
                "--force replaces them"
            )
    moments = statistics.Moments.of(reference.features_nd)
    content = io.BytesIO()
    np.savez(
        content,
        features_nd=reference.features_nd,
        count=moments.count,
        mean_d=moments.mean_d,
        scatter_dd=moments.scatter_dd,
        manifest=json.dumps(reference.manifest, sort_keys=True),
        digest=protocol.digest(reference.manifest),
    )
    paths.write_atomically(file, content.getvalue())


def load(file: pathlib.Path) -> FeatureSet:
    """Reads a file of statistics.

    Raises:
      ValueError: `save` did not write it, or its parts do not match.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            if set(opened.files) != _ARRAYS:
                raise ValueError(f"it holds {', '.join(opened.files) or 'nothing'}")
            arrays = {name: opened[name] for name in opened.files}
        manifest = json.loads(str(arrays["manifest"]))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is not a file that --save_statistics wrote: {error}"
        ) from None
    if protocol.digest(manifest) != str(arrays["digest"]):
        raise ValueError(f"{file}: the digest does not match the manifest")
    moments = statistics.Moments.of(arrays["features_nd"])
    match = (
        moments.count == arrays["count"] == manifest["num_clips"]
        and arrays["mean_d"].shape == moments.mean_d.shape
        and np.allclose(arrays["mean_d"], moments.mean_d)
        and np.allclose(arrays["scatter_dd"], moments.scatter_dd)
    )
    if not match:
        raise ValueError(f"{file}: the moments do not match the features")
    return FeatureSet(arrays["features_nd"], manifest, moments.count)


def check(
    file: pathlib.Path,
    reference: FeatureSet,
    fields: Mapping[str, Any],
    *,
    force: bool = False,
) -> FeatureSet:
    """Returns the statistics of a file after comparing them with manifest fields.

    Args:
      file: the file, for the message.
      reference: what `load` read.
      fields: manifest fields that must be equal.
      force: adds a note on differences instead of raising.

    Raises:
      UnequalProtocols: a field differs, and force is not set.
    """
    differing = _differing({f: reference.manifest.get(f) for f in fields}, fields)
    if not differing:
        return reference
    sentence = f"{file} was made with other settings ({differing})"
    if not force:
        raise protocol.UnequalProtocols(f"{sentence}; --force uses it anyway")
    return dataclasses.replace(reference, notes=(*reference.notes, sentence))


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {first.get(name)!r} and {second.get(name)!r}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    )
