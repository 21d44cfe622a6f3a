"""The report page of a folder of videos: clips side by side, tables, charts, worst clips.

Clips are read again for the page instead of being kept in memory. They are shown downscaled,
and only their first frames.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.evals import statistics
from sora_jax.evals.html import charts, page
from sora_jax.evals.metrics import control_tables
from sora_jax.evals.videos import clip_files, clip_measures, folder_distances

_SHORT_SIDE, _FRAMES = 192, 96  # of clips on the page
_FIRST, _WORST = 6, 3
# Measures that have a strip chart, and those whose worst clips are shown.
_STRIPS = (
    "dynamic degree",
    "smoothness",
    "warping error",
    "subject consistency",
    "repetition",
    clip_measures.ABOVE,
)
_WORST_OF = (
    "warping error",
    "smoothness",
    "repetition",
    clip_measures.SEAM,
    clip_measures.ABOVE,
)
_NOTE = (
    "Means over clips with 95 % bootstrap intervals (Wilson intervals for shares), and the "
    "number of clips in each mean. Still clips are left out of the measures of steadiness, "
    "which they would win: read the share of still clips first. For the difference each "
    "set is resampled separately (shares have Newcombe intervals); where its interval "
    "contains zero, the sets cannot be told apart."
)


def measures_table(sets: Mapping[str, clip_measures.Set]) -> page.Table:
    """The mean of each measure per set, their difference, and what the measure misses."""
    names = list(sets)
    columns = [column for name in names for column in (name, "clips")]
    both = len(names) > 1
    rows, remarks = [], {"": "what it does not see"}
    for name, measure in clip_measures.MEASURES.items():
        found = [of.estimate(name) for of in sets.values()]
        if not any(found):
            continue
        cells = [cell for one in found for cell in _cells(one)]
        if both:
            cells.append(_cells(clip_measures.difference(*sets.values(), name))[0])
        label = f"{name} ({measure.better})" if measure.better else name
        rows.append((label, cells))
        remarks[label] = measure.note
    columns += ["difference"] if both else []
    return page.Table("Measures of single clips", _NOTE, columns, rows, remarks=remarks)


def _cells(one: statistics.Estimate | None) -> list[page.Cell]:
    count = one.count if one else 0
    return [page.Cell.of(one, digits=3), page.Cell(count, digits=4)]


def make(
    folders: Mapping[str, str],
    settings: clip_measures.Settings,
    sets: Mapping[str, clip_measures.Set],
    distances: folder_distances.Distances | None,
    controls: control_tables.Table | None,
    *,
    protocol: Mapping[str, Any],
    facts: Mapping[str, Any],
    failures: Sequence[str],
) -> str:
    """Returns the page as HTML; see `folder_report.Report` for what it shows."""
    tables = [measures_table(sets)] if sets else []
    if distances:
        tables.append(_distances_table(distances))
    if controls:
        tables.append(_controls_table(controls))
    first = {side.capitalize(): folder for side, folder in folders.items()}
    clips = {f"Clips of {side}": len(of.clips) for side, of in sets.items()}
    return page.render(
        title=f"{pathlib.Path(folders['videos']).resolve().name}: videos",
        facts=first | clips | dict(facts),
        entries=_entries(settings, sets),
        tables=tables,
        charts=_charts(sets),
        charts_title="Clip by clip",
        failures=failures,
        protocol=protocol,
    )


def _distances_table(distances: folder_distances.Distances) -> page.Table:
    theirs = distances.published or {}
    rows = [
        (name, [page.Cell.of(one, digits=5)]) for name, one in distances.scores.items()
    ]
    note = "Of the whole set, on features, with 95 % bootstrap intervals."
    if theirs:
        note += f" {theirs['score']} is the score of {theirs['protocol']}."
    strong = [theirs["score"]] if theirs else []
    return page.Table("Distances to the reference", note, ["value"], rows, strong)


def _controls_table(table: control_tables.Table) -> page.Table:
    columns = list(next(iter(table.cells.values())))
    rows, remarks = [], {"": "order"}
    for metric, by_row in table.cells.items():
        cells = [page.Cell.of(by_row.get(column), digits=3) for column in columns]
        rows.append((metric, cells))
        wrong = [s for s in table.broken if s.metric == metric]
        said = [f"{step.better} does not rank above {step.worse}" for step in wrong]
        if table.winners[metric]:
            said.append(f"won by {', '.join(table.winners[metric])}")
        remarks[metric] = "; ".join(said) or "as expected"
    nothing = [name for name, found in table.given_away.items() if not found]
    note = (
        f"The same {table.count} clips, unchanged and degraded ({table.title}), with 95 % "
        "bootstrap intervals. A measure that a degraded clip wins cannot be read alone. "
    )
    note += (
        f"No measure detects: {', '.join(nothing)}."
        if nothing
        else "Each degradation is detected by some measure."
    )
    return page.Table("Controls", note, columns, rows, remarks=remarks)


def _charts(sets: Mapping[str, clip_measures.Set]) -> list[page.Chart]:
    found = []
    for name in _STRIPS:
        groups = {side: of.values(name).tolist() for side, of in sets.items()}
        if any(groups.values()):
            measure = clip_measures.MEASURES[name]
            title = f"{name} ({measure.better} is better)" if measure.better else name
            svg = charts.strip_chart(groups, label=name)
            note = "One dot per clip; the bar is the mean."
            if measure.moving:
                note += " Still clips are left out."
            found.append(page.Chart(title.capitalize(), note, svg))
    return found


def _entries(settings, sets: Mapping[str, clip_measures.Set]) -> list[page.Entry]:
    """The first clips of each set, then the worst clips of each measure."""
    chosen = {"Clips": {side: [*of.clips[:_FIRST]] for side, of in sets.items()}}
    for name in (clip_measures.STILL, clip_measures.JUMPS, *_WORST_OF):
        best = 0.0 if clip_measures.MEASURES[name].better == "less" else None
        chosen[f"Worst: {name}"] = {
            side: [one for one in of.worst(name, _WORST) if one.values[name] != best]
            for side, of in sets.items()
        }
    entries = []
    for group, by_side in chosen.items():
        name = group.partition(": ")[2]
        for side, ones in by_side.items():
            clips = [_clip(one, settings, name) for one in ones]
            if clips := [clip for clip in clips if clip]:
                entries.append(page.Entry(side, group, clips, wide=True))
    return entries


_small = functools.partial(clip_measures.shrink, short_side=_SHORT_SIDE)


def _clip(one: clip_measures.Measured, settings, name: str) -> page.Clip | None:
    """A clip, labelled with its value; None if its file can no longer be read."""
    reader = clip_files.Reader(min(one.frames, _FRAMES), settings.stride, shrink=_small)
    try:
        video_thwc = reader(one.source).video_thwc
    except clip_files.UnusableClip:
        return None
    h, w = (side // 2 * 2 for side in video_thwc.shape[1:3])  # what a player takes
    valued = name and not clip_measures.MEASURES[name].share
    said = [f"{one.values[name]:.3g}"] if valued else []
    said += [one.name, f"{one.frames} frames of {one.size[1]} x {one.size[0]}"]
    said += [one.caption] if one.caption else []
    return page.Clip.encode("; ".join(said), video_thwc[:, :h, :w], one.fps)
