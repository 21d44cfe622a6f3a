"""Evaluators, which measure a run while it trains; a run survives their failures."""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax

from sora_jax.core import paths
from sora_jax.training import state as states


class Evaluator(Protocol):
    """Measures a state; the same class runs in training and in `evaluate.py`."""

    def run(self, params: dict, step: int) -> Iterator[tuple[str, float]]:
        """Yields names and values, if any, for the averaged weights of a step."""


class Failed(Exception):
    """An evaluator failed.

    Attributes:
      state: of the finished run, which is saved; None if the run is not finished.
    """

    def __init__(self, sentence: str, state: states.TrainState | None = None):
        super().__init__(sentence)
        self.state = state


class Evaluation:
    """Runs evaluators and reports those that fail.

    A run of one process continues after a failure. A run of several processes ends,
    because the other processes wait for this one in a collective computation.

    Args:
      evaluators: by name.
      folder: `evaluation_error.txt` is written here, with the traceback of the newest
        failure; each of several processes has its own file, as later failures would
        otherwise hide the first.

    Attributes:
      failure: one sentence about the failure at the newest step; "" if there was none.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], folder: pathlib.Path):
        several = jax.process_count() > 1
        number = f"_{jax.process_index()}" if several else ""
        self._file = folder / f"evaluation_error{number}.txt"
        self._evaluators, self.failure = evaluators, ""

    def run(self, step: int, params: Mapping) -> Iterator[dict[str, float]]:
        """Yields the values of each evaluator, as `name/value`.

        Raises:
          Failed: an evaluator failed, and the run has several processes.
        """
        self.failure = ""
        for name, evaluator in self._evaluators.items():
            try:
                values = dict(evaluator.run(params, step))
            except Exception as error:
                self._note(name, step, error)
                continue
            if values:
                yield {f"{name}/{key}": value for key, value in values.items()}

    def _note(self, name: str, step: int, error: Exception) -> None:
        lines = str(error).strip().splitlines() or ["no reason given"]
        self.failure = (
            f"evaluator {name!r} failed at step {step} ({type(error).__name__}: "
            f"{lines[0][:300]}; {self._file} has the traceback)"
        )
        text = f"{self.failure}\n\n{''.join(traceback.format_exception(error))}"
        with contextlib.suppress(OSError):
            paths.write_atomically(self._file, text)
        if jax.process_count() > 1:
            raise Failed(
                f"{self.failure}; the other processes wait for this one, so the run "
                "ends here; its state is saved, and the same command continues it"
            ) from error
        print(f"train: {self.failure}; the run continues", file=sys.stderr)
