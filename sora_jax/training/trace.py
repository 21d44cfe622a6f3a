"""A trace of some steps of a run, for the profiler of JAX."""

import pathlib
import sys

import jax


class Trace:
    """Traces steps into `folder`; a context manager, which ends a trace that is open.

    Args:
      folder: where it is written to.
      steps: from `start` up to and with `stop`; None: none. Those that a run does not
        come to, as it goes on behind them or ends before, are left out.
      start: the step that the run goes on from.
      num_steps: its last step.
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
                f"steps {steps.start} to {steps.stop} are not traced: this run goes from "
                f"step {start + 1} to {num_steps}"
            )
            self._first = self._last = 0

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Begins the trace where `step`, which comes now, is its first."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def is_last(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._open and step == self._last

    def after(self, step: int) -> None:
        """Ends the trace where `step`, which is done, is its last."""
        if self.is_last(step):
            self._stop()

    def _stop(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:  # the run does not need it
            _say(f"the trace could not be written: {str(error).splitlines()[0]}")


def _say(sentence: str) -> None:
    if jax.process_index() == 0:
        print(f"train: {sentence}", file=sys.stderr)
