"""Asks a captioner about clips until each has its captions, or no answer will do.

The captioner is called from threads; this thread checks nothing and waits for nobody but
them: it takes their answers, writes them to the journal, and puts the next questions.
"""

import collections
import contextlib
import dataclasses
import functools
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from sora_jax.captioning import captioner, checks, journal, motion
from sora_jax.core import progress
from sora_jax.data import records, shards

_STOP = object()


@dataclasses.dataclass(frozen=True)
class _Question:
    """A clip, what is known about it in one tier, and its motion, measured once."""

    clip: records.ClipRecord
    entry: journal.Entry
    measured: Callable[[], motion.Motion]


class _Waiting:
    """Questions in groups that one call of the captioner can take: same tier, same try.

    Clips are read when their turn comes, and those that are asked again come first.
    """

    def __init__(self, fresh: Iterator[_Question], batch_size: int):
        self._fresh, self._size = fresh, batch_size
        self._groups = collections.defaultdict(collections.deque)

    def put(self, question: _Question) -> None:
        entry = question.entry
        self._groups[entry.tier, entry.tries].append(question)

    def take(self) -> list[_Question]:
        """Returns the next questions; none where none is left."""
        while not any(len(group) >= self._size for group in self._groups.values()):
            question = next(self._fresh, None)
            if question is None:
                break
            self.put(question)
        if not self._groups:
            return []
        key = max(
            self._groups, key=lambda key: (len(self._groups[key]) >= self._size, key[1])
        )
        group = self._groups[key]
        taken = [group.popleft() for _ in range(min(self._size, len(group)))]
        if not group:
            del self._groups[key]
        return taken


def ask(
    clips: shards.Shards,
    count: int,
    writer: captioner.Captioner,
    entries: journal.Journal,
    *,
    retries: int,
    seed: int,
) -> None:
    """Asks about the first `count` clips in all tiers of the captioner.

    An answer that is no caption is asked for again with the next seed. Ctrl-C and SIGTERM
    end the job when the questions under way are answered, which are kept; a second one
    ends it at once.

    Args:
      clips: to caption.
      count: of them.
      writer: the captioner.
      entries: takes the answers; what it has is not asked again.
      retries: answers beyond the first one.
      seed: of the first answer.

    Raises:
      KeyboardInterrupt: the job was stopped.
      ValueError, OSError: the captioner cannot work.
    """
    tiers = [*writer.prompts]
    ahead = sum(
        len(entries.open_tiers(e["id"], e["sha256"], tiers, retries))
        for e in map(clips.entry, range(count))
    )
    if not ahead:
        return
    waiting = _Waiting(
        _questions(clips, count, tiers, entries, retries), writer.batch_size
    )
    tasks, done = _start(writer, seed)
    total = count * len(tiers)
    bar = progress.Progress(total, "recaption", "captions", start=total - ahead)
    running, fault = 0, None

    def stop() -> None:
        done.put(_STOP)  # before the failures that stopping gives
        writer.stop()

    with bar, _stopping(stop):
        while True:
            while fault is None and running < writer.concurrency:
                try:
                    batch = waiting.take()
                except (ValueError, OSError) as error:  # the shards cannot be read
                    writer.stop()
                    fault, batch = error, []
                if not batch:
                    break
                tasks.put(batch)
                running += 1
            if not running:
                break
            found = done.get()
            if found is _STOP:
                fault = fault or KeyboardInterrupt()
                print(
                    f"recaption: stops after {running} questions under way; Ctrl-C again "
                    "leaves them",
                    file=sys.stderr,
                )
                continue
            running -= 1
            if isinstance(found, Exception):
                writer.stop()
                fault = fault or found
                continue
            for question, entry in found:
                if entry.failed and fault:
                    continue  # it was given up, and is asked again
                entries.write(entry)
                if entry.failed or entry.text is not None or entry.tries > retries:
                    bar.update(1)
                else:
                    waiting.put(dataclasses.replace(question, entry=entry))
    for _ in range(writer.concurrency):
        tasks.put(None)
    if fault:
        raise fault


def _start(
    writer: captioner.Captioner, seed: int
) -> tuple[queue.SimpleQueue, queue.SimpleQueue]:
    """Starts the threads; returns the queues of their tasks and of what they did."""
    tasks, done = queue.SimpleQueue(), queue.SimpleQueue()
    for _ in range(writer.concurrency):
        # Daemons: the second Ctrl-C does not wait for a server.
        threading.Thread(
            target=_serve, args=(writer, seed, tasks, done), daemon=True
        ).start()
    return tasks, done


def _questions(clips, count, tiers, entries, retries) -> Iterator[_Question]:
    for index in range(count):
        listed = clips.entry(index)
        asked = entries.open_tiers(listed["id"], listed["sha256"], tiers, retries)
        if not asked:
            continue
        (clip,) = clips.read([index])
        if isinstance(clip, records.CorruptRecord):
            clip = _Damaged(clip)

        def measure(clip=clip) -> motion.Motion:
            return motion.measure(clip.frames())

        measured = functools.cache(measure)
        for tier in asked:
            entry = entries.entry(listed["id"], listed["sha256"], tier)
            yield _Question(clip, entry, measured)


@dataclasses.dataclass(frozen=True)
class _Damaged:
    """A record that cannot be read, in the place of its clip."""

    error: records.CorruptRecord


def _serve(writer: captioner.Captioner, seed: int, tasks, done) -> None:
    """Asks and checks, in a thread; puts [(question, its entry after it)] or the error."""
    while (batch := tasks.get()) is not None:
        try:
            done.put(_answers(writer, batch, seed + batch[0].entry.tries))
        except Exception as error:
            done.put(error)


def _answers(
    writer: captioner.Captioner, batch: list[_Question], seed: int
) -> list[tuple[_Question, journal.Entry]]:
    results, sound = [], []
    for question in batch:
        if isinstance(question.clip, _Damaged):
            failure = captioner.Failure(str(question.clip.error), 0, lasting=True)
            results.append((question, question.entry.failing(failure)))
        else:
            sound.append(question)
    if not sound:
        return results
    tier = sound[0].entry.tier
    answers = writer.caption([question.clip for question in sound], tier, seed)
    for question, answer in zip(sound, answers, strict=True):
        if isinstance(answer, captioner.Failure):
            results.append((question, question.entry.failing(answer)))
            continue
        problem = checks.problem(
            answer, tier, question.measured, is_assistant=writer.is_assistant
        )
        text = checks.cleaned(answer.text)
        entry = question.entry.answered(answer, seed, text, problem)
        results.append((question, entry))
    return results


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Within it, the first Ctrl-C or SIGTERM calls `stop`; the next one interrupts.

    An exception in the middle of a write to the journal could lose an answer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first(number, frame) -> None:
        for one in numbers:
            signal.signal(one, signal.default_int_handler)
        stop()

    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
