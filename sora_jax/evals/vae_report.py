"""Measures how well a video VAE reconstructs the clips of shards, and writes a report.

    report = vae_report.measure(vae, clips, range(256), network, lpips)
    vae_report.write(out, report, vae, facts)

Every measure but rFVD-toy is of single clips. Clips that are damaged, that the VAE does not
accept, or whose reconstruction is not finite are counted and left out of the means. Where
clips carry the toy world's state, the oracle reads them before and after: what it finds in
the reconstructions is an upper bound for a denoiser on these latents.

Letters: n clips, t frames, h height, w width, c channels, d features, m voxels.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.core import paths, progress
from sora_jax.data import records, shards
from sora_jax.evals import pixels, protocol, statistics
from sora_jax.evals.features import networks
from sora_jax.evals.html import page
from sora_jax.evals.metrics import distances, reconstruction
from sora_jax.evals.prompts import scoring, summary, toyworld
from sora_jax.toyworld import oracle
from sora_jax.toyworld import scene as scenes
from sora_jax.training import perceptual, state, trained_vae

PSNR, SSIM, FLICKER, LPIPS, RFVD = "PSNR", "SSIM", "flicker", "LPIPS", "rFVD-toy"
_FIRST, _WORST = 6, 3  # clips that the report shows
_BATCH = 16
_DIGITS = {PSNR: 4, RFVD: 4}
_LABELS = ("medium", "short", "dense", "alt", "structured")  # captions, the best first
_NOTE = (
    "Means over clips with 95 % bootstrap intervals. PSNR in dB and SSIM (windows of 11 x "
    "11 pixels): higher is better. Flicker, the change over time that only one of the two "
    "has (full scale = 1), LPIPS (version 0.1), and rFVD-toy, the Frechet distance of the "
    "state network's features to those of the clips themselves: lower is better. They "
    "are comparable only under the same protocol."
)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip that the report shows, before and after the VAE: uint8 [t, h, w, c]."""

    id: str
    text: str
    fps: float
    psnr: float
    before_thwc: np.ndarray
    after_thwc: np.ndarray
    right: Mapping[str, bool]


@dataclasses.dataclass
class Report:
    """What was measured.

    Attributes:
      asked: how many clips were requested.
      values: measure -> clip's id -> value.
      verdicts: row -> family -> clip's id -> what the oracle finds, by part.
      rfvd: the Frechet distance; None if too few clips suit the feature network.
      latent: of the latent means; see `reconstruction.describe_latents`.
      failures: one sentence for each clip that is left out of the means.
      notes: one sentence for each measure that leaves clips out.
      shown: the first clips, and those of the lowest PSNR, worst first.
      protocol: how it was measured, as JSON values.
    """

    asked: int
    values: dict[str, dict[str, float]]
    verdicts: dict[str, dict[str, dict[str, dict[str, bool]]]]
    rfvd: statistics.Estimate | None
    latent: dict[str, float]
    failures: list[str]
    notes: list[str]
    shown: tuple[list[Shown], list[Shown]]
    protocol: dict[str, Any]

    def rows(self) -> list[scoring.Row]:
        """One row for the clips and one for their reconstructions."""
        look = {
            name: statistics.bootstrap_mean([*of.values()])
            for name, of in self.values.items()
        }
        if self.rfvd is not None:
            look[RFVD] = self.rfvd
        found = {scoring.GROUND_TRUTH: {}, scoring.RECONSTRUCTION: look}
        result = []
        for name, look in found.items():
            of_families = self.verdicts.get(name, {})
            shares = {
                family: toyworld.summarize([*verdicts.values()])
                for family, verdicts in sorted(of_families.items())
            }
            result.append(scoring.Row(name, shares=shares, look=look))
        return result


def measure(
    vae: trained_vae.LoadedVAE,
    clips: shards.Shards,
    chosen: Sequence[int],
    network: networks.ToyFeatures,
    lpips: reconstruction.Lpips | None = None,
) -> Report:
    """Passes clips through the VAE and measures the reconstructions.

    Args:
      vae: a VAE of this project or of diffusers.
      clips: video shards.
      chosen: indices of clips.
      network: features for rFVD-toy.
      lpips: the perceptual distance; None leaves it out.

    Raises:
      ValueError: no clip can be measured.
    """
    failures, values = [], collections.defaultdict(dict)
    verdicts = collections.defaultdict(lambda: collections.defaultdict(dict))
    pairs, means, shown, sizes = [], [], [], set()
    hashed = hashlib.sha256()
    with progress.Progress(len(chosen), "reconstruct", "clips") as bar:
        for good, before_nthwc, after_nthwc, means_nthwc in _reconstructed(
            vae, clips, chosen, failures, bar
        ):
            truth_nthwc = before_nthwc.astype(np.float32) / 255
            pair = truth_nthwc, after_nthwc
            found = {
                PSNR: reconstruction.psnr(*pair),
                SSIM: reconstruction.ssim(*pair),
                FLICKER: reconstruction.flicker(*pair),
            }
            _, t, h, w, _ = before_nthwc.shape
            if lpips and min(h, w) >= lpips.weights.config.least:
                found[LPIPS] = lpips(*pair)
            after_nthwc = pixels.to_uint8(after_nthwc)
            if t >= network.num_frames:
                pairs.append((network(before_nthwc), network(after_nthwc)))
            means.append(means_nthwc.reshape(-1, means_nthwc.shape[-1]))
            sizes.add((t, h, w))
            for number, clip in enumerate(good):
                for name, value_n in found.items():
                    values[name][clip.id] = float(value_n[number])
                before, after = before_nthwc[number], after_nthwc[number]
                right = _judge(clip, before, after, verdicts)
                hashed.update(f"{clip.id} {clip.sha256}\n".encode())
                psnr = values[PSNR][clip.id]
                text = _label(clip)
                shown.append(Shown(clip.id, text, clip.fps, psnr, before, after, right))
            shown = _to_show(shown)
    count = len(values[PSNR])
    if not count:
        failures = failures or ["none was requested"]
        raise ValueError(f"none of {len(chosen)} clips can be measured: {failures[0]}")
    rfvd, notes = _rfvd(pairs, count, network)
    if lpips and (left := count - len(values[LPIPS])):
        notes.append(
            f"{left} clips are not in {LPIPS}: {lpips.weights.config.network} needs "
            f"{lpips.weights.config.least} pixels a side"
        )
        values = {name: of for name, of in values.items() if of}
    return Report(
        asked=len(chosen),
        values=dict(values),
        verdicts={name: dict(of) for name, of in verdicts.items()},
        rfvd=rfvd,
        latent=reconstruction.describe_latents(np.concatenate(means)),
        failures=failures,
        notes=notes,
        shown=(shown[:_FIRST], sorted(shown, key=lambda s: s.psnr)[:_WORST]),
        protocol={
            "clips": hashed.hexdigest(),
            "code": protocol.code_version(
                "evals/metrics/reconstruction.py", "models/lpips.py"
            ),
            "feature_weights": network.sha256,
            "latents": "means",
            "lpips": lpips and f"{lpips.weights.config.network} {lpips.weights.sha256}",
            "num_clips": count,
            "pixels": "float32 in [0, 1]; uint8 for the oracle and rFVD-toy",
            "resize": network.resize,
            "sizes": sorted(map(list, sizes)),
        },
    )


def _reconstructed(vae, clips, chosen, failures, bar) -> Iterator[tuple]:
    """Yields batches of one size: clips, uint8 frames, reconstructions in [0, 1], means."""
    groups = collections.defaultdict(list)
    for index in chosen:
        entry = clips.entry(index)
        size = entry["num_frames"], entry["height"], entry["width"]
        groups[size].append(index)
    for size, members in groups.items():
        try:
            vae.config.latent_shape(*size)
        except ValueError as error:
            failures += [
                f"clip {clips.entry(index)['id']}: {error}" for index in members
            ]
            bar.update(len(members))
            continue
        batch = max(1, min(_BATCH, trained_vae.VOXELS_AT_ONCE // math.prod(size)))
        there_and_back = reconstruction.round_trip(vae.config, batch)
        for indices in itertools.batched(members, batch):
            good = []
            for clip in clips.read(indices):
                try:
                    if isinstance(clip, records.CorruptRecord):
                        raise clip
                    good.append((clip, clip.frames()))
                except records.CorruptRecord as error:
                    failures.append(str(error))
            bar.update(len(indices))
            if not good:
                continue
            before_nthwc = np.stack([frames for _, frames in good])
            after_nthwc, means_nthwc = there_and_back(vae.params, before_nthwc)
            kept = [
                bool(np.isfinite(after).all() and np.isfinite(mean).all())
                for after, mean in zip(after_nthwc, means_nthwc, strict=True)
            ]
            failures += [
                f"the reconstruction of clip {clip.id} is not finite"
                for (clip, _), whole in zip(good, kept, strict=True)
                if not whole
            ]
            if any(kept):
                whole = [clip for (clip, _), ok in zip(good, kept, strict=True) if ok]
                yield whole, before_nthwc[kept], after_nthwc[kept], means_nthwc[kept]


def _judge(clip, before_thwc, after_thwc, verdicts) -> dict[str, bool]:
    """Adds the oracle's verdicts on a clip with a state; returns the later ones."""
    if not clip.state_json:
        return {}
    scene = scenes.Scene.from_json(clip.state_json)
    for name, video_thwc in (
        (scoring.GROUND_TRUTH, before_thwc),
        (scoring.RECONSTRUCTION, after_thwc),
    ):
        right = oracle.score(scene, video_thwc)
        verdicts[name][scene.family][clip.id] = right
    return {part: ok for part, ok in right.items() if part != toyworld.PASS}


def _label(clip) -> str:
    there = [clip.captions[tier] for tier in _LABELS if clip.captions.get(tier)]
    return records.variants(there[0])[0] if there else clip.id


def _to_show(shown: list[Shown]) -> list[Shown]:
    """The first clips and, of the rest, the worst."""
    rest = sorted(shown[_FIRST:], key=lambda one: one.psnr)
    return shown[:_FIRST] + rest[:_WORST]


def _rfvd(pairs, count: int, network) -> tuple[statistics.Estimate | None, list[str]]:
    """The distance of the features before and after, and notes on clips it leaves out."""
    fit, notes = sum(len(before_nd) for before_nd, _ in pairs), []
    if fit < count:
        notes.append(
            f"{count - fit} clips are not in {RFVD}, which needs {network.num_frames} "
            "frames"
        )
    if fit < distances.LEAST:
        return None, [*notes, f"{RFVD} needs {distances.LEAST} clips, there are {fit}"]
    before_nd, after_nd = map(np.concatenate, zip(*pairs, strict=True))
    point = distances.frechet(after_nd, before_nd)

    def of_resample(rng):  # a clip and its reconstruction stay together
        drawn = rng.integers(0, fit, fit)
        return distances.frechet(after_nd[drawn], before_nd[drawn])

    return statistics.bootstrap(of_resample, point, num_resamples=100), notes


def run(
    clips: shards.Shards,
    network: networks.ToyFeatures,
    vae: str,
    shards_folder: str,
    out: str,
    lpips: str | None,
    num_clips: int,
) -> str:
    """Measures a video VAE on clips spread evenly over shards; returns what to print.

    Args:
      clips: the shards.
      network: features for rFVD-toy.
      vae: run folder of a VAE, or a VAE folder of diffusers.
      shards_folder: where the shards are, for the report.
      out: folder for scores and report.
      lpips: file of its weights; None skips it.
      num_clips: at most how many clips.

    Raises:
      FileNotFoundError, ValueError: an input is missing or unusable.
    """
    loaded, folder = trained_vae.load(vae), pathlib.Path(vae)
    measured = lpips and reconstruction.Lpips(perceptual.open_weights(lpips))
    count = min(num_clips, len(clips))
    chosen = [number * len(clips) // count for number in range(count)]
    found = measure(loaded, clips, chosen, network, measured)
    facts = {
        "Video VAE": vae,
        "Parameters": f"{state.count(loaded.params) / 1e6:.2f} M",
        "Shards": shards_folder,
    } | page.facts()
    title = f"{folder.resolve().name}: reconstruction"
    return write(
        pathlib.Path(out), found, title, facts, summary.training_charts(folder)
    )


def write(
    out: pathlib.Path, found: Report, title: str, facts: Mapping[str, Any], charts=()
) -> str:
    """Writes scores.json, clips.jsonl and report.html; returns what to print.

    Args:
      out: the folder.
      found: what was measured.
      title: title of the page.
      facts: what was measured, on what, when.
      charts: charts of the VAE's training.
    """
    rows_, digest = found.rows(), protocol.digest(found.protocol)
    measured = found.protocol["num_clips"]
    scores = {"protocol": found.protocol, "digest": digest, **summary.to_json(rows_)}
    scores["scores"] |= {f"latents/{name}": x for name, x in found.latent.items()}
    scores["clips"] = {
        "asked": found.asked,
        "measured": measured,
        "failed": found.asked - measured,
    }
    scores["failures"], scores["notes"] = found.failures, found.notes
    paths.write_atomically(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    right = {
        clip: verdict
        for of in _families(found).values()
        for clip, verdict in of.items()
    }
    lines = []
    for clip in found.values[PSNR]:
        line = {"clip": clip} | {
            name: of[clip] for name, of in found.values.items() if clip in of
        }
        line |= {"right": right[clip]} if clip in right else {}
        lines.append(json.dumps(line) + "\n")
    paths.write_atomically(out / "clips.jsonl", "".join(lines))
    tables = _tables(found, rows_)
    html = page.render(
        title=title,
        facts=facts | {"Clips": f"{measured} of {found.asked}"},
        entries=_entries(found),
        tables=tables,
        charts=charts,
        failures=[*found.failures, *found.notes],
        protocol=found.protocol | {"digest": digest},
    )
    paths.write_atomically(out / "report.html", html)
    lines = [f"not used: {one}" for one in (*found.failures, *found.notes)]
    files = f"{out / 'scores.json'}, {out / 'report.html'}"
    lines.append(f"{measured} of {found.asked} clips, protocol {digest[:16]}; {files}")
    return "\n\n".join([page.as_text(tables), *lines])


def _tables(found: Report, rows_: Sequence[scoring.Row]) -> list[page.Table]:
    look = rows_[-1].look
    cells = [
        page.Cell.of(one, digits=_DIGITS.get(name, 3)) for name, one in look.items()
    ]
    suites = rows_[-1].shares
    sizes = {family: len(of) for family, of in _families(found).items()}
    latent = [page.Cell(value, digits=3) for value in found.latent.values()]
    return [
        page.Table("Video quality", _NOTE, [*look], [(scoring.RECONSTRUCTION, cells)]),
        *(
            summary.suite_table(rows_, name, sizes[name], unit="clips")
            for name in suites
        ),
        page.Table(
            "Latent means",
            "What a denoiser is trained on: standard deviation of the channels, how much "
            "heavier their tails are than a normal distribution's, and how many channels "
            "hardly vary.",
            [name.replace("_", " ") for name in found.latent],
            [("all channels", latent)],
        ),
    ]


def _families(found: Report) -> Mapping[str, Mapping]:
    return found.verdicts.get(scoring.RECONSTRUCTION, {})


def _entries(found: Report) -> list[page.Entry]:
    entries = []
    for group, members in zip(("First", "Lowest PSNR"), found.shown, strict=True):
        for one in members:
            back = f"reconstruction, {one.psnr:.1f} dB"
            clips = [
                page.Clip.encode("original", one.before_thwc, one.fps),
                page.Clip.encode(back, one.after_thwc, one.fps, one.right),
            ]
            entries.append(page.Entry(one.text, group, clips))
    return entries
