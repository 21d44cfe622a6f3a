"""Stopping a run when it is asked to, at a step that all processes agree on."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

# The code with which a job exits that saved and stopped because it was told to:
# "temporary failure, start me again" (sysexits.h).
PREEMPTED_EXIT_CODE = 75


class Preempted(Exception):
    """The run saved its state and stopped because it was asked to."""


class StopRequest:
    """Remembers SIGTERM or Ctrl-C; agreed on by all processes at the same step.

    A second Ctrl-C does not wait for the step.
    """

    def __init__(self):
        self._asked = False

    def __enter__(self):
        # With several processes JAX's own service listens and finds a common step.
        self._mine = (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        )
        self._before = {}
        if self._mine:
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
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
