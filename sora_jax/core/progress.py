"""One line that says how far a job is and how long it will still take."""

import contextlib
import os
import sys
import time


def clock(seconds: float) -> str:
    """Formats a duration as 42s, 3m10s or 2h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Shows done/total, rate and time remaining; a context manager.

    On a terminal the line is rewritten in place a few times a second; elsewhere (logs,
    CI) a new line is printed every `every` seconds and at the end. Only the process
    with index 0 prints.

    The rate is that of the units after the first update, whose time is mostly that of
    compiling; so there is none before the second.

    Args:
      total: how many units there are.
      label: what is being done, such as "train".
      unit: plural name of the unit, such as "clips".
      start: units that were done before this run (a resumed job); they do not count
        in the rate.
      every: seconds between lines where the output is not a terminal.
      process_index: this process among several.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "",
        *,
        start: int = 0,
        every: float = 15.0,
        process_index: int = 0,
    ):
        self.total, self.label, self.unit = total, label, unit
        self.start = self.done = start
        self.fields: dict[str, str] = {}
        self._quiet = process_index != 0
        self._tty = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._every = 0.2 if self._tty else every
        self._began = self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None  # when, and what was done by then

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._print(last=True)

    def update(self, n: int = 1, **fields: object) -> None:
        """Counts `n` more units as done and shows `fields` behind the bar."""
        self.done += n
        if n and self._first is None:
            self._first = time.monotonic(), self.done
        for name, value in fields.items():
            self.fields[name] = f"{value:.4g}" if isinstance(value, float) else value
        if time.monotonic() - self._printed >= self._every:
            self._print()

    def line(self) -> str:
        """Returns the text of the line as it stands now."""
        now = time.monotonic()
        since, before = self._first or (now, self.done)
        rate = (self.done - before) / (now - since) if now > since else 0.0
        parts = [f"{self.label}: {self.done}/{self.total} {self.unit}".rstrip()]
        if rate > 0:
            parts.append(f"{rate:.4g}/s")
            if self.done < self.total:
                parts.append(f"{clock((self.total - self.done) / rate)} left")
        parts.append(f"{clock(now - self._began)} so far")
        parts += [f"{name} {value}" for name, value in self.fields.items()]
        return ", ".join(parts)

    def _print(self, last: bool = False) -> None:
        self._printed = time.monotonic()
        if self._quiet:
            return
        before, after = ("\r\x1b[K", "\n" * last) if self._tty else ("", "\n")
        with contextlib.suppress(OSError):  # a log file on a full disk, a closed pipe
            sys.stderr.write(before + self.line() + after)
            sys.stderr.flush()
