"""A process that dies or hangs costs the item that it was at; a slow one none."""

import functools
import time

import pytest

from sora_jax.data import records, workers
from tests.data import clips


def collect(source, part, note, avoid):
    found = source.clips(source.plan(source.items)[0][part], note, avoid)
    return [
        c.id if isinstance(c, records.ClipRecord) else (c.file, c.reason) for c in found
    ]


def test_a_death_and_a_hang_cost_one_item_each_and_a_slow_one_none():
    source = clips.Clips(num=8, per_part=4, kills=(2,), hangs=(5,), slow=(3,))
    counted = []
    began = time.monotonic()
    found = dict(
        workers.run(
            functools.partial(collect, source),
            [0, 1],
            num_workers=2,
            on_finished=counted.append,
            stall_seconds=4,
        )
    )
    assert time.monotonic() - began < 90
    assert found[0] == [
        "clip-0",
        "clip-1",
        ("item-2", "the decoder died on it (exit code -9)"),
        "clip-3",
    ]
    assert found[1][1] == ("item-5", "it made no progress for 4 s")
    assert [item for item in found[1] if item != found[1][1]] == [
        "clip-4",
        "clip-6",
        "clip-7",
    ]
    assert sum(counted) == 6


def test_a_failure_carries_its_traceback():
    task = functools.partial(collect, clips.Clips(fails_at=1))
    with pytest.raises(RuntimeError, match="KeyError: 'interrupted here'"):
        list(workers.run(task, [0], num_workers=1))
