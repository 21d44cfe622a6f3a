"""Distances between two folders of videos, with their protocol.

    settings = published.resolve("stylegan-v", {})
    network = published.open_network(settings, "stylegan-v", weights, None)
    found = folder_distances.measure(videos, reference, settings, network)

Letters: n, m clips, d features.
"""

import dataclasses
import functools
import math
import operator
import pathlib
from typing import Any

import numpy as np

from sora_jax.core import progress
from sora_jax.evals import statistics
from sora_jax.evals.metrics import distances, set_metrics
from sora_jax.evals.videos import clip_files, feature_sets, published

_RESAMPLES = 100
_SPLITS = 10  # of the inception score
_LEAST = {  # clips per set, for each group of scores
    "the interval of the kernel distance": 4,
    "precision, recall, density and coverage": set_metrics.NEIGHBOURS + 1,
    "the extrapolated Frechet distance": distances.LEAST,
}


@dataclasses.dataclass(frozen=True)
class Distances:
    """The distances between two sets.

    Attributes:
      scores: name -> value, with its interval where it has one.
      protocol: how they were measured, as JSON values.
      counts: set -> number of clips that were found, used, and failed.
      failures: one sentence for each clip or file that could not be used.
      notes: one sentence for everything that the numbers leave out.
      published: name of the published protocol and of its score; None without one.
      reference: the features of the reference, which may be saved.
    """

    scores: dict[str, statistics.Estimate]
    protocol: dict[str, Any]
    counts: dict[str, dict[str, int]]
    failures: list[str]
    notes: list[str]
    published: dict[str, Any] | None
    reference: feature_sets.FeatureSet


def measure(
    videos: pathlib.Path,
    reference: pathlib.Path,
    settings: published.Settings,
    network,
    *,
    name: str | None = None,
    force: bool = False,
    colour: str | None = None,
) -> Distances:
    """Measures the videos of a folder against a reference.

    Args:
      videos: the folder.
      reference: another folder, or a file that --save_statistics wrote.
      settings: how they are measured.
      network: see `published.open_network`.
      name: of the published protocol that the settings come from.
      force: accepts statistics of the reference with other settings, and notes it.
      colour: see `clip_files.find`.

    Raises:
      FileNotFoundError, ValueError: clips or weights are missing, or contradict the
        protocol; in one sentence.
    """
    num_frames = settings.num_frames or network.num_frames
    sides = {"videos": (videos, settings.stride)}
    stride = settings.reference_stride or settings.stride
    fields = {
        side: feature_sets.made_with(
            settings.features, network, num_frames, *of_side, colour
        )
        for side, of_side in (
            ("videos", (settings.stride, "first")),
            ("reference", (stride, settings.reference_start)),
        )
    }
    sets = {}
    if reference.is_file():
        kept = feature_sets.load(reference)
        asked = dict(fields["reference"])
        if settings.num_clips is not None:
            asked["num_clips"] = settings.num_clips
        sets["reference"] = feature_sets.check(reference, kept, asked, force=force)
    else:
        sides["reference"] = (reference, stride)
    found = {
        side: clip_files.find(folder, colour) for side, (folder, _) in sides.items()
    }
    total = sum(
        min(len(of.sources), settings.num_clips or len(of.sources))
        for of in found.values()
    )
    with progress.Progress(total, "features", "clips") as bar:
        for side, of in found.items():
            try:
                sets[side] = feature_sets.compute(
                    of, network, fields[side], settings.num_clips, bar.update
                )
            except ValueError as error:
                raise ValueError(f"{sides[side][0]}: {error}") from None
    pair = sets["videos"], sets["reference"]
    notes = [f"{side}: {note}" for side in sorted(sets) for note in sets[side].notes]
    notes += _unlike(*pair, settings, name)
    return Distances(
        scores=_scores(*pair, settings, notes),
        protocol=_manifest(*pair, name),
        counts={
            side: {
                "found": of.found,
                "used": len(of.features_nd),
                "failed": len(of.failures),
            }
            for side, of in sorted(sets.items())
        },
        failures=[f"{s}: {text}" for s in sorted(sets) for text in sets[s].failures],
        notes=notes,
        published=name and {"protocol": name, "score": settings.score},
        reference=sets["reference"],
    )


def _unlike(videos, reference, settings, name: str | None) -> list[str]:
    """Returns notes on differences between the sets other than their content.

    Raises:
      NotTheProtocol: the protocol requires clips of one size.
    """
    notes, first, second = [], videos.manifest, reference.manifest
    sizes = first["sizes"], second["sizes"]
    if sizes[0] != sizes[1] or len(sizes[0]) > 1:
        sentence = (
            f"the clips have {_sizes(sizes[0])}, the reference has {_sizes(sizes[1])}"
        )
        if settings.same_size:
            raise published.NotTheProtocol(
                f"protocol {name} compares clips of one size, that of the data set, but "
                f"{sentence} pixels: resize both first"
            )
        notes.append(f"{sentence} pixels: resizing alone changes a distance")
    if first["kinds"] != second["kinds"]:
        kinds = (", ".join(manifest["kinds"]) for manifest in (first, second))
        notes.append(
            "the clips are {} and the reference is {}: compression changes a "
            "distance".format(*kinds)
        )
    rates = [
        [rate / manifest["stride"] for rate in manifest["fps"]]
        for manifest in (first, second)
    ]
    if all(rates) and rates[0] != rates[1]:
        notes.append(
            "the clips are used at {} fps, the reference at {} fps: the frame rate "
            "changes a distance".format(
                *(", ".join(f"{r:g}" for r in s) for s in rates)
            )
        )
    if first["clips"] == second["clips"]:
        notes.append("the clips are identical to the reference")
    n, d = videos.features_nd.shape
    m = len(reference.features_nd)
    if min(n, m) < d:
        notes.append(
            f"{min(n, m)} clips are fewer than the {d} features: most of a Frechet "
            "distance is then bias, and its extrapolation is unreliable"
        )
    return notes


def _sizes(sizes) -> str:
    shown = [f"{width}x{height}" for height, width in sizes[:3]]
    return ", ".join(shown) + (f" and {len(sizes) - 3} more" if sizes[3:] else "")


def _scores(videos, reference, settings, notes) -> dict[str, statistics.Estimate]:
    """Returns scores by name; adds notes on those that are left out."""
    samples_nd, reference_md = videos.features_nd, reference.features_nd
    count = min(len(samples_nd), len(reference_md))
    for what, least in _LEAST.items():
        if count < least:
            notes.append(f"{what} needs {least} clips per set, there are {count}")
    with progress.Progress(_RESAMPLES, "bootstrap", "resamples") as bar:
        frechet = distances.frechet_estimate(
            samples_nd, reference_md, num_resamples=_RESAMPLES, done=bar.update
        )
    scores = {"frechet": frechet}
    if count >= distances.LEAST:
        found = distances.frechet_extrapolated(samples_nd, reference_md)
        scores["frechet_limit"] = statistics.Estimate(found.limit)
        if found.intercept < 0:
            notes.append(
                f"the extrapolated Frechet distance is {found.intercept:.3g} and reported "
                f"as 0: {count} clips per set are too few to tell the sets apart by it"
            )
    by_n = distances.frechet(*map(_by_n, (samples_nd, reference_md)))
    scores["frechet_n"] = statistics.Estimate(by_n)
    kernels = {"kernel": (set_metrics.KID, 1.0)}
    if settings.features == "vjepa":
        kernels["jedi"] = (set_metrics.JEDI, 100.0)
    for kernel, (like, factor) in kernels.items():
        measured = set_metrics.kernel_distance
        if count >= 4:
            measured = set_metrics.kernel_distance_with_intervals
        distance = measured(samples_nd, reference_md, like)
        for form in ("biased", "unbiased"):
            # JEDi is published in its biased form.
            label = (
                "jedi" if (kernel, form) == ("jedi", "biased") else f"{kernel}_{form}"
            )
            scaled = functools.partial(operator.mul, factor)
            scores[label] = getattr(distance, form).map(scaled)
    if count > set_metrics.NEIGHBOURS:
        scores |= vars(set_metrics.neighbours(samples_nd, reference_md))
    if settings.features == "i3d" and len(samples_nd) >= 2 * _SPLITS:
        score, _ = set_metrics.inception_score(samples_nd, _SPLITS)
        scores["inception_score_i3d"] = statistics.Estimate(score)
    elif settings.features == "i3d":
        notes.append(f"the inception score needs {2 * _SPLITS} clips")
    for label in scores.keys() & {"frechet", "kernel_biased", "jedi"}:
        # These are never negative, so their intervals end at zero.
        ends = scores[label].map(functools.partial(max, 0.0))
        scores[label] = dataclasses.replace(ends, value=scores[label].value)
    broken = [label for label, one in scores.items() if not math.isfinite(one.value)]
    if broken:
        raise ValueError(f"{', '.join(broken)}: NaN or infinity")
    return scores


def _by_n(features_nd: np.ndarray) -> np.ndarray:
    """Scales features so that dividing by n - 1 gives their covariance divided by n."""
    features_nd = statistics.checked_features(features_nd, least=2)
    n, mean_d = len(features_nd), features_nd.mean(axis=0)
    return mean_d + (features_nd - mean_d) * math.sqrt((n - 1) / n)


def _manifest(videos, reference, name: str | None) -> dict[str, Any]:
    """Returns how the sets were measured, with the digest of the reference clips."""
    shared, other = dict(videos.manifest), reference.manifest
    del shared["clips"]  # the clips that are judged are not part of the protocol
    differing = {
        f"reference_{field}": value
        for field, value in other.items()
        if field in ("clips", "fps", "kinds", "num_clips", "sizes", "start", "stride")
        or value != shared[field]  # where it was forced
    }
    return (
        shared
        | differing
        | {
            "intervals": f"bootstrap of {_RESAMPLES}, {set_metrics.SUBSETS} subsets",
            "kernel": "(x . y / d + 1)^3",
            "neighbours": set_metrics.NEIGHBOURS,
            "published": name,
        }
    )
