"""The report page of a curation: what each rule refused, scores, clips kept and refused.

Clips are read again from the input, and shown downscaled, with their first frames only.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.core import digests, paths
from sora_jax.data import records, samples
from sora_jax.data.curation import curated, report, stages
from sora_jax.evals.html import charts, page
from sora_jax.evals.videos import clip_measures

_KEPT, _REFUSED = 12, 6  # clips that are shown: of those kept, and of each rule
_SHORT_SIDE, _FRAMES = 128, 48  # of a clip on the page
_VALUES = 20_000  # of a histogram, at most


def write(path: pathlib.Path, source: curated.CuratedClips) -> list[str]:
    """Writes the page of a finished folder; returns lines for the terminal."""
    summary = json.loads(digests.read(source.out / curated.SUMMARY))
    lines = digests.read(source.out / curated.DECISIONS).splitlines()
    clips = [json.loads(line) for line in lines]
    paths.write_atomically(path, make(source, summary, clips))
    return [*report.lines(summary), f"{path}: what was kept and refused"]


def make(
    source: curated.CuratedClips,
    summary: Mapping[str, Any],
    clips: Sequence[Mapping[str, Any]],
) -> str:
    """Returns the page as HTML.

    Args:
      source: what was curated.
      summary: the content of curation.json.
      clips: the lines of decisions.jsonl, in the order of the input.
    """
    return page.render(
        title=f"{source.out.resolve().name}: curation",
        facts={
            "Input": ", ".join(str(folder.folder) for folder in source.folders),
            "Clips": summary["clips"],
            "Kept": summary["kept"],
            "Policy": "filters" if summary["policy"]["filter"] else "only scores",
        },
        entries=_entries(source, summary, clips),
        tables=[_rules(summary), *_licences(summary)],
        charts=_charts(summary, clips),
        charts_title="Distributions",
        failures=_failures(summary, clips),
        config=json.dumps(summary["policy"], indent=1),
    )


def _rules(summary: Mapping[str, Any]) -> page.Table:
    note = (
        "In the order of the rules. Alone: clips that no other rule speaks against. Left: "
        "clips that this rule and those above it leave."
    )
    rows = [("input", [page.Cell(None), page.Cell(None), _count(summary["clips"])])]
    for rule, of in summary["refused"].items():
        rows.append((rule, [_count(of[name]) for name in ("clips", "alone", "left")]))
    return page.Table("Rules", note, ["against", "alone", "left"], rows)


def _licences(summary: Mapping[str, Any]) -> list[page.Table]:
    rows = [
        (licence or "none stated", [_count(count)])
        for licence, count in summary["licences_kept"].items()
    ]
    return (
        [page.Table("Licences of the kept clips", "", ["clips"], rows)] if rows else []
    )


def _count(number: int) -> page.Cell:
    return page.Cell(number, digits=12)


def _charts(summary, clips: Sequence[Mapping[str, Any]]) -> list[page.Chart]:
    scored = [clip for clip in clips if clip["scores"]]
    scored = [scored[index] for index in samples.evenly(len(scored), _VALUES)]
    found = []
    for score, meaning in stages.scores_of(summary["policy"]["stages"]).items():
        groups: dict[str, list[float]] = {"kept": [], "refused": []}
        for clip in scored:
            groups["kept" if clip["kept"] else "refused"].append(clip["scores"][score])
        groups = {f"{name} ({len(of)})": of for name, of in groups.items() if of}
        limits = [*summary["policy"]["limits"].get(score, {}).values()]
        if groups:
            svg = charts.histogram(groups, label=score, marks=limits)
            found.append(page.Chart(score, f"{meaning}.".capitalize(), svg))
    return found


def _failures(summary, clips: Sequence[Mapping[str, Any]]) -> list[str]:
    damaged = [
        f"{clip['id']}: {clip['why']['damaged']}"
        for clip in clips
        if "damaged" in clip["why"]
    ]
    unused = [
        f"{name}: {entry} names no clip"
        for name, entries in summary["without_a_clip"].items()
        for entry in entries
    ]
    return [*damaged, *unused]


def _entries(source, summary, clips: Sequence[Mapping[str, Any]]) -> list[page.Entry]:
    kept = [index for index, clip in enumerate(clips) if clip["kept"]]
    shown = [page.Entry("", "Kept", _clips(source, clips, kept, _KEPT), wide=True)]
    for rule in summary["refused"]:
        of = [index for index, clip in enumerate(clips) if rule in clip["why"]]
        group = f"Against {rule}"
        shown.append(page.Entry("", group, _clips(source, clips, of, _REFUSED, rule)))
    return [entry for entry in shown if entry.clips]


def _clips(source, clips, indices: Sequence[int], most: int, rule: str = "") -> list:
    chosen = [indices[place] for place in samples.evenly(len(indices), most)]
    by_id = {clip["id"]: index for index, clip in enumerate(clips)} if rule else {}
    found = []
    for index in chosen:
        said = clips[index]["why"].get(rule, "")
        label = f"{clips[index]['id']}: {said}" if said else clips[index]["id"]
        found.append(_clip(source, index, label))
        # Beside a copy stands the clip that it is a copy of.
        original = by_id.get(said.removeprefix("it is a copy of "))
        if original is not None:
            found.append(
                _clip(source, original, f"{clips[original]['id']}, the original")
            )
    return [clip for clip in found if clip]


def _clip(source, index: int, label: str) -> page.Clip | None:
    """A clip of the input by its place; None if it is damaged."""
    for folder in source.folders:
        if index < len(folder):
            try:
                record = folder[index]
                frames_thwc = record.frames()[:_FRAMES]
            except records.CorruptRecord:
                return None
            small = [clip_measures.shrink(frame, _SHORT_SIDE) for frame in frames_thwc]
            height, width = (side // 2 * 2 for side in small[0].shape[:2])
            return page.Clip.encode(
                label, np.stack(small)[:, :height, :width], record.fps
            )
        index -= len(folder)
    raise IndexError(index)
