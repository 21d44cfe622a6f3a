"""Turns scores into the figures, tables, videos and charts of a report.

Letters: t frames, h height, w width, c channels.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.evals import statistics
from sora_jax.evals.html import charts, page
from sora_jax.evals.prompts import scoring, toyworld
from sora_jax.evals.prompts.scoring import Row
from sora_jax.training import metrics

# (suite, part) -> the share that the model of the quickstart should reach.
BARS = {
    ("motion", "colour"): 0.97,
    ("motion", "direction"): 0.95,
    ("relation", "side"): 0.90,
}
_STATED = {"prompts": "the prompt states", "clips": "is true of their scenes"}
_LOOK_DIGITS = {scoring.FVD_TOY: 4, scoring.FVD_TOY_LIMIT: 3}
_LOOK_NOTE = (
    "FVD-toy: Frechet distance of the state network's features to those of other ground "
    "truth clips, at this number of clips and extrapolated; comparable only under the same "
    "protocol. Sharpness: mean gradient of the luminance (full scale per pixel); noise "
    "raises it too, so compare it with the reconstructions', whose scenes have the same "
    "prompts. Flicker and warping error are means along the motion (full scale = 1). A "
    "still video has neither, so read them beside the motion (pixels per frame) and the "
    "share of pixels that could be tracked."
)


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as JSON values: everything under "rows", and flat values under "scores"."""
    scores = {}
    for row in rows:
        for suite, shares in row.shares.items():
            for part, share in shares.items():
                scores[f"{row.name}/{suite}/{part}"] = share.value
        for name, estimate in row.look.items():
            scores[f"{row.name}/{name}"] = estimate.value
    return {
        "rows": {
            row.name: {
                "suites": {
                    suite: {part: _share_json(s) for part, s in shares.items()}
                    for suite, shares in row.shares.items()
                },
                "look": {n: e.to_json() for n, e in row.look.items()},
            }
            for row in rows
        },
        "scores": scores,
    }


def _share_json(share: statistics.Estimate) -> dict[str, Any]:
    right = round(share.value * share.count)
    return {"right": right, "count": share.count} | share.to_json()


def from_json(
    found: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, list]]
) -> list[Row]:
    """Reads back what `to_json` has under "rows"; the verdicts are given by row."""

    def estimate(fields: Mapping[str, Any]) -> statistics.Estimate:
        names = ("value", "low", "high", "count")
        return statistics.Estimate(*map(fields.get, names))

    return [
        Row(
            name,
            verdicts.get(name, {}),
            {
                suite: {part: estimate(share) for part, share in parts.items()}
                for suite, parts in row["suites"].items()
            },
            {name: estimate(fields) for name, fields in row["look"].items()},
        )
        for name, row in found.items()
    ]


def model_row(rows: Sequence[Row]) -> Row | None:
    """The row of the model's worst seed, or of its only seed; None if there is no such row."""
    of_model = [row for row in rows if row.name.startswith(scoring.MODEL)]
    worst = [row for row in of_model if row.name == scoring.WORST]
    return next(iter(worst + of_model), None)


def marks(row: Row, suite: str, number: int) -> dict[str, bool]:
    """Whether each part of a clip is right."""
    verdict = row.verdicts[suite][number]
    return {part: ok for part, ok in verdict.items() if part != toyworld.PASS}


def entries(
    suites: Sequence[toyworld.Suite],
    videos: Mapping[str, Mapping[str, Sequence[np.ndarray | None]]],
    rows: Sequence[Row],
    fps: float,
    *,
    shown: int = 6,
    failed: int = 3,
) -> list[page.Entry]:
    """The first prompts of each suite, then some of its failures, with their clips.

    Args:
      suites: the prompts.
      videos: row -> suite -> clips; failures are those of the first row.
      rows: their scores.
      fps: frames a second.
      shown, failed: how many prompts of each kind.
    """
    by_name = {row.name: row for row in rows}
    first = next(iter(videos))

    def entry(suite: toyworld.Suite, number: int, group: str) -> page.Entry:
        clips = []
        for row, by_suite in videos.items():
            frames_thwc = by_suite[suite.name][number]
            if frames_thwc is not None:
                right = marks(by_name[row], suite.name, number)
                label = row.removeprefix("VAE ")
                clips.append(page.Clip.encode(label, frames_thwc, fps, right))
        return page.Entry(suite.prompts[number].text, group, clips)

    found = []
    for suite in suites:
        title = suite.name.replace("_", " ").capitalize()
        head = range(min(shown, len(suite)))
        found += [entry(suite, number, title) for number in head]
        wrong = [
            number
            for number, verdict in enumerate(by_name[first].verdicts[suite.name])
            if not verdict[toyworld.PASS] and number >= shown
        ][:failed]
        found += [entry(suite, number, f"{title}: failures") for number in wrong]
    return found


def verdict_lines(
    rows: Sequence[Row], suites: Sequence[toyworld.Suite]
) -> Iterator[str]:
    """One JSON line per clip and row: its prompt and which parts are right."""
    texts = {suite.name: suite.texts for suite in suites}
    for row in rows:
        if row.name == scoring.SHUFFLED:
            continue  # not the clip's own prompt
        for suite, verdicts in row.verdicts.items():
            for text, verdict in zip(texts[suite], verdicts, strict=False):
                clip = {"row": row.name, "suite": suite, "prompt": text}
                yield json.dumps(clip | {"right": verdict})


# -- tables ----------------------------------------------------------------------------


def tables(
    rows: Sequence[Row],
    suites: Sequence[toyworld.Suite],
    strong: Sequence[str] | None = None,
) -> list[page.Table]:
    """One table per suite, and one of video quality; by default the model is highlighted."""
    if strong is None:
        strong = [row.name for row in (model_row(rows),) if row]
    found = [suite_table(rows, s.name, len(s), strong) for s in suites]
    looked = [row for row in rows if row.look]
    if looked:
        names = list(dict.fromkeys(name for row in looked for name in row.look))
        digits = {name: _LOOK_DIGITS.get(name, 3) for name in names}
        lines = [
            (row.name, [page.Cell.of(row.look.get(n), digits=digits[n]) for n in names])
            for row in looked
        ]
        found.append(page.Table("Video quality", _LOOK_NOTE, names, lines, strong))
    return found


def suite_table(
    rows: Sequence[Row],
    suite: str,
    size: int,
    strong: Sequence[str] = (),
    unit: str = "prompts",
) -> page.Table:
    """What the oracle finds in the clips of a suite of `size` prompts or clips."""
    members = [row for row in rows if suite in row.shares]
    parts = list(dict.fromkeys(part for row in members for part in row.shares[suite]))
    parts.sort(key=lambda part: part == toyworld.PASS)
    note = (
        f"Share of clips in which the oracle finds what {_STATED[unit]}, with 95 % "
        "Wilson intervals; what is not found counts as wrong. pass: all parts at once."
    )
    if any("side" in row.shares[suite] for row in members):
        note += " side: the signed side, for which both colours must be found."
    lines = [
        (row.name, [page.Cell.of(row.shares[suite].get(p), bar=True) for p in parts])
        for row in members
    ]
    title = f"{suite.replace('_', ' ').capitalize()}: {size} {unit}"
    return page.Table(title, note, parts, lines, strong)


def figures(rows: Sequence[Row], seeds: Sequence[int]) -> list[page.Figure]:
    """The scores that have a bar, for the worst seed, beside ceiling and chance."""
    by_name = {row.name: row for row in rows}
    model = model_row(rows)
    found = []
    for (suite, part), bar in BARS.items():
        share = model.shares.get(suite, {}).get(part) if model else None
        if share is None:
            continue
        notes = [f"{share.count} prompts"]
        if len(seeds) > 1:
            notes.append(f"worst of seeds {', '.join(map(str, seeds))}")
        for row, label in (
            (scoring.RECONSTRUCTION, "ceiling"),
            (scoring.SHUFFLED, "chance"),
        ):
            other = by_name.get(row, Row("")).shares.get(suite, {}).get(part)
            if other:
                notes.append(f"{label} {other.value:.3f}")
        title = f"{suite.capitalize()}: {part}"
        found.append(page.Figure(title, page.Cell.of(share), bar, " · ".join(notes)))
    return found


# -- training curves -------------------------------------------------------------------


def training_charts(folder: pathlib.Path) -> list[page.Chart]:
    """The curves of a run folder's metrics: its loss, by noise level where logged, and PSNR."""
    series: dict[str, tuple[list, list]] = {}
    for row in metrics.read(folder / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                points = series.setdefault(name, ([], []))
                points[0].append(row["step"])
                points[1].append(value)
    losses = {name: points for name, points in series.items() if name == "loss"}
    bands = {
        f"τ {name.partition('/')[2].replace('-', '–')}": points
        for name, points in series.items()
        if name.startswith("loss_band/")
    }
    run, found = folder.resolve().name, []
    if bands:
        found.append(
            _chart(
                f"{run}: loss by noise level",
                "Mean squared error of the velocity, by the noise level τ of the sample "
                "(1 is pure noise).",
                dict(sorted(bands.items())) | {"all": losses.get("loss", ([], []))},
                "loss",
                log=True,
            )
        )
    elif losses:
        found.append(_chart(f"{run}: loss", "", losses, "loss", log=True))
    if "psnr" in series:
        note = "On training clips, decoded from sampled latents, not from their means."
        chosen = {"psnr": series["psnr"]}
        found.append(_chart(f"{run}: reconstruction", note, chosen, "PSNR, dB"))
    return found


def _chart(title: str, note: str, series: Mapping, y_label: str, *, log=False):
    svg = charts.line_chart(
        {name: points for name, points in series.items() if points[0]},
        label=title,
        x_label="step",
        y_label=y_label,
        log_y=log,
    )
    return page.Chart(title, note, svg)
