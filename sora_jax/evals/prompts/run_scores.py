"""Scores checkpoints of a run, stores the scores of each and reports on all of them.

    OUT/steps/001000/   scores.json, clips.jsonl, report.html and parts of one checkpoint
    OUT/report.html     prompts by checkpoint, scores by checkpoint, curves over steps
    OUT/scores.json     of the newest checkpoint, as OUT/clips.jsonl is

Letters: n clips, t frames, h height, w width, c channels.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sora_jax.core import digests, paths
from sora_jax.evals import protocol
from sora_jax.evals.html import charts, page
from sora_jax.evals.prompts import (
    checkpoints,
    results,
    samples,
    scoring,
    summary,
    toyworld,
)

SHOWN = 4  # prompts per suite
COLUMNS = 12  # checkpoints whose videos are shown, first and last included


@dataclasses.dataclass(frozen=True)
class Point:
    """The stored scores of a checkpoint.

    Attributes:
      step: its step.
      rows: its scores and those of baselines.
      scores: the content of its scores.json.
    """

    step: int
    rows: list[scoring.Row]
    scores: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"step {self.step:,}"

    @property
    def row(self) -> scoring.Row:
        """The model's row, named after the step."""
        return dataclasses.replace(summary.model_row(self.rows), name=self.name)


class RunScores:
    """Scores checkpoints of a run and stores the scores.

    Args:
      out: the folder.
      sampling: makes the clips.
      scorer: scores them.

    Attributes:
      only: the steps that the report shows, by default all that were scored.
    """

    def __init__(
        self, out: pathlib.Path, sampling: checkpoints.Sampling, scorer: results.Scorer
    ):
        self.out, self.only = out, None
        self._sampling, self._scorer = sampling, scorer
        self._skipped: list[str] = []

    @functools.cached_property
    def _key(self) -> str:
        # Scores that were made with another key do not count.
        made_with = self._sampling.made_with() | self._scorer.made_with()
        return protocol.digest(made_with)

    def score(self, steps: Iterable[int]) -> None:
        """Scores steps in order, and writes the report after each.

        All processes score the steps of the first one.

        Raises:
          ValueError: no step could be scored.
        """
        text = None
        every = checkpoints.on_every_process(iter(steps))
        with contextlib.closing(every):  # other processes wait for its end
            for step in every:
                saved = self._sampling.saved(step)
                try:
                    material = self._sampling.material(step, self.parts(step))
                except (FileNotFoundError, checkpoints.Unreadable) as error:
                    self.skip(str(error))
                    continue
                if jax.process_index() == 0:
                    self.add(step, self._scorer.score(material), saved)
                    print(_line(self.point(step)), flush=True)
                    text = self.write()
        if jax.process_index() == 0:
            text = text or self.write()
            print(f"\n{text}\n\n{self.out / 'scores.json'}, {self.out / 'report.html'}")

    def skip(self, sentence: str) -> None:
        """Reports that a checkpoint is skipped, now and on the page."""
        if jax.process_index() == 0:
            print(f"evaluate: {sentence}", file=sys.stderr)
        self._skipped.append(sentence)

    def folder(self, step: int) -> pathlib.Path:
        """Where the scores of a step are stored."""
        return self.out / "steps" / f"{step:06d}"

    def parts(self, step: int) -> pathlib.Path:
        """Where the clips of a step are stored."""
        return self.folder(step) / "parts"

    def has(self, step: int) -> bool:
        """Whether the step was scored before with the same settings.

        A checkpoint that was deleted since is taken to be the one that was scored.
        """
        return self._scores(step) is not None

    def steps(self) -> list[int]:
        """The scored steps, oldest first."""
        found = (int(f.name) for f in self.out.glob("steps/*") if f.name.isdigit())
        return sorted(filter(self.has, found))

    def _scores(self, step: int) -> dict | None:
        try:
            scores = json.loads(digests.read(self.folder(step) / "scores.json"))
            digests.check(self.folder(step) / "clips.jsonl")
            same = scores["made_with"] == self._key
            saved = self._sampling.saved(step)
            return scores if same and saved in (None, scores["saved"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, step: int, evaluation: results.Evaluation, saved: str | None) -> None:
        """Stores the scores of a step and writes its report.

        Args:
          step: the step.
          evaluation: its scores.
          saved: identifies the checkpoint of that step, see `Sampling.saved`.
        """
        store = samples.Store(self.parts(step))
        videos = {
            f"{row}/{suite}": np.stack(clips[:SHOWN])
            for row, by_suite in evaluation.result.videos.items()
            for suite, clips in by_suite.items()
        }
        # scores.json is written last: a step counts as scored once it exists.
        (self.folder(step) / "scores.json").unlink(missing_ok=True)
        store.get("shown", self._of(step, saved), lambda: videos)
        more = {"made_with": self._key, "saved": saved}
        evaluation.write(self.folder(step), more)

    def _of(self, step: int, saved: str | None) -> dict[str, Any]:
        return {"key": self._key, "step": step, "saved": saved}

    def point(self, step: int) -> Point:
        """Reads the scores of a step for which `has` is true."""
        scores, folder = self._scores(step), self.folder(step)
        verdicts: dict[str, dict[str, list]] = {}
        for line in (folder / "clips.jsonl").read_text().splitlines():
            clip = json.loads(line)
            by_suite = verdicts.setdefault(clip["row"], {})
            by_suite.setdefault(clip["suite"], []).append(clip["right"])
        return Point(step, summary.from_json(scores["rows"], verdicts), scores)

    def shown(self, point: Point) -> samples.Parts:
        """Reads row/suite -> clips of the first prompts, uint8 [n, t, h, w, 3]."""
        key = self._of(point.step, point.scores["saved"])
        return samples.Store(self.parts(point.step)).find("shown", key) or {}

    def write(self) -> str:
        """Writes the report on the scored steps; returns its tables as text.

        Raises:
          ValueError: no step was scored.
        """
        steps = [s for s in self.steps() if self.only is None or s in self.only]
        if not steps:
            raise ValueError(f"no checkpoint of {self._sampling.folder} was scored")
        points = [self.point(step) for step in steps]
        runs, suites = self._scorer.runs, self._sampling.suites
        newest, seeds = points[-1], points[-1].scores["protocol"]["seeds"]
        for name in ("clips.jsonl", "scores.json"):
            digests.copy(self.folder(newest.step) / name, self.out / name)
        rows = _by_step(points)
        tables = summary.tables(rows, suites, strong=[newest.name])
        html = page.render(
            title=f"{runs.name}: evaluation by checkpoint",
            facts=self._sampling.facts(*steps) | page.facts(),
            figures=[
                dataclasses.replace(one, note=f"{newest.name} · {one.note}")
                for one in summary.figures(newest.rows, seeds)
            ],
            entries=_entries(points, self.shown, suites, self._scorer.fps),
            in_columns=True,
            tables=tables,
            charts=[*_curves(points, seeds), *runs.charts()],
            failures=[*self._skipped, *newest.scores["failures"]],
            config=runs.config,
            differences=runs.differences(),
            protocol=newest.scores["protocol"] | {"digest": newest.scores["digest"]},
        )
        paths.write_atomically(self.out / "report.html", html)
        return page.as_text(tables)


def _line(point: Point) -> str:
    """The scores of a step in one line."""
    shares = (
        f"{suite}/{part} {share.value:.3f} ({share.low:.3f}..{share.high:.3f})"
        for suite, parts in point.row.shares.items()
        for part, share in parts.items()
    )
    return f"{point.name}: {', '.join(shares)}"


def _by_step(points: Sequence[Point]) -> list[scoring.Row]:
    """The newest checkpoint's rows, with one row per step in place of the model's."""
    model = [row.name.startswith(scoring.MODEL) for row in points[-1].rows]
    first = model.index(True)
    others = [r for r, own in zip(points[-1].rows, model, strict=True) if not own]
    return [*others[:first], *(point.row for point in points), *others[first:]]


def _entries(
    points: Sequence[Point],
    read: Callable[[Point], samples.Parts],
    suites: Sequence[toyworld.Suite],
    fps: float,
) -> list[page.Entry]:
    """The first prompts of each suite: one clip per checkpoint, then the references.

    Clips of at most `COLUMNS` checkpoints are read, however many were scored.
    """
    chosen = np.linspace(0, len(points) - 1, min(COLUMNS, len(points))).round()
    columns = [(point, read(point)) for point in (points[int(i)] for i in chosen)]
    newest, newest_shown = points[-1], columns[-1][1]
    found = []
    for suite in suites:
        for number, text in enumerate(suite.texts[:SHOWN]):
            clips = []
            for point, shown in columns:
                row = next(r for r in point.rows if r.name.startswith(scoring.MODEL))
                clips.append(_clip(shown, row, suite.name, number, fps, point.name))
            for row in newest.rows:
                if row.name in (scoring.RECONSTRUCTION, scoring.GROUND_TRUTH):
                    name = row.name.removeprefix("VAE ")
                    clips.append(
                        _clip(newest_shown, row, suite.name, number, fps, name)
                    )
            title = suite.name.replace("_", " ").capitalize()
            found.append(page.Entry(text, title, [c for c in clips if c]))
    return found


def _clip(shown: samples.Parts, row, suite: str, number: int, fps: float, label: str):
    if f"{row.name}/{suite}" not in shown:
        return None
    frames_thwc = shown[f"{row.name}/{suite}"][number]
    marks = summary.marks(row, suite, number)
    return page.Clip.encode(label, frames_thwc, fps, marks)


def _curves(points: Sequence[Point], seeds: Sequence[int]) -> list[page.Chart]:
    """One chart per suite, and one of FVD-toy, over training steps."""
    whose = f" Worst of seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else ""
    found = []
    for suite in points[-1].row.shares:
        by_step = [(p.step, p.row.shares.get(suite, {})) for p in points]
        title = f"{suite.replace('_', ' ').capitalize()} by checkpoint"
        note = f"Share of clips that are right, with 95 % Wilson intervals.{whose}"
        found.append(_curve(title, note, by_step, "share right"))
    by_step = [
        (p.step, {scoring.FVD_TOY: p.row.look.get(scoring.FVD_TOY)}) for p in points
    ]
    note = f"Lower is better; the band is the 95 % bootstrap interval.{whose}"
    if all(values[scoring.FVD_TOY] for _, values in by_step):
        title = f"{scoring.FVD_TOY} by checkpoint"
        found.append(_curve(title, note, by_step, scoring.FVD_TOY))
    return found


def _curve(title: str, note: str, by_step, y_label: str) -> page.Chart:
    lines, bands = {}, {}
    for name in dict.fromkeys(name for _, values in by_step for name in values):
        known = [(step, values[name]) for step, values in by_step if name in values]
        steps = [step for step, _ in known]
        lines[name] = steps, [estimate.value for _, estimate in known]
        bands[name] = tuple(
            (steps, [getattr(estimate, end) for _, estimate in known])
            for end in ("low", "high")
        )
    svg = charts.line_chart(
        lines, label=title, x_label="step", y_label=y_label, log_y=False, bands=bands
    )
    return page.Chart(title, note, svg)
