"""Batches whose content is a pure function of (seed, step, row).

Row r of step s is example p = s * B + r of an endless sequence: epoch p // N of a data
set of N records, in an order that depends only on the seed and the epoch. So a run can
resume at any step without saved iterator state, and P processes that each read their
rows [i * B / P, (i + 1) * B / P) together see what one process sees, for any P.

A damaged record is replaced by the next valid one in the epoch's order, which is again a
function of the data and (seed, step, row) only. It is counted and logged, and too many of
them end the run.

Letters: n records, b rows of this process.
"""

import collections
import dataclasses
import gc
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import grain
import numpy as np
import numpy.random.bit_generator
from absl import flags

from sora_jax.data import records

# Longer than any run, and short enough for grain to count in.
_ENDLESS = 1 << 40


class Source(Protocol):
    """Records by index: `shards.Shards` or `latent_cache.Latents`."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the records, with a `records.CorruptRecord` for each damaged one."""


# transform(record, rng) -> one example; rng depends on (seed, step, row) only.
Transform = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]


class TooManyCorruptRecords(RuntimeError):
    """More of the data is damaged than the run may replace."""


# -- order ----------------------------------------------------------------------------


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_EXAMPLES = np.uint64(0x6578616D706C6573)  # separates examples' randomness from order


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: np.ndarray, num: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Returns the index at each place of each epoch's order of `num` records.

    A Feistel network of three rounds on Z_a x Z_b, with a b just above num, applied until
    the result is below num (Black and Rogaway 2002): a permutation for every (seed,
    epoch) that is computed place by place, without memory of the data set's size.

    Args:
      places: int[k] in [0, num).
      num: number of records.
      seed: the run's seed.
      epochs: int[k].
    """
    a = math.isqrt(num - 1) + 1
    b = -(-num // a)
    seeds = np.full(len(places), seed % (1 << 64), np.uint64)
    keys = _mix(_mix(seeds) + epochs.astype(np.uint64))
    a, b = np.uint64(a), np.uint64(b)
    result = places.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        left, right = np.divmod(result[pending], b)
        key = keys[pending]
        for _ in range(3):
            key = _mix(key + _GOLDEN)
            left = (left + _mix(right ^ key)) % a
            key = _mix(key + _GOLDEN)
            right = (right + _mix(left ^ key)) % b
        result[pending] = left * b + right
        pending = pending[result[pending] >= num]
    return result.astype(np.int64)


class _Words(numpy.random.bit_generator.ISeedSequence):
    """Gives a bit generator its state, ten times faster than hashing a seed."""

    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype=np.uint64) -> np.ndarray:
        return self.words[:n_words]


def example_rngs(
    seed: int, step: int, rows: Sequence[int]
) -> Iterator[np.random.Generator]:
    """Yields the random generator of each row, a function of (seed, step, row)."""
    seeds = np.full(len(rows), seed % (1 << 64), np.uint64) ^ _EXAMPLES
    keys = _mix(_mix(seeds) + np.uint64(step)) + np.asarray(rows, np.uint64)
    words = _mix(_mix(keys)[:, None] + _GOLDEN * np.arange(1, 5, dtype=np.uint64))
    for row_words in words:
        yield np.random.Generator(np.random.PCG64(_Words(row_words)))


# -- batches --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of one process as a sequence; `[i]` is step `start_step + i`.

    An item is (batch, damaged): a dict of arrays with a leading b, and the damaged
    records that were found, as (id, message).
    """

    instead: ClassVar[str] = "another clip takes its place"  # of a damaged one

    source: Source
    transform: Transform
    seed: int
    batch_size: int
    start_step: int
    num_steps: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, item: int) -> tuple[dict[str, np.ndarray], tuple]:
        step = self.start_step + int(item)
        share = self.batch_size // self.process_count
        first = self.process_index * share
        examples, damaged = self._examples(step, range(first, first + share))
        batch = {
            name: np.stack([example[name] for example in examples])
            for name in examples[0]
        }
        return batch, tuple(damaged.items())

    def _examples(self, step: int, rows: range) -> tuple[list[Any], dict[str, str]]:
        """Returns the examples of a step's rows, and the damaged records met."""
        num = len(self.source)
        positions = step * self.batch_size + np.arange(rows.start, rows.stop)
        epochs, places = positions // num, positions % num
        examples: list[Any] = [None] * len(rows)
        damaged: dict[str, str] = {}
        wanted = np.arange(len(rows))
        for _ in range(num):
            indices = permute(places[wanted], num, self.seed, epochs[wanted])
            again = []
            loaded = self.source.read(indices.tolist())
            randoms = example_rngs(self.seed, step, np.array(rows)[wanted])
            for i, record, random in zip(wanted.tolist(), loaded, randoms, strict=True):
                try:
                    if isinstance(record, records.CorruptRecord):
                        raise record
                    examples[i] = self.transform(record, random)
                except records.CorruptRecord as error:
                    damaged[error.id] = str(error)
                    again.append(i)
            if not again:
                return examples, damaged
            wanted = np.array(again)
            places[wanted] = (places[wanted] + 1) % num
        raise TooManyCorruptRecords(f"all {num} records are damaged")


def _ignore_interrupt(worker: int, count: int) -> None:
    # Ctrl-C reaches the whole process group; the parent closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Iterates over prefetched batches; a context manager.

    Attributes:
      quarantine: the damaged records found so far, message by id.
      num_replaced: how often a damaged record was replaced.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        max_corrupt_share: float = 0.01,
    ):
        self.quarantine: dict[str, str] = {}
        self.num_replaced = 0
        self._allowed = max_corrupt_share * len(batches.source)
        self._num_records = len(batches.source)
        self._instead = batches.instead
        self._shared = num_workers > 0
        self._blocks = collections.deque(maxlen=64)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        )
        if num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read theirs
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers, per_worker_buffer_size=prefetch
                ),
                worker_init_fn=_ignore_interrupt,
            )
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise ValueError("the loader is closed")
        batch, damaged = next(self._iterator)
        if self._shared:
            # Copied out of grain's shared memory, which is freed here and not at exit.
            for array in batch.values():
                if block := getattr(array, "shm", None):
                    self._blocks.append(pathlib.Path("/dev/shm") / block.name)
            batch = {name: np.array(array) for name, array in batch.items()}
        for record_id, text in damaged:
            self.num_replaced += 1
            if record_id not in self.quarantine:
                self.quarantine[record_id] = text
                logging.warning("%s; %s", text, self._instead)
        if len(self.quarantine) > self._allowed:
            raise TooManyCorruptRecords(
                f"{len(self.quarantine)} of {self._num_records} records are damaged, "
                f"more than the {self._allowed:g} that are allowed: "
                + "; ".join(list(self.quarantine.values())[:3])
            )
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stops threads and processes and frees their memory; may be called twice."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            if self._shared:
                # The exception that ends a worker's batches has a traceback in a
                # reference cycle, which keeps the last batch's shared memory alive.
                gc.collect()
                # A thread of grain removes the blocks; wait, as the process may exit.
                deadline = time.monotonic() + 5.0
                while time.monotonic() < deadline and any(
                    block.exists() for block in self._blocks
                ):
                    time.sleep(0.01)


def make_loader(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    max_corrupt_share: float = 0.01,
) -> Loader:
    """Returns the loader of this process's rows, from step `start_step` on.

    Args:
      source: the records; picklable if there are workers.
      transform: makes an example (a dict of arrays of equal shapes) of a record; pure
        and picklable.
      seed: of the order and of the examples' random numbers.
      batch_size: rows of the global batch.
      start_step: the first step, or the one to resume at.
      num_steps: how many steps; endless by default.
      process_index, process_count: this process among those that share the batch.
      num_workers: processes that make batches; 0: a thread, which is enough where a
        batch costs little, as with cached latents.
      prefetch: batches that are made ahead (by each worker).
      max_corrupt_share: share of all records that may be damaged and replaced.

    Raises:
      ValueError: the source is empty, or the batch does not divide over the processes.
    """
    if len(source) == 0:
        raise ValueError("the source has no records")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be shared by {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} is not among {process_count}")
    batches = Batches(
        source,
        transform,
        seed,
        batch_size,
        start_step,
        _ENDLESS if num_steps is None else num_steps,
        process_index,
        process_count,
    )
    return Loader(
        batches,
        num_workers=num_workers,
        prefetch=prefetch,
        max_corrupt_share=max_corrupt_share,
    )
