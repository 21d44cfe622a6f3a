"""Which clips share which rows: clips of any length in rows of a few fixed lengths.

A step has one shape: `groups` groups of `rows` rows of `tokens` tokens. All groups of a
step should cost the same, since the step waits for the slowest one, and little of them
should be padding. So clips go into rows of about their length (a shape with rows twice as
long has half as many, so that all shapes have about the same number of tokens a group),
short clips fill the space that long ones leave, the rows of a step are neighbours in
cost, and each group gets both expensive and cheap ones. Compare the bins of arXiv
2307.06304 (less padding) and 2508.06001 (balanced cost).

The order of clips is that of `loader.permute`, cut into windows. Clips that do not fill a
step of a window are carried over to the next one and come before its own, so that no clip
is lost or repeated. A plan depends only on (lengths, settings, seed, window); nothing is
decoded for it.

Letters: n clips of the data, r rows, m tokens of a row, k clips of a row, c numbers of a
token; t, h, w the latents' time, height and width.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from sora_jax.data import conditions, loader, records

_PATIENCE = 20  # windows without a step before planning fails
# They separate the order of a window's steps, and conditions, from other randomness.
_STEPS, _CONDITIONS = 0x73746570, 0x636F6E64
_SHOWN = {"shown_shape", "shown_colour", "shown_motion"}  # [m], of `transforms.Shown`


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape of steps, compiled once: `rows` rows of `tokens` tokens a group.

    Attributes:
      rows: of one group.
      tokens: of one row, padding included.
      clips: the most that share a row; sets the size of a row's texts and noise levels.
    """

    rows: int
    tokens: int
    clips: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a row on a backend, in any unit: linear * tokens + quadratic * pairs.

    Attributes:
      linear: of a token, padding included: products with weights.
      quadratic: of a pair of tokens in attention.
      skips: whether pairs of different clips cost nothing. A kernel that computes and
        then masks them does not skip.
    """

    linear: float = 1.0
    quadratic: float = 0.0
    skips: bool = False

    def of_row(self, lengths: Sequence[int], tokens: int) -> float:
        """The cost of a row of `tokens` tokens with clips of these lengths."""
        pairs = sum(n * n for n in lengths) if self.skips else tokens * tokens
        return self.linear * tokens + self.quadratic * pairs


class Clip(NamedTuple):
    """A clip in a row: its index in the data, its tokens, and what is given of it."""

    index: int
    tokens: int
    condition: conditions.Condition = conditions.Condition()


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one step.

    Attributes:
      shape: their shape.
      rows: the clips of each row, [groups * shape.rows] tuples; a group's are together.
    """

    shape: Shape
    rows: tuple[tuple[Clip, ...], ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How well steps are filled and balanced.

    Attributes:
      steps: how many.
      clips: in all steps.
      shapes: distinct ones, each compiled once.
      padding: share of tokens that are padding.
      imbalance: mean over steps of the most expensive group's cost over the mean
        group's, minus 1.
    """

    steps: int
    clips: int
    shapes: int
    padding: float
    imbalance: float


def halved(longest: int, shapes: int, *, unit: int, clips: int) -> tuple[Shape, ...]:
    """Shapes of about as many tokens a group, from one long row to many short ones.

    Args:
      longest: tokens of the longest clip.
      shapes: how many; each has rows of half the length of the one before.
      unit: lengths of rows are multiples of it, as kernels and the mesh need.
      clips: the most that share a row.

    Raises:
      ValueError: one of them is not positive.
    """
    if min(longest, shapes, unit, clips) < 1:
        raise ValueError(
            f"packing needs positive sizes, not tokens {longest}, shapes {shapes}, "
            f"unit {unit}, clips {clips}"
        )
    longest = -(-longest // unit) * unit
    result = []
    for halvings in range(shapes):
        tokens = -(-longest // (unit << halvings)) * unit
        if not result or tokens < result[-1].tokens:
            result.append(Shape(1 << halvings, tokens, clips))
    return tuple(result)


class Planner:
    """Plans steps, window after window.

    Args:
      lengths_n: tokens of every clip.
      shapes: of the steps.
      groups: of a step; a multiple of the devices that rows are sharded over.
      window: clips that are planned at a time. More clips pack and balance better, and
        a smaller share of them is carried over.
      seed: of the order.
      cost: of a row on the backend.
      draw: draws the condition of a clip, from its index and a random generator, and says
        how many tokens it then has; None: nothing is given of any clip.

    Raises:
      ValueError: a clip is longer than every row, or a size is not positive.
    """

    def __init__(
        self,
        lengths_n: np.ndarray,
        shapes: Sequence[Shape],
        *,
        groups: int,
        window: int,
        seed: int,
        cost: Cost,
        draw: Callable[[int, np.random.Generator], tuple[conditions.Condition, int]]
        | None = None,
    ):
        lengths_n = np.asarray(lengths_n)
        if not len(lengths_n):
            raise ValueError("there are no clips to pack")
        if groups < 1 or window < 1 or not shapes:
            raise ValueError(
                f"packing needs groups ({groups}), a window ({window}) and shapes"
            )
        self.shapes = tuple(sorted(shapes, key=lambda shape: shape.tokens))
        longest, room = int(lengths_n.max()), self.shapes[-1].tokens
        if longest > room:
            raise ValueError(
                f"clip {int(lengths_n.argmax())} has {longest} tokens, more than the "
                f"{room} of the longest row"
            )
        if lengths_n.min() < 1:
            raise ValueError(f"clip {int(lengths_n.argmin())} has no tokens")
        self.lengths_n = lengths_n
        self.groups, self.window, self.seed, self.cost = groups, window, seed, cost
        self.draw = draw
        self._starts = [
            (0, [])
        ]  # of each window: its first step, the clips carried over
        self._planned = None  # the last window: (number, steps, left over)

    def step(self, number: int) -> Step:
        """Returns one step by its number, planning all windows up to it.

        Raises:
          ValueError: many windows in a row have not filled a single step.
        """
        starts, planned = self._starts, self._planned
        while starts[-1][0] <= number:
            first, carried = starts[-1]
            planned = len(starts) - 1, *self.plan(len(starts) - 1, carried)
            starts.append((first + len(planned[1]), planned[2]))
            if len(starts) > _PATIENCE and starts[-1 - _PATIENCE][0] == starts[-1][0]:
                raise ValueError(
                    f"{_PATIENCE} windows of {self.window} clips have not filled one "
                    f"step of {self.groups} groups of {self.shapes[-1].rows} or more rows"
                )
        window = bisect.bisect_right(starts, number, key=lambda entry: entry[0]) - 1
        if planned is None or planned[0] != window:
            planned = window, *self.plan(window, starts[window][1])
        self._planned = planned
        return planned[1][number - starts[window][0]]

    def plan(
        self, window: int, carried: Sequence[Clip]
    ) -> tuple[list[Step], list[Clip]]:
        """The steps of a window.

        Args:
          window: its number.
          carried: the clips that the previous window has left over.

        Returns:
          the steps, and the clips that are left over.
        """
        n = len(self.lengths_n)
        places = window * self.window + np.arange(self.window)
        fresh = loader.permute(places % n, n, self.seed, places // n)
        old = set(range(len(carried)))
        pool = [*carried]
        for place, index in enumerate(fresh.tolist()):
            if self.draw is None:
                pool.append(Clip(index, int(self.lengths_n[index])))
                continue
            random = np.random.default_rng((_CONDITIONS, self.seed, window, place))
            condition, tokens = self.draw(index, random)
            pool.append(Clip(index, tokens, condition))
        steps, left = [], []
        for shape, rows in zip(self.shapes, self._pack(pool), strict=True):
            size = self.groups * shape.rows
            # Rows with carried clips go first, then the fullest rows.
            rows.sort(key=lambda row: (old.isdisjoint(row[1]), row[0]))
            whole = len(rows) // size * size
            left += [place for _, row in rows[whole:] for place in row]
            steps += self._balance(shape, [row for _, row in rows[:whole]], pool)
        order = np.random.default_rng((_STEPS, self.seed, window)).permutation(
            len(steps)
        )
        # In their original order, so that the next plan prefers the oldest.
        return [steps[i] for i in order], [pool[place] for place in sorted(left)]

    def _pack(self, pool: Sequence[Clip]) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Rows of each shape as (free tokens, places in the pool).

        Best fit, the longest clip first: each goes into the row that it leaves the
        fullest, or into a new row, as short as possible, if none has room.
        """
        lengths = np.array([clip.tokens for clip in pool])
        ends = [shape.tokens for shape in self.shapes]
        rows, kinds, free = [], [], []  # free: sorted (tokens, row), rows with room
        for place in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[place])
            fit = bisect.bisect_left(free, (length, -1))
            if fit < len(free):
                room, row = free.pop(fit)
            else:
                kind = bisect.bisect_left(ends, length)
                room, row = ends[kind], len(rows)
                rows.append([])
                kinds.append(kind)
            rows[row].append(place)
            if len(rows[row]) < self.shapes[kinds[row]].clips:
                bisect.insort(free, (room - length, row))
        result = [[] for _ in self.shapes]
        for kind, row in zip(kinds, rows, strict=True):
            used = sum(pool[place].tokens for place in row)
            result[kind].append((ends[kind] - used, tuple(row)))
        return result

    def _balance(self, shape: Shape, rows, pool: Sequence[Clip]) -> Iterator[Step]:
        """Cuts rows into steps of similar cost, and deals each step's rows to groups."""

        def price(row):
            lengths = [pool[place].tokens for place in row]
            return self.cost.of_row(lengths, shape.tokens)

        priced = sorted(((price(row), row) for row in rows), reverse=True)
        size = self.groups * shape.rows
        for first in range(0, len(priced), size):
            # The most expensive remaining row goes to the cheapest group.
            dealt = [[] for _ in range(self.groups)]
            waiting = [(0.0, group) for group in range(self.groups)]
            for cost, row in priced[first : first + size]:
                total, group = heapq.heappop(waiting)
                dealt[group].append(tuple(pool[place] for place in row))
                if len(dealt[group]) < shape.rows:
                    heapq.heappush(waiting, (total + cost, group))
            yield Step(shape, tuple(row for group in dealt for row in group))

    def forecast(self) -> Summary:
        """The summary of the first window that fills a step."""
        self.step(0)
        _, steps, _ = self._planned
        return self.summarize(steps)

    def summarize(self, steps: Sequence[Step]) -> Summary:
        """Returns how well these steps are filled and balanced.

        Raises:
          ValueError: there are no steps.
        """
        if not steps:
            raise ValueError("there are no steps to summarize")
        used = room = clips = 0
        imbalances = []
        for step in steps:
            lengths = [[clip.tokens for clip in row] for row in step.rows]
            used += sum(map(sum, lengths))
            clips += sum(map(len, lengths))
            room += len(step.rows) * step.shape.tokens
            costs = np.array(
                [self.cost.of_row(row, step.shape.tokens) for row in lengths]
            )
            of_groups = costs.reshape(self.groups, -1).sum(1)
            imbalances.append(of_groups.max() / of_groups.mean() - 1)
        return Summary(
            steps=len(steps),
            clips=clips,
            shapes=len({step.shape for step in steps}),
            padding=1 - used / room,
            imbalance=float(np.mean(imbalances)),
        )


# -- batches --------------------------------------------------------------------------


def tokens_of(shape: Sequence[int], patch: Sequence[int]) -> int:
    """Tokens of latents [t, h, w, ...].

    Raises:
      ValueError: they do not divide into patches.
    """
    grid = shape[:3]
    if any(size % p for size, p in zip(grid, patch, strict=True)):
        raise ValueError(
            f"latents of {' x '.join(map(str, grid))} do not divide into patches of "
            f"{' x '.join(map(str, patch))}"
        )
    return math.prod(size // p for size, p in zip(grid, patch, strict=True))


def patches(
    latents_thwc: np.ndarray, patch: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A clip's tokens [m, c], and the place of each in the grid [m, 3]."""
    t, h, w, c = latents_thwc.shape
    pt, ph, pw = patch
    grid = t // pt, h // ph, w // pw
    x = latents_thwc.reshape(grid[0], pt, grid[1], ph, grid[2], pw, c)
    x = x.transpose(0, 2, 4, 1, 3, 5, 6).reshape(math.prod(grid), -1)
    return x, np.indices(grid, np.int32).reshape(3, -1).T


@dataclasses.dataclass(frozen=True)
class Batches:
    """Like `loader.Batches`, with several clips in a row.

    A batch has `tokens` float32 [r, m, c] (padding is 0), `places` float32 [r, m, 3] in
    the clip's grid, `slots` int8 [r, m] (see `conditions`), for the toy world also what
    tokens show (`transforms.Shown`; -1 for padding and what is given beside),
    `segments` int32 [r, m], the
    clip's number in the row from 1 on (0: padding), `frames` int32 and `fps` float32
    [r, k], a clip's frames of tokens (0: no clip) and frames a second, and the
    transform's other arrays, [r, k, ...]. What is given beside a clip follows it.

    A damaged record is not replaced, since another one of its length may not exist: its
    tokens become padding.

    Args:
      source: latents, of any sizes.
      transform: as of `loader.Batches`, of a record and the condition of the clip; see
        `transforms.LatentsAndText`.
      planner: of the rows.
      patch: latent voxels of a token.
      start_step, num_steps: the first step, and how many.
      process_index, process_count: this process among those that share the rows.
    """

    instead: ClassVar[str] = "its place in the row stays empty"  # of a damaged clip

    source: loader.Source
    transform: Callable
    planner: Planner
    patch: tuple[int, int, int]
    start_step: int
    num_steps: int
    process_index: int = 0
    process_count: int = 1

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, item: int) -> tuple[dict[str, np.ndarray], tuple]:
        number = self.start_step + int(item)
        step = self.planner.step(number)
        share = len(step.rows) // self.process_count
        first = self.process_index * share
        rows = step.rows[first : first + share]
        cells = [
            (row, place) for row in range(share) for place in range(len(rows[row]))
        ]
        clips = [rows[row][place] for row, place in cells]
        wanted = [[clip.index, *clip.condition.others] for clip in clips]
        read = iter(self.source.read([index for some in wanted for index in some]))
        loaded = [[next(read) for _ in some] for some in wanted]
        numbers = [(first + row) * step.shape.clips + place for row, place in cells]
        randoms = loader.example_rngs(self.planner.seed, number, numbers)
        damaged: dict[str, str] = {}
        examples = {}
        for cell, clip, (record, *others), random in zip(
            cells, clips, loaded, randoms, strict=True
        ):
            try:
                for one in (record, *others):
                    if isinstance(one, records.CorruptRecord):
                        raise one
                example = self.transform(record, random, clip.condition, others)
                examples[cell] = example, record.fps
            except records.CorruptRecord as error:
                damaged[error.id] = str(error)
        like = next((example for example, _ in examples.values()), None) or self._any()
        return self._join(step.shape, share, examples, like), tuple(damaged.items())

    def _any(self) -> Mapping[str, np.ndarray]:
        """Some example, where no clip of a step can be read: all of it is padding."""
        for index in range(len(self.source)):
            (record,) = self.source.read([index])
            if not isinstance(record, records.CorruptRecord):
                random = np.random.default_rng(0)
                return self.transform(record, random, conditions.Condition())
        raise loader.TooManyCorruptRecords("all records are damaged")

    def _join(
        self, shape: Shape, rows: int, examples: Mapping, example: Mapping
    ) -> dict[str, np.ndarray]:
        """Lays examples, by (row, place), into arrays; the last says what they hold."""
        wide = example["latents"].shape[-1] * math.prod(self.patch)
        batch = {
            "tokens": np.zeros((rows, shape.tokens, wide), np.float32),
            "places": np.zeros((rows, shape.tokens, 3), np.float32),
            "slots": np.zeros((rows, shape.tokens), np.int8),
            "segments": np.zeros((rows, shape.tokens), np.int32),
            "frames": np.zeros((rows, shape.clips), np.int32),
            "fps": np.ones((rows, shape.clips), np.float32),
        }
        apart = {"latents", "start", "beside", "times"}
        of_tokens = {"slots", *example.keys() & _SHOWN}
        for name in example.keys() & _SHOWN:
            size = (rows, shape.tokens, *example[name].shape[1:])
            batch[name] = np.full(size, -1, example[name].dtype)
        for name, array in example.items():
            if name not in apart | of_tokens:
                size = (rows, shape.clips, *array.shape)
                batch[name] = np.zeros(size, array.dtype)
        used = [0] * rows
        for (row, place), (example, fps) in examples.items():
            tokens_mc, places_m3 = patches(example["latents"], self.patch)
            batch["frames"][row, place] = places_m3[-1, 0] + 1
            places_m3 = places_m3 + np.float32([example["start"], 0, 0])
            for time, latent_hwc in zip(
                example["times"], example["beside"], strict=True
            ):
                more_mc, more_m3 = patches(latent_hwc[None], self.patch)
                tokens_mc = np.concatenate([tokens_mc, more_mc])
                more_m3 = more_m3 + np.float32([time, 0, 0])
                places_m3 = np.concatenate([places_m3, more_m3])
            here = row, slice(used[row], used[row] + len(tokens_mc))
            used[row] += len(tokens_mc)
            batch["tokens"][here] = tokens_mc
            batch["places"][here] = places_m3
            for name in of_tokens:
                batch[name][here] = example[name]
            batch["segments"][here] = place + 1
            batch["fps"][row, place] = fps
            for name, array in example.items():
                if name not in apart | of_tokens:
                    batch[name][row, place] = array
        return batch
