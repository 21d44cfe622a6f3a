"""Runs the points of a sweep as local processes, or submits them by a launcher.

Each job has its own log and process group, so that only the sweep receives Ctrl-C: it
asks its jobs to save and stop, and records their states.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from experiments.sweeping import index as indices
from sora_jax.core import paths

_POLL_SECONDS = 0.02
SCORES = "scores.json"
_ENDED = "ended"  # file with exit code and seconds of a submitted point
_COMMAND = "{command}"
_PLACEHOLDERS = ("command", "script", "id", "folder")  # of a launcher's command


class Stopped(Exception):
    """The sweep was stopped by a signal."""


@dataclasses.dataclass
class _Running:
    entry: indices.Entry
    commands: list[list[str]]  # of jobs that are not started yet
    process: subprocess.Popen
    began: float
    terminated: bool = False


def say(sentence: str) -> None:
    """Prints a line on stderr."""
    print(f"sweep: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[int]:
    """Locks the sweep's folder; yields the descriptor of the lock.

    Jobs inherit the descriptor, so that the folder stays locked until they have ended,
    even if the sweep itself is killed.

    Raises:
      ValueError: another sweep, or a job of a killed sweep, runs in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            left = [e.pid for e in indices.read(out / "index.jsonl") if e.pid]
            raise ValueError(
                f"another sweep, or a job of a killed one, runs in {out} (jobs: "
                f"{', '.join(map(str, left)) or 'none yet'}); wait for it"
            ) from None
        yield lock.fileno()


def run(index: indices.Index, todo: Sequence[indices.Entry], slots: int, lock: int):
    """Runs points as local processes until all have ended.

    Args:
      index: written after each change.
      todo: entries to run.
      slots: number of points that run at the same time.
      lock: descriptor that the jobs inherit.

    Raises:
      Stopped: by a signal, after the jobs have ended.
    """
    for entry in todo:
        if entry.state == indices.FAILED:  # earlier attempts do not count
            entry.seconds = 0.0
        _prepare(entry)
    commands = {entry.id: entry.commands for entry in todo}
    _work(index, todo, commands, slots, (lock,))


def submit(
    index: indices.Index, todo: Sequence[indices.Entry], slots: int, launcher: str
):
    """Submits each point by a launcher; `collect` reads the results.

    Args:
      index: written after each change.
      todo: entries to submit.
      slots: number of launchers that run at the same time.
      launcher: a command. A word `{command}` is replaced by the words that run the point.
        Inside a longer word, `{command}` is their text, `{script}` the script that they
        run, `{id}` the point's id and `{folder}` its folder.

    Raises:
      ValueError: the launcher has neither `{command}` nor `{script}`.
      Stopped: by a signal, after the launchers have ended.
    """
    commands = {entry.id: [launch_words(launcher, entry)] for entry in todo}
    for entry in todo:
        entry.seconds = 0.0
        _prepare(entry)
        paths.write_atomically(_script(entry), _script_text(entry))
    _work(index, todo, commands, slots, (), launched=True)


def launch_words(launcher: str, entry: indices.Entry) -> list[str]:
    """Returns the words of a launcher's command for a point; see `submit`."""
    if _COMMAND not in launcher and "{script}" not in launcher:
        raise ValueError(f"the launcher {launcher!r} has no {_COMMAND}")
    command = ["sh", str(_script(entry))]
    values = (shlex.join(command), command[1], entry.id, str(entry.folder))
    words = []
    for word in shlex.split(launcher):
        if word == _COMMAND:
            words += command
            continue
        for name, value in zip(_PLACEHOLDERS, values, strict=True):
            word = word.replace(f"{{{name}}}", value)
        words.append(word)
    return words


def _script(entry: indices.Entry) -> pathlib.Path:
    return entry.folder / "job.sh"


def _script_text(entry: indices.Entry) -> str:
    """Returns a shell script that runs the point's jobs and writes how they ended."""
    ended = shlex.quote(str(entry.folder / _ENDED))
    return (
        f"#!/bin/sh\n# Point {entry.id} of a sweep: {entry.name}\n"
        "began=$(date +%s)\n"
        f"{{ {' && '.join(map(shlex.join, entry.commands))}; }} "
        f">> {shlex.quote(entry.log)} 2>&1\n"
        "code=$?\n"
        f'echo "$code $(($(date +%s) - began))" > {ended}\n'
        "exit $code\n"
    )


def _prepare(entry: indices.Entry) -> None:
    entry.folder.mkdir(parents=True, exist_ok=True)
    for name in (SCORES, _ENDED):  # of a failed attempt
        (entry.folder / name).unlink(missing_ok=True)


class _Jobs:
    """The running jobs, and the signals that were received."""

    def __init__(self, index: indices.Index, inherited: Sequence[int], launched: bool):
        self.index, self.inherited, self.launched = index, inherited, launched
        self.running: list[_Running] = []
        self.signals: list[int] = []

    def stop(self, number: int, frame: object) -> None:
        """Handles a signal; the loop forwards it."""
        say("stopping; the jobs save their state (repeat to kill them)")
        self.signals.append(number)

    def start(self, entry, commands, since: float | None = None) -> None:
        """Starts the first command; the others follow after it has succeeded."""
        log = entry.folder / "launcher.txt" if self.launched else entry.log
        with open(log, "ab") as file:
            process = subprocess.Popen(
                commands[0],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=self.inherited,
            )
        entry.state, entry.pid = indices.RUNNING, process.pid
        began = since or time.monotonic()
        self.running.append(_Running(entry, commands[1:], process, began))
        self.index.write()

    def forward_signals(self) -> None:
        """Terminates the jobs after the first signal, kills them after the second."""
        for one in self.running:
            if len(self.signals) > 1:
                one.process.kill()
            elif self.signals and not one.terminated:
                one.process.terminate()
                one.terminated = True

    def poll(self) -> None:
        """Records jobs that have ended, and starts the next job of their points."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            code, entry, entries = one.process.returncode, one.entry, self.index.entries
            if code == 0 and one.commands and not self.signals:
                self.start(entry, one.commands, one.began)
                continue
            _ended(one, code, bool(self.signals), self.launched)
            self.index.write()
            number = f"{1 + entries.index(entry)}/{len(entries)}"
            say(f"{number} {entry.name}: {describe(entry)}")


def _work(index, todo, commands, slots, inherited, launched=False) -> None:
    """Starts jobs while slots are free, until all have ended."""
    jobs, waiting = _Jobs(index, inherited, launched), list(todo)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, jobs.stop) for number in numbers}
    try:
        while jobs.running or (waiting and not jobs.signals):
            while waiting and len(jobs.running) < slots and not jobs.signals:
                entry = waiting.pop(0)
                jobs.start(entry, commands[entry.id])
            jobs.forward_signals()
            time.sleep(_POLL_SECONDS)
            jobs.poll()
    finally:
        for one in jobs.running:  # only after an exception
            one.process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if jobs.signals:
        raise Stopped


def _ended(one: _Running, code: int, stopped: bool, launched: bool) -> None:
    entry = one.entry
    entry.pid = None
    entry.exit_code = 128 - code if code < 0 else code  # signals as in a shell
    if launched and code == 0:
        entry.state = indices.SUBMITTED
        collect(entry)
        return
    entry.seconds = round(entry.seconds + time.monotonic() - one.began, 2)
    done = code == 0 and not one.commands
    if stopped and not done:
        entry.state = indices.STOPPED
    else:
        entry.state = (
            indices.FINISHED if done and _has_results(entry) else indices.FAILED
        )


def _has_results(entry: indices.Entry) -> bool:
    """Returns whether the last job wrote its results: scores, if it is an evaluation."""
    evaluates = "sora_jax.evaluate" in entry.commands[-1]
    return not evaluates or (entry.folder / SCORES).is_file()


def collect(entry: indices.Entry) -> None:
    """Updates the state of a submitted point."""
    ended = entry.folder / _ENDED
    words = ended.read_text().split() if ended.is_file() else []
    if len(words) == 2:
        entry.exit_code, entry.seconds = int(words[0]), float(words[1])
        if entry.exit_code:
            entry.state = indices.FAILED
        elif _has_results(entry):  # may arrive later on a network file system
            entry.state = indices.FINISHED


def describe(entry: indices.Entry) -> str:
    """Returns the state of a point as text."""
    if entry.state == indices.FINISHED:
        return f"finished in {entry.seconds:.0f} s"
    if entry.state == indices.FAILED:
        how = f"exit code {entry.exit_code}" if entry.exit_code else f"no {SCORES}"
        return f"failed ({how}); see {entry.log}"
    return entry.state
