"""Control tables: every temporal metric of clips and of their spoilt copies.

    table = control_tables.build(video_nthwc, fps=8)
    print(table.as_text())

Each step of a metric's chains is tested by the 95 % bootstrap interval of the difference
of two rows; a resample draws the same clips from both. The table names the controls that
beat the clips, and for each control the metrics that expose it.

Letters: n clips, t frames, h height, w width, c channels, d features, r resamples.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.core import paths
from sora_jax.evals import statistics
from sora_jax.evals.metrics import controls, distances, long_video, temporal_metrics
from sora_jax.evals.metrics.temporal_metrics import GIVEN, Clips, Metric, SetMetric

# One frame is dropped, and the step across the seam is not among the others.
LEAST_FOR_SEAMS = long_video.LEAST_OTHERS + 3
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a chain: by how much a row is better than the next.

    It holds if the whole interval is above zero.
    """

    metric: str
    better: str
    worse: str
    gap: statistics.Estimate

    @property
    def holds(self) -> bool:
        return self.gap.low > 0

    def to_json(self) -> dict[str, Any]:
        gap = {"gap": self.gap.value, "low": self.gap.low, "high": self.gap.high}
        return vars(self) | gap


@dataclasses.dataclass(frozen=True)
class Table:
    """A control table.

    Attributes:
      title, count: what the clips are, and their number.
      cells: metric -> row -> value; None where the row is too short for the metric.
      steps: all steps of the chains.
      not_asked: metric -> why its orders cannot hold on these clips.
      winners: metric -> controls that beat the clips beyond the interval, except those
        that a chain ranks above them.
      given_away: control -> metrics on which the clips beat it beyond the interval.
      notes: metric -> what it does not see.
    """

    title: str
    count: int
    cells: Mapping[str, Mapping[str, statistics.Estimate | None]]
    steps: tuple[Step, ...]
    not_asked: Mapping[str, str]
    winners: Mapping[str, tuple[str, ...]]
    given_away: Mapping[str, tuple[str, ...]]
    notes: Mapping[str, str]

    @property
    def broken(self) -> tuple[Step, ...]:
        """The steps that do not hold."""
        return tuple(step for step in self.steps if not step.holds)

    def to_json(self) -> dict[str, Any]:
        """Returns the table as JSON values."""
        cells = {
            metric: {row: cell and cell.to_json() for row, cell in by_row.items()}
            for metric, by_row in self.cells.items()
        }
        steps = [step.to_json() for step in self.steps]
        more = {"cells": cells, "steps": steps, "broken": len(self.broken)}
        return vars(self) | more

    def as_text(self) -> str:
        """Returns the table in Markdown, one row per metric, and which steps hold."""
        rows = list(next(iter(self.cells.values())))
        lines = [
            f"{self.title}, {self.count} clips",
            "",
            "| metric | " + " | ".join(rows) + " |",
            "|---" * (len(rows) + 1) + "|",
        ]
        for metric, by_row in self.cells.items():
            cells = " | ".join(_cell_text(by_row[row]) for row in rows)
            lines.append(f"| {metric} | {cells} |")
        lines.append("")
        for metric in self.cells:
            said = [
                f"{s.better} {'before' if s.holds else '!NOT BEFORE!'} {s.worse}"
                for s in self.steps
                if s.metric == metric
            ]
            if metric in self.not_asked:
                said.append(f"order not tested: {self.not_asked[metric]}")
            if self.winners[metric]:
                said.append(f"won by {', '.join(self.winners[metric])}")
            if self.notes[metric]:
                said.append(f"({self.notes[metric]})")
            lines.append(f"- {metric}: " + "; ".join(said))
        lines += ["", "Metrics that expose each control:"]
        lines += [
            f"- {control}: {', '.join(metrics) or '!NONE!'}"
            for control, metrics in self.given_away.items()
        ]
        return "\n".join(lines)


def _cell_text(cell: statistics.Estimate | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.value:.3g} ({cell.low:.2g}..{cell.high:.2g})"


def build(
    video_nthwc: np.ndarray,
    *,
    fps: float,
    title: str = "clips",
    kind: str = "",
    one_way: bool = False,
    reference: temporal_metrics.Reference | None = None,
    metrics: Sequence[Metric] = temporal_metrics.METRICS,
    sets: Sequence[SetMetric] = temporal_metrics.SETS,
    names: Sequence[str] = tuple(controls.CONTROLS),
    seed: int = 0,
    num_resamples: int = 400,
) -> Table:
    """Measures clips and their controls, and tests the orders.

    Args:
      video_nthwc: uint8, 2 clips or more of `controls.LEAST_FRAMES` frames or more.
      fps: frames per second.
      title: of the table.
      kind: what the clips are, for `Metric.cannot`, such as "camera".
      one_way: whether all clips move in the same direction.
      reference: for set metrics, and not resampled; None leaves them out. Their orders
        are not tested with fewer clips than features, where most of a Frechet distance
        is its bias.
      metrics: metrics with a value per clip. The seam score is left out for clips of
        fewer than `LEAST_FOR_SEAMS` frames.
      sets: metrics of the whole set.
      names: the controls.
      seed: of controls and resamples.
      num_resamples: of the bootstrap; set metrics, which are slow, get a quarter.

    Raises:
      ValueError: too few clips or frames.
    """
    if len(video_nthwc) < 2 or video_nthwc.shape[1] < controls.LEAST_FRAMES:
        raise ValueError(
            f"a control table needs 2 clips of {controls.LEAST_FRAMES} frames or more, "
            f"got shape {video_nthwc.shape}"
        )
    if video_nthwc.shape[1] < LEAST_FOR_SEAMS:
        metrics = [one for one in metrics if one.name != temporal_metrics.SEAM]
    seam, count = controls.seam_of(video_nthwc.shape[1]), len(video_nthwc)
    draws_rn = np.random.default_rng(seed).integers(0, count, (num_resamples, count))
    sets = sets if reference else ()
    found = {metric.name: {} for metric in (*metrics, *sets)}
    # One row at a time, since its motion takes more memory than its clips.
    for name in (GIVEN, *names):
        video = video_nthwc
        if name != GIVEN:
            video = controls.make(video_nthwc, names=[name], seed=seed)[name]
        clips = Clips(video, fps, [seam])
        for metric in metrics:
            values_n = metric.values(clips)
            row = float(values_n.mean()), values_n[draws_rn].mean(1)
            found[metric.name][name] = row
        for metric in sets:
            described = metric.describe(clips, reference.network)
            found[metric.name][name] = described
    builder = _Builder(title, count, kind)
    for metric in metrics:
        builder.add(metric, found[metric.name], metric.orders, higher=metric.higher)
    for metric in sets:
        orders = metric.orders + (metric.one_way if one_way else ())
        rows, size = _distances(
            metric, found[metric.name], reference, draws_rn[: num_resamples // 4]
        )
        few = (
            f"{count} clips are fewer than the {size} features" if count < size else ""
        )
        builder.add(metric, rows, orders, higher=False, why_not=few)
    return builder.table()


def _distances(metric, described, reference, draws_rn):
    """Returns row -> (Frechet distance, that of each resample), and the feature size."""
    reference_nd = metric.describe(reference.clips, reference.network)
    if reference_nd is None:
        raise ValueError(f"the reference clips are too short for {metric.name}")
    found = {}
    for name, features_nd in described.items():
        found[name] = features_nd is not None and (
            distances.frechet(features_nd, reference_nd),
            distances.frechet_of_draws(features_nd, reference_nd, draws_rn),
        )
    return found, reference_nd.shape[1]


class _Builder:
    """Builds a table, metric by metric.

    A row is a pair (value, values [r] on resamples); all rows have the same resamples.
    It is False where there is no value.
    """

    def __init__(self, title: str, count: int, kind: str):
        self._title, self._count, self._kind = title, count, kind
        self._cells, self._winners, self._notes = {}, {}, {}
        self._steps: list[Step] = []
        self._given_away: dict[str, list[str]] = {}
        self._not_asked: dict[str, str] = {}

    def add(self, metric, rows, orders, *, higher: bool, why_not: str = "") -> None:
        sign = 1 if higher else -1

        def step(better: str, worse: str) -> Step:
            (first, first_r), (second, second_r) = rows[better], rows[worse]
            gap, gap_r = sign * (first - second), sign * (first_r - second_r)
            found = statistics.from_resamples(gap_r, gap)
            if abs(gap) <= _ROUNDING * max(abs(first), abs(second)):
                # Within the rounding of a sum.
                found = dataclasses.replace(found, low=min(found.low, 0.0))
            return Step(metric.name, better, worse, found)

        self._cells[metric.name] = {
            name: statistics.from_resamples(row[1], row[0]) if row else None
            for name, row in rows.items()
        }
        self._notes[metric.name] = metric.note
        present = {name for name, row in rows.items() if row}
        if why_not := metric.cannot.get(self._kind, why_not):
            self._not_asked[metric.name] = why_not
            orders = ()
        above = {
            name
            for chain in orders
            if GIVEN in chain
            for name in chain[: chain.index(GIVEN)]
        }
        for chain in orders:
            ranked = [name for name in chain if name in present]
            self._steps += [step(*pair) for pair in itertools.pairwise(ranked)]
        spoilt = [name for name in rows if name != GIVEN and name in present]
        self._winners[metric.name] = tuple(
            name for name in spoilt if name not in above and step(name, GIVEN).holds
        )
        for name in rows:
            if name != GIVEN:
                exposing = self._given_away.setdefault(name, [])
                if name in present and step(GIVEN, name).holds:
                    exposing.append(metric.name)

    def table(self) -> Table:
        given_away = {name: tuple(found) for name, found in self._given_away.items()}
        return Table(
            self._title,
            self._count,
            self._cells,
            tuple(self._steps),
            self._not_asked,
            self._winners,
            given_away,
            self._notes,
        )


def write(tables: Sequence[Table], out: pathlib.Path) -> None:
    """Writes controls.json and controls.md into a folder."""
    content = json.dumps([table.to_json() for table in tables], indent=1) + "\n"
    paths.write_atomically(out / "controls.json", content)
    text = "\n\n".join(table.as_text() for table in tables) + "\n"
    paths.write_atomically(out / "controls.md", text)
