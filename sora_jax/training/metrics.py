"""Metrics of a run: one JSON object a line, and where the time went."""

import json
import math
import pathlib
import time
from collections.abc import Mapping

import numpy as np


class MetricsFile:
    """Appends rows to `metrics.jsonl`; after a restart, rows beyond the step go.

    Args:
      path: the file.
      start_step: the step that the run goes on from; later rows were lost with the
        work that they describe, and would show twice.
      write: False on all processes but one.
    """

    def __init__(self, path: pathlib.Path, *, start_step: int, write: bool):
        self._file = None
        if not write:
            return
        kept = [row for row in read(path) if row["step"] <= start_step]
        self._file = open(path, "w", buffering=1)
        for row in kept:
            self._file.write(json.dumps(row) + "\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; numbers that are not finite become null."""
        if self._file is None:
            return
        row = {"step": step}
        for name, value in values.items():
            row[name] = value if math.isfinite(value) else None
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: pathlib.Path) -> list[dict]:
    """Reads a metrics file; a half-written last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off by a crash in the middle of a write
    return rows


def means(
    metrics: Mapping[str, tuple], names: Mapping[str, list[str]]
) -> dict[str, float]:
    """Divides sums by weights; vectors become one `name/entry` each, empty ones none."""
    result = {}
    for name, (total, weight) in metrics.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        if total.ndim == 0:
            result[name] = float(total / weight)
            continue
        for entry, part, share in zip(names[name], total, weight, strict=True):
            if share > 0:
                result[f"{name}/{entry}"] = float(part / share)
    return result


class Accumulator:
    """Adds (sum, weight) pairs over the steps between two rows."""

    def __init__(self):
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, metrics: Mapping[str, tuple]) -> None:
        for name, (total, weight) in metrics.items():
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (
                old[0] + np.asarray(total, np.float64),
                old[1] + np.asarray(weight, np.float64),
            )

    def take(self, names: Mapping[str, list[str]]) -> dict[str, float]:
        """Returns the means and starts anew."""
        result = means(self._sums, names)
        self._sums = {}
        return result


class Chrono:
    """Splits wall time into buckets: with chrono("data"): ...; survives restarts."""

    def __init__(self, seconds: Mapping[str, float] | None = None):
        self.seconds = dict(seconds or {})
        self._name, self._since = None, 0.0

    def __call__(self, name: str) -> "Chrono":
        self._name, self._since = name, time.perf_counter()
        return self

    def __enter__(self) -> "Chrono":
        return self

    def __exit__(self, *exception) -> None:
        spent = time.perf_counter() - self._since
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
