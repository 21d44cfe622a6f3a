"""The work of `evaluate --videos`: measures a folder of videos, alone or against another.

    options = folder_report.Options(reference="real", clip="clip-vit-base-patch32")
    print(folder_report.run("clips", "out", options))

Each clip is measured by itself (`clip_measures`), the set against the reference
(`folder_distances`), and a few clips beside spoilt copies (`control_tables`). Without a
reference there are no distances. OUT gets scores.json, clips.jsonl and report.html, and
with controls also controls.json and controls.md.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.core import paths, progress
from sora_jax.evals import protocol, statistics
from sora_jax.evals.html import page
from sora_jax.evals.metrics import agreement, control_tables
from sora_jax.evals.videos import (
    clip_files,
    clip_measures,
    feature_sets,
    folder_controls,
    folder_distances,
    folder_page,
    published,
)

_OF_DISTANCES = ("protocol", "features", "weights", "save_statistics", "batch_size")
_OF_MEASURES = ("clip", "chunk_frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the job; None is not set.

    Attributes:
      reference: another folder, or a file of statistics; None: no distances.
      protocol: name of a published protocol.
      features, weights: the network of the distances, and the folder of its weights.
      num_frames, stride, num_clips: see `published.Settings`, `clip_measures.Settings`.
      batch_size: clips per batch of the feature network.
      save_statistics: file for the statistics of the reference.
      force: see `folder_distances.measure` and `feature_sets.save`.
      distances_only: do not measure each clip by itself.
      clip: folder of CLIP's weights, for agreement with captions.
      chunk_frames, fps, colour: see `clip_measures.Settings`.
      controls: make a control table.
    """

    reference: str | None = None
    protocol: str | None = None
    features: str | None = None
    weights: str | None = None
    num_frames: int | None = None
    stride: int | None = None
    num_clips: int | None = None
    batch_size: int | None = None
    save_statistics: str | None = None
    force: bool = False
    distances_only: bool = False
    clip: str | None = None
    chunk_frames: int | None = None
    fps: float | None = None
    colour: str | None = None
    controls: bool = False

    def __post_init__(self):
        if not self.reference:
            self._refuse(_OF_DISTANCES, "need --reference, a folder to compare with")
        if self.distances_only:
            self._refuse(
                _OF_MEASURES, "concern single clips, which --distances_only leaves out"
            )
            if not self.reference and not self.controls:
                raise ValueError(
                    "--distances_only leaves nothing to do without --reference"
                )

    def _refuse(self, names, why: str) -> None:
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)} {why}")

    def measures(self) -> clip_measures.Settings:
        """Returns how single clips are measured."""
        if self.distances_only and not self.controls:
            return clip_measures.Settings()
        asked = ("num_clips", "num_frames", "stride", "chunk_frames", "fps", "colour")
        given = {name: getattr(self, name) for name in asked}
        given = {name: value for name, value in given.items() if value is not None}
        return clip_measures.Settings(**given)


OPTIONS = tuple(field.name for field in dataclasses.fields(Options))


@dataclasses.dataclass(frozen=True)
class Report:
    """The measures of a folder.

    Attributes:
      folders: set -> its folder; "videos" and, if there is one, "reference".
      settings: how single clips were measured.
      sets: set -> measures of its single clips; empty with --distances_only.
      distances: between the sets; None without a reference.
      controls: the control table; None without --controls.
      protocol: how everything was measured, as JSON values.
      failures: one sentence for each clip or file that could not be used.
      notes: one sentence for everything that the numbers leave out or hide.
      seconds: run time.
    """

    folders: Mapping[str, str]
    settings: clip_measures.Settings
    sets: Mapping[str, clip_measures.Set]
    distances: folder_distances.Distances | None
    controls: control_tables.Table | None
    protocol: dict[str, Any]
    failures: list[str]
    notes: list[str]
    seconds: float

    def estimates(self) -> Iterator[tuple[str, str, statistics.Estimate]]:
        """Yields set, measure and mean of all measures that are defined."""
        for side, of in self.sets.items():
            for name in clip_measures.MEASURES:
                if (found := of.estimate(name)) is not None:
                    yield side, name, found

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns set -> number of clips that were found, used in distances, measured."""
        found = {side: dict(of) for side, of in self._of_distances().items()}
        for side, of in self.sets.items():
            base = {"found": of.found, "failed": len(of.failures)}
            named = (clip_measures.STILL, clip_measures.JUMPS)
            flags = {
                clip_measures.MEASURES[name].key: int(of.flagged(name))
                for name in named
            }
            found[side] = (
                base | found.get(side, {}) | {"measured": len(of.clips)} | flags
            )
        return found

    def _of_distances(self) -> Mapping[str, Mapping[str, int]]:
        return self.distances.counts if self.distances else {}


def run(videos: str, out: str, options: Options) -> str:
    """Measures a folder and writes the report; returns the text to print.

    Raises:
      FileNotFoundError, ValueError: nothing can be measured, or options contradict each
        other; in one sentence.
    """
    report = measure(videos, options)
    if options.save_statistics:
        file = pathlib.Path(options.save_statistics)
        feature_sets.save(file, report.distances.reference, force=options.force)
    return write(pathlib.Path(out), report)


def measure(videos: str, options: Options) -> Report:
    """Measures a folder; see `run`."""
    began, folders = time.monotonic(), {"videos": str(videos)}
    if options.reference:
        folders["reference"] = str(options.reference)
    settings, distances = options.measures(), None
    clip = agreement.Agreement(options.clip) if options.clip else None
    if options.reference:
        distances = _distances(folders, options)
    failures = list(distances.failures) if distances else []
    notes = list(distances.notes) if distances else []
    sets = {}
    for side, folder in () if options.distances_only else folders.items():
        if pathlib.Path(folder).is_file():
            notes.append(f"{side}: a file of statistics, without clips to measure")
            continue
        sets[side], more = _clips(pathlib.Path(folder), settings, clip)
        failures += [f"{side}: {s}" for s in (*sets[side].failures, *more)]
        notes += [f"{side}: {s}" for s in sets[side].notes]
        notes += _of_captions(side, sets[side], clip)
    notes += _unlike(sets)
    table = None
    if options.controls:
        try:
            table, more = folder_controls.measure(pathlib.Path(videos), settings)
        except ValueError as error:
            if not (sets or distances):
                raise
            more = [f"left out: {error}"]
        notes += [f"controls: {sentence}" for sentence in more]
    manifest = dict(distances.protocol) if distances else {"published": None}
    if sets:
        manifest["measures"] = settings.to_json(clip)
    return Report(
        folders,
        settings,
        sets,
        distances,
        table,
        manifest,
        list(dict.fromkeys(failures)),
        list(dict.fromkeys(notes)),
        time.monotonic() - began,
    )


def _distances(folders, options: Options) -> folder_distances.Distances:
    asked = ("features", "num_frames", "stride", "num_clips")
    given = {name: getattr(options, name) for name in asked}
    settings = published.resolve(options.protocol, given)
    network = published.open_network(
        settings, options.protocol, options.weights, options.batch_size
    )
    return folder_distances.measure(
        *map(pathlib.Path, folders.values()),
        settings,
        network,
        name=options.protocol,
        force=options.force,
        colour=options.colour,
    )


def _clips(folder, settings, clip):
    """Measures the clips of a folder; returns also captions that could not be read."""
    found, captions = clip_files.find(folder, settings.colour), None
    if clip:
        names = [source.name for source in found.sources]
        captions = agreement.read_captions(folder, names)
    total = min(len(found.sources), settings.most_clips)
    try:
        with progress.Progress(total, "measure", "clips") as bar:
            measured = clip_measures.measure(
                found, settings, captions=captions, clip=clip, tell=bar.update
            )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return measured, captions.failures if captions else ()


def _of_captions(side: str, of: clip_measures.Set, clip) -> Iterator[str]:
    texts = [one.caption for one in of.clips if one.caption is not None]
    if clip and (count := clip.too_long(texts)):
        yield (
            f"{side}: {count} of {len(texts)} captions have more tokens than CLIP reads "
            "and are truncated"
        )
    above = of.estimate(clip_measures.ABOVE)
    if above and (above.low is None or above.low <= 0):
        yield (
            f"{side}: agreement with captions is not significantly above that with other "
            "captions, so it does not show that the clips match their captions"
        )


def _unlike(sets: Mapping[str, clip_measures.Set]) -> Iterator[str]:
    """Yields notes on differences between the sets other than their content."""
    if len(sets) < 2:
        return
    for what, affected in (("frames", "repetition and drift"), ("fps", "every step")):
        medians = [
            float(np.median([getattr(one, what) for one in of.clips]))
            for of in sets.values()
        ]
        if medians[0] != medians[1]:
            yield (
                f"the median clip has {medians[0]:g} {what}, that of the reference "
                f"{medians[1]:g}: this alone changes {affected}"
            )


def write(out: pathlib.Path, report: Report) -> str:
    """Writes the files; returns the scores as text.

    All of scores.json except "facts" is the same for the same clips.
    """
    digest, distances = protocol.digest(report.protocol), report.distances
    facts = page.facts() | {"Seconds": round(report.seconds, 1)}
    estimates = dict(distances.scores) if distances else {}
    means = {}
    for side, name, found in report.estimates():
        key = clip_measures.MEASURES[name].key
        estimates[f"{side}/{key}"] = found
        means[f"{side}/{key}"] = found.count
    content = {
        "protocol": report.protocol,
        "digest": digest,
        "published": distances and distances.published,
        "counts": report.counts(),
        "scores": {name: one.value for name, one in estimates.items()},
        "intervals": {
            name: [one.low, one.high]
            for name, one in estimates.items()
            if one.low is not None
        },
        "clips_in_mean": means,
        "failures": report.failures,
        "notes": report.notes,
        "facts": facts,
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    paths.write_atomically(out / "scores.json", text)
    lines = [
        json.dumps({"set": side} | one.to_json(), allow_nan=False) + "\n"
        for side, of in report.sets.items()
        for one in of.clips
    ]
    paths.write_atomically(out / "clips.jsonl", "".join(lines))
    if report.controls:
        control_tables.write([report.controls], out)
    html = folder_page.make(
        report.folders,
        report.settings,
        report.sets,
        distances,
        report.controls,
        protocol=report.protocol | {"digest": digest},
        facts=facts,
        failures=[*report.failures, *report.notes],
    )
    paths.write_atomically(out / "report.html", html)
    return _as_text(out, report, digest)


def _as_text(out: pathlib.Path, report: Report, digest: str) -> str:
    lines, distances = [], report.distances
    for name, one in distances.scores.items() if distances else ():
        interval = "" if one.low is None else f"  [{one.low:.6g}, {one.high:.6g}]"
        mine = (distances.published or {}).get("score") == name
        theirs = f"  <- {distances.published['protocol']}" if mine else ""
        lines.append(f"{name:20}{one.value:.6g}{interval}{theirs}")
    if report.sets:
        lines += ["", page.as_text([folder_page.measures_table(report.sets)]), ""]
    if report.controls:
        lines += ["", report.controls.as_text(), ""]
    for side, of in report.counts().items():
        if "used" in of:
            lines.append(f"{side}: {of['used']} of {of['found']} clips are used")
        if "measured" in of:
            lines.append(
                f"{side}: {of['measured']} of {of['found']} clips are measured, "
                f"{of['still']} of them still"
            )
    lines += [f"not used: {sentence}" for sentence in report.failures]
    lines += [f"note: {sentence}" for sentence in report.notes]
    files = f"{out / 'scores.json'}, {out / 'report.html'}"
    return "\n".join([*lines, f"protocol {digest[:16]}; {files}"]).lstrip("\n")
