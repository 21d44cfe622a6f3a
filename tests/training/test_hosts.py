"""A run that goes on with 4, then 2, then 8 hosts sees the batches of one host."""

import collections
import itertools

import numpy as np
import pytest

from configs import base
from sora_jax.data import conditions, loader, packing
from sora_jax.training import jobs

# (hosts, steps): the run is stopped twice, and goes on with another number of hosts.
PHASES = [(4, 7), (2, 9), (8, 17)]
GRIDS = [(1, 2, 2), (2, 2, 2), (3, 2, 4), (1, 4, 4), (5, 4, 2)]
TOTAL = sum(count for _, count in PHASES)


class Source:
    """Clip i has latents of i + 1, in one of five sizes or all in one."""

    def __init__(self, num, mixed):
        self.num, self.mixed = num, mixed

    def __len__(self):
        return self.num

    def read(self, indices):
        return [Record(i, GRIDS[i % len(GRIDS) if self.mixed else 1]) for i in indices]


class Record:
    fps = 8.0

    def __init__(self, index, grid):
        self.latents = np.full((*grid, 2), index + 1, np.float32)


def transform(record, random, condition=None, others=()):
    found = {"latents": record.latents, "drawn": random.random(2)}
    if condition is not None:  # of a packed clip
        slots = conditions.slots(condition, record.latents.shape[:3])
        found |= {
            "slots": slots,
            "start": 0,
            "period": np.float32(0),
            "beside": (),
            "times": (),
        }
    return found


def config(batch_size):
    c = base.get_config()
    c.seed, c.data.batch_size, c.model.dit.patch = 11, batch_size, (1, 1, 1)
    return c


def plan(source, window):
    lengths = np.array(
        [one.latents[..., 0].size for one in source.read(range(source.num))]
    )
    return packing.Planner(
        lengths,
        packing.halved(int(lengths.max()), 3, unit=4, clips=4),
        groups=8,
        window=window,
        seed=11,
        cost=packing.Cost(),
    )


def read(monkeypatch, batch_size, source, planner, start, count, hosts):
    """The global batches of some steps, each joined from what the hosts read alone."""
    shares = []
    for host in range(hosts):
        monkeypatch.setattr(
            jobs.sharding, "process_rows", lambda mesh, h=host: (h, hosts)
        )
        made = planner() if planner else None  # each host plans for itself
        with jobs.read_ahead(
            config(batch_size), None, source, transform, start, count, made
        ) as rows:
            shares.append(list(rows))
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def read_phases(monkeypatch, batch_size, source, planner):
    steps, start = [], 0
    for hosts, count in PHASES:
        steps += read(monkeypatch, batch_size, source, planner, start, count, hosts)
        start += count
    return steps


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("num", [44, 88])
def test_plain_batches_on_4_then_2_then_8_hosts(monkeypatch, num):
    """An epoch ends inside a batch (44 clips), or between two (88 clips)."""
    source = Source(num, mixed=False)
    steps = read_phases(monkeypatch, 8, source, None)
    same(steps, read(monkeypatch, 8, source, None, 0, TOTAL, 1))
    seen = np.concatenate([step["latents"][:, 0, 0, 0, 0] for step in steps]) - 1
    assert len(seen) % num == 0
    for epoch in itertools.batched(seen.tolist(), num):
        assert sorted(epoch) == list(range(num))
    drawn = np.concatenate([step["drawn"] for step in steps])
    assert len(np.unique(drawn)) == drawn.size


def test_packed_batches_on_4_then_2_then_8_hosts(monkeypatch):
    """All steps of so many windows that each clip is planned twice."""
    source, window = Source(300, mixed=True), 200
    planner, carried, ends = plan(source, window), [], []
    for number in range(2 * 300 // window):
        made, carried = planner.plan(number, carried)
        ends.append(len(made))
    # The hosts change inside a window.
    assert sum(ends) == TOTAL and ends[0] not in np.cumsum([n for _, n in PHASES])
    steps = read_phases(monkeypatch, 8, source, lambda: plan(source, window))
    same(steps, read(monkeypatch, 8, source, lambda: plan(source, window), 0, TOTAL, 1))
    seen = collections.Counter()
    for step in steps:
        for tokens_mc, segments_m in zip(step["tokens"], step["segments"], strict=True):
            for clip in range(1, segments_m.max() + 1):
                values = np.unique(tokens_mc[segments_m == clip])
                assert len(values) == 1
                seen[int(values[0]) - 1] += 1
    # What fills no step at the end waits for the next window.
    assert 0 < len(carried) < 60
    seen.update(clip.index for clip in carried)
    assert seen == dict.fromkeys(range(300), 2)


def test_hosts_that_read_each_other_s_rows_are_noticed(monkeypatch):
    """The comparison is not empty: hosts in another order give other batches."""
    source = Source(40, mixed=False)
    first, second = (
        loader.make_loader(
            source, transform, seed=11, batch_size=8, num_steps=1,
            process_index=host, process_count=2,
        )
        for host in (0, 1)
    )  # fmt: skip
    with first, second:
        swapped = [next(second), next(first)]
    joined = {name: np.concatenate([s[name] for s in swapped]) for name in swapped[0]}
    with pytest.raises(AssertionError):
        same([joined], read(monkeypatch, 8, source, None, 0, 1, 1))
