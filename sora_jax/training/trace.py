"""Traces some steps of a run with JAX's profiler."""

import pathlib
import sys

import jax


class Trace:
    """Traces steps into `folder`; a context manager that ends an open trace.

    Args:
      folder: where the trace is written.
      steps: from `steps.start` to `steps.stop`, inclusive; None: no trace. Steps before
        a resume or after the end of the run are left out.
      start: the step that the run is resumed from, or 0.
      num_steps: the run's last step.
    """

    def __init__(
        self, folder: pathlib.Path, steps: range | None, start: int, num_steps: int
    ):
        self._folder, self._open = folder, False
        self._first = self._last = 0
        if steps is None:
            return
        self._first = max(steps.start, start + 1)
        self._last = min(steps.stop, num_steps)
        if self._first > self._last:
            _say(
                f"steps {steps.start} to {steps.stop} are not traced: this run takes "
                f"steps {start + 1} to {num_steps}"
            )
            self._first = self._last = 0

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if `step`, which is about to run, is its first."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def is_last(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._open and step == self._last

    def after(self, step: int) -> None:
        """Ends the trace if `step`, which has run, is its last."""
        if self.is_last(step):
            self._stop()

    def _stop(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:  # such as a full disk; not worth ending the run
            _say(f"the trace could not be written: {str(error).splitlines()[0]}")


def _say(sentence: str) -> None:
    if jax.process_index() == 0:
        print(f"train: {sentence}", file=sys.stderr)
