"""Metrics of a run, one JSON object a line, and how its time was spent."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from sora_jax.core import paths


class MetricsFile:
    """Appends rows to `metrics.jsonl`.

    A resumed run first drops the rows of steps that it will take again, by replacing the
    file.

    Args:
      path: the file.
      start_step: the step that the run is resumed from; rows of later steps are dropped.
      write: False on all processes but one.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, *, start_step: int, write: bool):
        self._path, self._file = path, None
        if not write:
            return
        content = path.read_bytes() if path.is_file() else b""
        rows = [row for row in _rows(content) if row["step"] <= start_step]
        lines = "".join(map(_line, rows)).encode()
        if lines != content:
            paths.write_atomically(path, lines)
        self._file = open(path, "ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; numbers that are not finite become null.

        Raises:
          OSError: the row could not be written; the file is left without it.
        """
        if self._file is None:
            return
        row = {"step": step}
        for name, value in values.items():
            row[name] = value if math.isfinite(value) else None
        line, end = _line(row).encode(), self._file.tell()
        try:
            while line:  # a disk that is nearly full takes a part of it first
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line(row: Mapping) -> str:
    return json.dumps(row) + "\n"


def read(path: pathlib.Path) -> list[dict]:
    """Reads a metrics file; lines truncated by a crash are left out."""
    return _rows(path.read_bytes()) if path.is_file() else []


def _rows(content: bytes) -> list[dict]:
    rows = []
    for line in content.decode(errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def means(
    metrics: Mapping[str, tuple], names: Mapping[str, list[str]]
) -> dict[str, float]:
    """Divides sums by weights; NaN for a scalar of weight 0.

    A vector gives one value `name/entry` for each entry whose weight is not 0.
    """
    result = {}
    for name, (total, weight) in metrics.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        if total.ndim == 0:
            result[name] = float(total / weight) if weight else math.nan
            continue
        for entry, part, share in zip(names[name], total, weight, strict=True):
            if share > 0:
                result[f"{name}/{entry}"] = float(part / share)
    return result


class Accumulator:
    """Adds up (sum, weight) pairs over the steps between two rows.

    Values that are not finite are left out of the means.
    """

    def __init__(self):
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._not_finite = 0  # steps

    def add(self, metrics: Mapping[str, tuple]) -> None:
        complete = True
        for name, (total, weight) in metrics.items():
            total, weight = (np.asarray(x, np.float64) for x in (total, weight))
            finite = np.isfinite(total) & np.isfinite(weight)
            complete &= bool(finite.all())
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (
                old[0] + np.where(finite, total, 0.0),
                old[1] + np.where(finite, weight, 0.0),
            )
        self._not_finite += not complete

    def take(self, names: Mapping[str, list[str]]) -> dict[str, float]:
        """Returns the means and resets the sums.

        `steps_not_finite` counts the steps with a value that was left out, if any.
        """
        result = means(self._sums, names)
        if self._not_finite:
            result["steps_not_finite"] = self._not_finite
        self._sums, self._not_finite = {}, 0
        return result


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Collects the seconds of each part of a compilation inside of the block."""
    found: list[float] = []

    def listen(event: str, seconds: float, **about: object) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Chrono:
    """Splits wall time into named buckets: `with chrono("data"): ...`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._name, self._since = None, 0.0

    def __call__(self, name: str) -> "Chrono":
        self._name, self._since = name, time.perf_counter()
        return self

    def __enter__(self) -> "Chrono":
        return self

    def __exit__(self, *exception) -> None:
        spent = time.perf_counter() - self._since
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
