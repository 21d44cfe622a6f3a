"""Stopping a run on SIGTERM or Ctrl-C, at a step that all processes agree on."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

# The exit code of a job that saved its state and stopped on request: EX_TEMPFAIL of
# sysexits.h, "temporary failure, try again".
PREEMPTED_EXIT_CODE = 75


class Preempted(Exception):
    """The run saved its state and stopped because it was asked to."""


class StopRequest:
    """Remembers SIGTERM and Ctrl-C while its context is open; see `at`.

    A second Ctrl-C interrupts at once, without waiting for the end of the step.
    """

    def __init__(self):
        self._asked = False

    def __enter__(self):
        self._before = {}
        # With several processes JAX's own service listens to SIGTERM.
        if (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        ):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def at(self, step: int) -> bool:
        """Whether the run stops after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
