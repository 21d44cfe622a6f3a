"""The progress bar of a job."""

import contextlib
import os
import sys
import threading
import time

import tqdm


class _Lines:
    """Standard error for tqdm, with a line of its own for each state of the bar."""

    _last = ""

    def write(self, text: str) -> None:
        text, before = text.strip(), self._last
        self._last = text or before
        if text and text != before:
            with contextlib.suppress(OSError):  # a log on a full disk, a closed pipe
                print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass  # `write` does


class Progress(tqdm.tqdm):
    """tqdm for jobs that compile, may resume, and may write to a log.

    The rate and the time left leave out all before the end of the first update, which is
    mostly compilation, and the units done before this run; the elapsed time does not.
    Where stderr is not a terminal, a line is printed at the start, every 15 seconds and
    at the end. Only process 0 prints.

    Args:
      total: number of units.
      label: what is being done, such as "train".
      unit: plural name of the unit, such as "clips".
      start: units done before this run, if it resumes another.
      process_index: of this process.
      compiles: say "compiling" until the first update.
    """

    monitor_interval = 0  # tqdm's thread would only redraw

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        start: int = 0,
        process_index: int = 0,
        compiles: bool = False,
    ):
        self._label = label
        self._compiled: tuple[float, int] | None = None  # time and units done by then
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        super().__init__(
            desc=f"{label}, compiling" if compiles else label,
            total=total,
            unit=f" {unit}",
            initial=start,
            file=None if terminal else _Lines(),
            mininterval=0.2 if terminal else 15.0,
            miniters=1,
            dynamic_ncols=terminal,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
            "{rate_noinv_fmt}{postfix}]",
            position=0,
            disable=process_index != 0,
        )

    def update(self, n: float = 1) -> None:
        """Counts `n` more units as done; prints where it is time to."""
        if n and not self._compiled:
            self._compiled = time.monotonic(), self.n + n
            self.set_description(self._label, refresh=False)
        super().update(n)

    def compiling(self) -> None:
        """Says that the next update has to wait for a compilation."""
        self._compiled = None
        self.set_description(f"{self._label}, compiling")

    @property
    def format_dict(self) -> dict:
        """The values of tqdm's line, with our rate."""
        now = time.monotonic()
        since, before = self._compiled or (now, self.n)
        rate = (self.n - before) / (now - since) if now > since else 0.0
        return super().format_dict | {"rate": rate}


Progress.set_lock(threading.RLock())  # tqdm's own also makes a semaphore of the system
