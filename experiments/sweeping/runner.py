"""Runs the points of a sweep here, some at a time, or hands them to a launcher.

A job has its own log and its own process group, so that Ctrl-C comes to the sweep
alone: it asks its jobs to save and to end, and records how far they came.
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
_ENDED = "ended"  # exit code and seconds of a point that a launcher was given
# A word of a launcher's template that is the command, and what may stand inside one.
_COMMAND = "{command}"
PLACES = ("command", "script", "id", "folder")


class Stopped(Exception):
    """The user, or the system, asked to stop."""


@dataclasses.dataclass
class _Running:
    entry: indices.Entry
    commands: list[list[str]]  # those that have still to be started
    process: subprocess.Popen
    began: float
    told: bool = False  # to stop


def say(sentence: str) -> None:
    """Prints a line that says where it comes from."""
    print(f"sweep: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone_in(out: pathlib.Path) -> Iterator[int]:
    """Holds the sweep's folder; yields the descriptor of the lock.

    The jobs inherit it, so that the folder is free only when they have ended too, even
    if the sweep itself was killed.

    Raises:
      ValueError: another sweep, or a job that one left behind, is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            left = [e.pid for e in indices.read(out / "index.jsonl") if e.pid]
            raise ValueError(
                f"another sweep, or a job that one left behind, is at work in {out} "
                f"(jobs: {', '.join(map(str, left)) or 'none yet'}); wait for it"
            ) from None
        yield lock.fileno()


def run(index: indices.Index, todo: Sequence[indices.Entry], slots: int, lock: int):
    """Runs points here until all have ended.

    Args:
      index: written after each change.
      todo: entries of it.
      slots: how many points run at a time.
      lock: descriptor that the jobs inherit.

    Raises:
      Stopped: it was asked to stop, and the jobs have ended.
    """
    for entry in todo:
        if entry.state == indices.FAILED:  # its attempts are not those of this one
            entry.seconds = 0.0
        _prepare(entry)
    commands = {entry.id: entry.commands for entry in todo}
    _work(index, todo, commands, slots, (lock,))


def hand_over(
    index: indices.Index, todo: Sequence[indices.Entry], slots: int, launcher: str
):
    """Gives each point to a launcher; what it leaves is read by `collect`.

    Args:
      index: written after each change.
      todo: entries of it.
      slots: how many launchers run at a time.
      launcher: a command. A word `{command}` becomes the words that run the point;
        inside a longer word, `{command}` is their text, `{script}` the script that they
        run, `{id}` the point's id and `{folder}` its folder.

    Raises:
      ValueError: the launcher mentions neither the command nor the script.
      Stopped: it was asked to stop, and the launchers have ended.
    """
    commands = {entry.id: [launch_words(launcher, entry)] for entry in todo}
    for entry in todo:
        entry.seconds = 0.0
        _prepare(entry)
        paths.write_atomically(_script(entry), _script_text(entry))
    _work(index, todo, commands, slots, (), launched=True)


def launch_words(launcher: str, entry: indices.Entry) -> list[str]:
    """The words of a launcher's command for a point; see `hand_over`."""
    if _COMMAND not in launcher and "{script}" not in launcher:
        raise ValueError(f"the launcher {launcher!r} has no {_COMMAND} in it")
    command = ["sh", str(_script(entry))]
    values = (shlex.join(command), command[1], entry.id, str(entry.folder))
    words = []
    for word in shlex.split(launcher):
        if word == _COMMAND:
            words += command
            continue
        for place, value in zip(PLACES, values, strict=True):
            word = word.replace(f"{{{place}}}", value)
        words.append(word)
    return words


def _script(entry: indices.Entry) -> pathlib.Path:
    return entry.folder / "job.sh"


def _script_text(entry: indices.Entry) -> str:
    """Runs the point's jobs and writes how they ended; from the repository root."""
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
    for name in (SCORES, _ENDED):  # those of an attempt that failed
        (entry.folder / name).unlink(missing_ok=True)


class _Crew:
    """The jobs that run at the moment, what has become of them, and who asked to stop."""

    def __init__(self, index: indices.Index, inherited: Sequence[int], launched: bool):
        self.index, self.inherited, self.launched = index, inherited, launched
        self.running: list[_Running] = []
        self.asked: list[int] = []  # signals that asked to stop

    def stop(self, number: int, frame: object) -> None:
        """Takes a signal; the loop passes it on."""
        say("stopping; the jobs save what they have (once more to end them at once)")
        self.asked.append(number)

    def start(self, entry, commands, since: float | None = None) -> None:
        """Starts the first of the commands; the others follow when it has succeeded."""
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

    def pass_on(self) -> None:
        """Asks the jobs to save and to end, once; ends them where it is asked again."""
        for one in self.running:
            if len(self.asked) > 1:
                one.process.kill()
            elif self.asked and not one.told:
                one.process.terminate()
                one.told = True

    def see(self) -> None:
        """Records what has ended, and goes on with what has more to do."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            code, entry, entries = one.process.returncode, one.entry, self.index.entries
            if code == 0 and one.commands and not self.asked:
                self.start(entry, one.commands, one.began)
                continue
            _ended(one, code, bool(self.asked), self.launched)
            self.index.write()
            place = f"{1 + entries.index(entry)}/{len(entries)}"
            say(f"{place} {entry.name}: {describe(entry)}")


def _work(index, todo, commands, slots, inherited, launched=False) -> None:
    """The loop: starts what there is room for, sees what has ended."""
    crew, waiting = _Crew(index, inherited, launched), list(todo)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, crew.stop) for number in numbers}
    try:
        while crew.running or (waiting and not crew.asked):
            while waiting and len(crew.running) < slots and not crew.asked:
                entry = waiting.pop(0)
                crew.start(entry, commands[entry.id])
            crew.pass_on()
            time.sleep(_POLL_SECONDS)
            crew.see()
    finally:
        for one in crew.running:  # only after an error of our own
            one.process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if crew.asked:
        raise Stopped


def _ended(one: _Running, code: int, stopped: bool, launched: bool) -> None:
    entry = one.entry
    entry.pid = None
    entry.exit_code = 128 - code if code < 0 else code  # as a shell counts signals
    if launched and code == 0:
        entry.state = indices.HANDED_OVER
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
    """Whether the last job left what it should: scores, if it is an evaluation."""
    evaluates = "sora_jax.evaluate" in entry.commands[-1]
    return not evaluates or (entry.folder / SCORES).is_file()


def collect(entry: indices.Entry) -> None:
    """Looks whether a point that was handed over has ended, and how."""
    ended = entry.folder / _ENDED
    words = ended.read_text().split() if ended.is_file() else []
    if len(words) == 2:
        entry.exit_code, entry.seconds = int(words[0]), float(words[1])
        if entry.exit_code:
            entry.state = indices.FAILED
        elif _has_results(entry):  # or else they are still on their way here
            entry.state = indices.FINISHED


def describe(entry: indices.Entry) -> str:
    """The state of a point, for people."""
    if entry.state == indices.FINISHED:
        return f"finished in {entry.seconds:.0f} s"
    if entry.state == indices.FAILED:
        how = f"exit code {entry.exit_code}" if entry.exit_code else f"no {SCORES}"
        return f"failed ({how}); see {entry.log}"
    return entry.state
