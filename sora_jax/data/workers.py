"""Runs the parts of a data job in processes whose death does not end the job.

A decoder that crashes, hangs, or asks for too much memory or time on a malformed file
costs only that file: the process names each file before it opens it, so the parent knows
which one to skip when it restarts the part.

The limit on memory holds while a file is read, see `limited_memory`: where memory is
short, everything else that a process does fails too, and is no fault of the file.
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pathlib
import resource
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

# Seconds of computing beyond `Bounds.seconds`, after which a process ends itself. The
# parent is earlier, and says why; this is for a process whose parent is gone.
_ORPHANED = 60


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What an item may use.

    Attributes:
      silence: seconds without a sign of life, after which its process is ended and the
        item is skipped.
      seconds: the same, from when the item is named to when another one is.
      memory: bytes that its process may have beyond those before it, within
        `limited_memory`; None: as many as there are. Linux only.
    """

    silence: float = 300.0
    seconds: float = math.inf
    memory: int | None = None


class Note(Protocol):
    """How a part reports its progress to the parent."""

    def __call__(self, item: str | None = None, finished: int = 0) -> None:
        """Names the next item, or counts finished ones.

        A long item is named again from time to time, as a sign of life.
        """


# task(part, note, avoid) -> result; `avoid` maps items to the reason to skip them.
Task = Callable[[int, Note, Mapping[str, str]], Any]


def run(
    task: Task,
    parts: Sequence[int],
    *,
    num_workers: int,
    on_finished: Callable[[int], None] = lambda count: None,
    bounds: Bounds = Bounds(),
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, Any]]:
    """Yields (part, task's result) for every part, in the order of completion.

    Args:
      task: a picklable, deterministic function, not of the main module.
      parts: numbers of the parts.
      num_workers: processes; 0 runs everything in this one, without bounds.
      on_finished: called with the number of items that have just been finished.
      bounds: of each item.
      preload: modules that a server process imports once. Later processes are forked from
        it, and start in hundredths of a second instead of a second or two.

    Raises:
      OSError: a task could not read or write a file.
      RuntimeError: a task failed, with its traceback; or a process died before it
        named an item.
    """
    if num_workers == 0:

        def note(item: str | None = None, finished: int = 0) -> None:
            if finished:
                on_finished(finished)

        for part in parts:
            yield part, task(part, note, {})
        return
    waiting = list(reversed(parts))
    context = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload([*preload])
    count = min(num_workers, len(parts))
    workers = [_Worker(task, bounds, context) for _ in range(count)]
    try:
        for worker in workers:
            worker.start(waiting.pop())
        while busy := [worker for worker in workers if worker.part is not None]:
            ready = multiprocessing.connection.wait(
                [worker.connection for worker in busy], timeout=1.0
            )
            for worker in busy:
                if worker.connection in ready:
                    kind, content = worker.receive()
                    if kind in ("finished", "again"):
                        on_finished(content)
                    elif kind == "result":
                        part = worker.part
                        worker.part = worker.item = None
                        if waiting:
                            worker.start(waiting.pop())
                        yield part, content
                if reason := worker.overdue():
                    on_finished(worker.replace(reason))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process, its part and its item."""

    def __init__(
        self,
        task: Task,
        bounds: Bounds,
        context: multiprocessing.context.BaseContext,
    ):
        self.task, self.bounds, self.context = task, bounds, context
        self.part: int | None = None
        self.avoid: dict[str, str] = {}
        self._spawn()

    def _spawn(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=_serve, args=(theirs, self.task, self.bounds), daemon=True
        )
        with _without_main():
            self.process.start()
        theirs.close()
        self.item: str | None = None
        self.heard = self.began = time.monotonic()

    def start(self, part: int, avoid: Mapping[str, str] | None = None) -> None:
        self.part, self.avoid, self.item = part, dict(avoid or {}), None
        self.finished = 0
        self.heard = time.monotonic()
        try:
            self.connection.send((part, self.avoid))
        except BrokenPipeError:
            raise RuntimeError("a worker process died before its first part") from None

    def overdue(self) -> str | None:
        """Returns why the item that it is at takes too long; None if it does not."""
        if self.item is None:
            return None
        now = time.monotonic()
        if now - self.heard > self.bounds.silence:
            return f"it made no progress for {self.bounds.silence:.0f} s"
        if now - self.began > self.bounds.seconds:
            return f"it takes longer than the limit of {self.bounds.seconds:.0f} s"
        return None

    def receive(self) -> tuple[str, Any]:
        """Returns one message; a dead process is replaced, which gives "again"."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            return "again", self.replace(f"the decoder died on it (exit code {code})")
        self.heard = time.monotonic()
        if kind == "item":
            if content != self.item:
                self.item, self.began = content, self.heard
        elif kind == "finished":
            self.finished += content
        elif kind == "file error":
            raise OSError(*content)
        elif kind == "error":
            raise RuntimeError(f"part {self.part} failed in its process:\n{content}")
        return kind, content

    def replace(self, reason: str) -> int:
        """Restarts the part in a new process, skipping the item that it was at.

        Returns minus the number of the part's items that had been finished.
        """
        part, item, avoid = self.part, self.item, self.avoid
        finished = self.finished
        self.stop()
        if item is None or item in avoid:
            raise RuntimeError(f"the process of part {part} is gone: {reason}")
        self._spawn()
        self.start(part, {**avoid, item: reason})
        return -finished

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


_spawning = threading.Lock()  # a runner of Beam has several threads


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Within it, a process that is spawned does not import the main module again.

    That of a job imports JAX, which no task uses: 130 MB and a second for each process.
    """
    with _spawning:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _serve(connection, task: Task, bounds: Bounds) -> None:
    # Ctrl-C reaches the whole process group; the parent decides and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _set_soft_limit(resource.RLIMIT_CORE, 0)  # a crash writes no file
    _return_large_blocks()

    last, told = None, 0.0

    def note(item: str | None = None, finished: int = 0) -> None:
        nonlocal last, told
        if item is not None and (item != last or time.monotonic() - told > 1):
            if item != last:
                _begin_item(bounds)
            connection.send(("item", item))
            last, told = item, time.monotonic()
        if finished:
            connection.send(("finished", finished))

    while True:
        try:
            part, avoid = connection.recv()
            last = None
            try:
                message = ("result", task(part, note, avoid))
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as error:
                known = error.errno is not None
                details = (error.errno, error.strerror, str(error.filename or ""))
                message = ("file error", details if known else (str(error),))
            except Exception:
                message = ("error", traceback.format_exc())
            connection.send(message)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent is gone


_most_data: int | None = None  # bytes, of this process within `limited_memory`
_STATM = pathlib.Path("/proc/self/statm")
_M_MMAP_THRESHOLD = -3  # glibc's mallopt.h


def _return_large_blocks() -> None:
    """Makes malloc return blocks of 1 MiB or more to the system when they are freed.

    glibc would learn from a video of large frames to keep such blocks, in fragments, so
    that a process would hold hundreds of MiB from then on.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _begin_item(bounds: Bounds) -> None:
    """Limits what the next item may use beyond what this process has already used."""
    global _most_data
    if math.isfinite(bounds.seconds):
        used = math.ceil(time.process_time() + bounds.seconds)
        _set_soft_limit(resource.RLIMIT_CPU, used + _ORPHANED)
    if bounds.memory is not None and _STATM.exists():
        gc.collect()  # the frames of a decoder that has failed, for instance
        _most_data = _data() + bounds.memory


def _data() -> int:
    """Bytes of this process that RLIMIT_DATA limits.

    RLIMIT_AS would also count what is only reserved, such as malloc's arenas.
    """
    return int(_STATM.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def uncounted_memory() -> Iterator[None]:
    """What is made within it, and kept, does not count against the item's memory.

    It is for what serves many items, such as the rows of a table.
    """
    global _most_data
    before = _data() if _most_data is not None else 0
    yield
    if _most_data is not None:
        _most_data += max(0, _data() - before)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Limits the memory of this process, if it is one of `run`, to that of its bounds.

    Allocations beyond it fail: Python raises MemoryError, and libraries what they like.
    """
    if _most_data is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _set_soft_limit(resource.RLIMIT_DATA, _most_data)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def limited[Item](items: Iterable[Item]) -> Iterator[Item]:
    """Yields items that are made within `limited_memory`."""
    iterator = iter(items)
    while True:
        with limited_memory():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _set_soft_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # the platform lacks this limit
        resource.setrlimit(kind, (value, hard))
