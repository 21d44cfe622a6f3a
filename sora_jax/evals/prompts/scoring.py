"""Scores clips: by the oracle, and as video (FVD-toy, sharpness, flicker, motion).

Letters: n clips, t frames, h height, w width, c channels, d features.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from sora_jax.data import shards
from sora_jax.evals import protocol, statistics
from sora_jax.evals.features import networks
from sora_jax.evals.metrics import controls, distances, long_video, temporal
from sora_jax.evals.prompts import make_clips, samples, toyworld
from sora_jax.training import trained_vae

FVD_TOY, FVD_TOY_LIMIT = "FVD-toy", "FVD-toy, n → ∞"
MODEL, WORST = "model", "model, worst seed"
GROUND_TRUTH, RECONSTRUCTION = "ground truth", "VAE reconstruction"
SHUFFLED, UNTRAINED = "shuffled captions", "untrained weights"
NEAREST = "nearest training clip"


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of one kind of clips.

    Attributes:
      name: what the clips are.
      verdicts: suite -> for each clip, part -> right or wrong.
      shares: suite -> part -> share of right clips.
      look: measures of video quality, such as flicker.
      notes: one sentence for everything that the numbers leave out.
    """

    name: str
    verdicts: Mapping[str, list[dict[str, bool]]] = dataclasses.field(
        default_factory=dict
    )
    shares: Mapping[str, toyworld.Shares] = dataclasses.field(default_factory=dict)
    look: Mapping[str, statistics.Estimate] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def judge(
    name: str,
    suites: Sequence[toyworld.Suite],
    videos: Mapping[str, Sequence[np.ndarray | None]],
) -> Row:
    """Returns the oracle's verdicts on the clips of each suite."""
    verdicts = {s.name: toyworld.verdicts(s, videos[s.name]) for s in suites}
    shares = {suite: toyworld.summarize(found) for suite, found in verdicts.items()}
    return Row(name, verdicts, shares)


def look(
    row: Row,
    videos: Mapping[str, Sequence[np.ndarray | None]],
    network: networks.ToyFeatures,
    reference_nd: np.ndarray | None,
    motion: temporal.Motion | None = None,
) -> Row:
    """Adds measures of video quality: FVD-toy, sharpness, flicker, motion.

    Args:
      row: the row of the clips.
      videos: the clips by suite; held-out suites and missing clips are left out.
      network: the feature network.
      reference_nd: features of other ground truth clips of the same prompts; None
        leaves FVD-toy out.
      motion: exact motion of the clips, if known; FVD-toy is then left out.
    """
    video_nthwc, measured, notes = pooled(videos), {}, []
    if not len(video_nthwc):
        return dataclasses.replace(row, notes=(f"{row.name}: there are no clips",))
    if motion is None and reference_nd is not None:
        if len(video_nthwc) < distances.LEAST:
            notes.append(
                f"{row.name}: FVD-toy needs {distances.LEAST} clips or more, but there "
                f"are {len(video_nthwc)}"
            )
        else:
            measured |= _frechet(network(video_nthwc), reference_nd)
    if motion is None:
        sharp_nt = long_video.series(video_nthwc)["sharpness"]
        measured["sharpness"] = statistics.bootstrap_mean(sharp_nt.mean(1))
    for measure, values_n in temporal.measure(video_nthwc, motion).items():
        known_n = values_n[~np.isnan(values_n)]
        if len(known_n) < len(values_n):
            notes.append(
                f"{row.name}: {len(values_n) - len(known_n)} clips have no pixel that "
                f"can be tracked and are left out of the mean of {measure}"
            )
        if len(known_n):
            measured[measure] = statistics.bootstrap_mean(known_n)
    return dataclasses.replace(row, look=measured, notes=(*row.notes, *notes))


def _frechet(features_nd, reference_nd) -> dict[str, statistics.Estimate]:
    values = {FVD_TOY: distances.frechet_estimate(features_nd, reference_nd)}
    if len(features_nd) >= features_nd.shape[1]:  # else the limit says nothing
        found = distances.frechet_extrapolated(features_nd, reference_nd)
        values[FVD_TOY_LIMIT] = statistics.Estimate(found.limit)
    return values


def pooled(videos: Mapping[str, Sequence[np.ndarray | None]]) -> np.ndarray:
    """Returns all clips that are not missing or held out: uint8 [n, t, h, w, 3]."""
    kept = [
        video_thwc
        for suite, members in videos.items()
        if _is_main(suite)
        for video_thwc in members
        if video_thwc is not None
    ]
    return np.stack(kept) if kept else np.zeros((0, 2, 1, 1, 3), np.uint8)


def _is_main(suite: str) -> bool:
    return not suite.endswith(toyworld.HELD_OUT)


def worst_row(rows: Sequence[Row]) -> Row:
    """Returns the lowest share of each part, and the highest FVD-toy, over seeds."""
    suites = dict.fromkeys(suite for row in rows for suite in row.shares)
    shares = {
        suite: toyworld.worst(
            [row.shares[suite] for row in rows if suite in row.shares]
        )
        for suite in suites
    }
    highest = {
        name: max((row.look[name] for row in rows), key=lambda e: e.value)
        for name in (FVD_TOY, FVD_TOY_LIMIT)
        if all(name in row.look for row in rows)
    }
    return Row(WORST, shares=shares, look=highest)


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows, and the clips that a report shows.

    Attributes:
      rows: in the order of the tables.
      videos: row -> suite -> clips, of the rows that the report shows.
      reference: SHA-256 over the reference clips of FVD-toy.
    """

    rows: list[Row]
    videos: dict[str, Mapping[str, Sequence[np.ndarray | None]]]
    reference: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model's clips are compared with; the same for all of its checkpoints.

    Attributes:
      rows: name -> scores of all kinds of clips except the model's.
      videos: row -> suite -> clips, of the rows that the report shows.
      features_nd: of other ground truth clips of the same prompts; None if too short.
      digest: SHA-256 over those clips.
    """

    rows: dict[str, Row]
    videos: dict[str, make_clips.Videos]
    features_nd: np.ndarray | None
    digest: str


def make_reference(
    material: samples.Material,
    clips: shards.Shards,
    tier: str,
    network: networks.ToyFeatures,
    vae: trained_vae.LoadedVAE | None,
) -> Reference:
    """Makes and scores the clips that a model's clips are compared with.

    Args:
      material: prompts, and clips of untrained weights if there are any.
      clips: the training set.
      tier: the toy world's tier.
      network: features for FVD-toy.
      vae: the model's video VAE; None leaves reconstructions out.
    """
    suites, untrained = material.suites, material.videos.get(UNTRAINED, {})
    drawn = {s.name: make_clips.matching_scenes(s, tier=tier, seed=0) for s in suites}
    videos = {GROUND_TRUTH: make_clips.render_scenes(drawn)}
    main = [suite for suite in suites if not suite.held_out]
    others = make_clips.render_scenes(
        {s.name: make_clips.matching_scenes(s, tier=tier, seed=1) for s in main}
    )
    if vae is not None:
        videos[RECONSTRUCTION] = make_clips.reconstruct(vae, videos[GROUND_TRUTH])
    shown = dict(videos)
    videos[NEAREST] = make_clips.nearest_training_clips(suites, clips)
    found = {name: judge(name, suites, clips_of) for name, clips_of in videos.items()}
    if untrained:
        few = [s.head(len(untrained[s.name])) for s in suites if s.name in untrained]
        found[UNTRAINED] = judge(UNTRAINED, few, untrained)
    features_nd = None
    if main:
        features_nd = _look_at_all(found, videos, drawn, network, others)
    return Reference(found, shown, features_nd, _digest(others))


def score(
    material: samples.Material, reference: Reference, network: networks.ToyFeatures
) -> Result:
    """Scores the model's clips; returns them with the rows of the reference.

    Args:
      material: prompts and clips.
      reference: of the same prompts.
      network: features for FVD-toy.
    """
    suites = material.suites
    model = {n: clips for n, clips in material.videos.items() if n.startswith(MODEL)}
    found = {name: judge(name, suites, clips) for name, clips in model.items()}
    other = [toyworld.permuted(suite) for suite in suites]
    shuffled = judge(SHUFFLED, other, next(iter(model.values())))
    if not all(suite.held_out for suite in suites):
        for name, clips in model.items():
            found[name] = look(found[name], clips, network, reference.features_nd)
    if len(model) > 1:
        found[WORST] = worst_row([found[name] for name in model])
    found |= {SHUFFLED: shuffled} | reference.rows
    order = [GROUND_TRUTH, RECONSTRUCTION, *model, WORST, UNTRAINED, SHUFFLED, NEAREST]
    order += [name for name in found if name not in order]
    shown = dict(list(model.items())[:1]) | reference.videos
    return Result(
        [found[name] for name in order if name in found], shown, reference.digest
    )


def _look_at_all(found, videos, drawn, network, others) -> np.ndarray | None:
    """Adds video quality to each row, and rows of spoilt ground truth.

    Returns the features of other ground truth clips; None if they are too short.
    """
    others_nthwc, reference_nd = pooled(others), None
    if others_nthwc.shape[1] >= network.num_frames:
        reference_nd = network(others_nthwc)
    else:
        row = found[GROUND_TRUTH]
        note = (
            f"FVD-toy needs {network.num_frames} frames, the clips have "
            f"{others_nthwc.shape[1]}"
        )
        found[GROUND_TRUTH] = dataclasses.replace(row, notes=(*row.notes, note))
    kinds = dict(videos)
    spoilt = controls.make(pooled(videos[GROUND_TRUTH]))
    kinds |= {f"{GROUND_TRUTH}, {name}": {"all": v} for name, v in spoilt.items()}
    scenes = [s for suite in drawn if _is_main(suite) for s in drawn[suite]]
    exact = make_clips.exact_motion(scenes)
    for name, clips_of in kinds.items():
        row = found.get(name, Row(name))
        found[name] = look(row, clips_of, network, reference_nd)
        if name in (GROUND_TRUTH, RECONSTRUCTION):
            known = f"{name}, exact flow"
            found[known] = look(Row(known), clips_of, network, reference_nd, exact)
    return reference_nd


def _digest(videos: make_clips.Videos) -> str:
    result = hashlib.sha256()
    for suite in videos:
        result.update(np.ascontiguousarray(videos[suite]).tobytes())
    return result.hexdigest()


def manifest(
    material: samples.Material,
    result: Result,
    network: networks.ToyFeatures,
    fps: float,
) -> protocol.Manifest:
    """Returns the protocol of a result."""
    by_suite = next(iter(result.videos.values()))
    clips = (clip for members in by_suite.values() for clip in members)
    frames, height, width, _ = next(clip.shape for clip in clips if clip is not None)
    return protocol.Manifest(
        num_samples={suite.name: len(suite) for suite in material.suites},
        num_frames=frames,
        height=height,
        width=width,
        fps=fps,
        resize=network.resize,
        feature_weights=network.sha256,
        reference=result.reference,
        seeds=material.seeds,
        prompts=protocol.text_digest(t for s in material.suites for t in s.texts),
        codec=material.codec,
        **material.making,
    )
