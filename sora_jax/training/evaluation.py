"""What measures a run on the way: where it fails, the run goes on."""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax

from sora_jax.core import paths
from sora_jax.training import state as states

ERROR_FILE = "evaluation_error.txt"


class Evaluator(Protocol):
    """Measures a state; the same class runs in training and in `evaluate.py`."""

    def run(self, params: dict) -> Iterator[tuple[str, float]]:
        """Yields names and values for the averaged weights of a step."""


class Failed(Exception):
    """An evaluator failed.

    Attributes:
      state: that of the finished run, which is saved; None where it is not finished.
    """

    def __init__(self, sentence: str, state: states.TrainState | None = None):
        super().__init__(sentence)
        self.state = state


class Evaluation:
    """Runs evaluators, and tells of those that fail.

    One that fails in one process of several leaves the others in a computation that
    they share, so there the run ends; else it goes on.

    Args:
      evaluators: by name.
      folder: where the traceback of the newest failure is written, in ERROR_FILE.

    Attributes:
      failure: a sentence on what failed at the newest step, "" where nothing did.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], folder: pathlib.Path):
        self._evaluators, self._folder, self.failure = evaluators, folder, ""

    def run(self, step: int, params: Mapping) -> Iterator[dict[str, float]]:
        """Yields the values of each evaluator, as `name/value`.

        Raises:
          Failed: one of them failed, and there are other processes.
        """
        self.failure = ""
        for name, evaluator in self._evaluators.items():
            try:
                values = dict(evaluator.run(params))
            except Exception as error:
                self._note(name, step, error)
                continue
            yield {f"{name}/{key}": value for key, value in values.items()}

    def _note(self, name: str, step: int, error: Exception) -> None:
        lines = str(error).strip().splitlines() or ["no reason given"]
        file = self._folder / ERROR_FILE
        self.failure = (
            f"evaluator {name!r} failed at step {step} ({type(error).__name__}: "
            f"{lines[0][:300]}; {file} has the traceback)"
        )
        text = f"{self.failure}\n\n{''.join(traceback.format_exception(error))}"
        with contextlib.suppress(OSError):
            paths.write_atomically(file, text)
        if jax.process_count() > 1:
            raise Failed(self.failure) from error
        print(f"train: {self.failure}; the run goes on", file=sys.stderr)
