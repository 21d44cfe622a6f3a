"""A process that dies or hangs costs the item that it was at; a slow one none."""

import functools
import importlib.util
import signal
import subprocess
import sys
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
            bounds=workers.Bounds(silence=4),
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


def test_too_much_memory_or_time_costs_the_item_that_asked_for_it():
    source = clips.Clips(num=8, per_part=4, hogs=(1,), endless=(6,))
    task = functools.partial(collect, source)
    bounds = workers.Bounds(seconds=8, memory=500 << 20)
    found = dict(workers.run(task, [0, 1], num_workers=2, bounds=bounds))
    lost = {
        1: ("item-1", "it asks for too much memory"),
        6: ("item-6", "it takes longer than the limit of 8 s"),
    }
    for part in (0, 1):
        whole = range(4 * part, 4 * part + 4)
        assert found[part] == [lost.get(k, f"clip-{k}") for k in whole]


def test_a_process_whose_parent_is_gone_ends_itself():
    program = (
        "from sora_jax.data import workers\n"
        "workers._ORPHANED = 0\n"
        "workers._begin_item(workers.Bounds(seconds=1))\n"
        "while True: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_workers_do_not_import_the_main_module(monkeypatch):
    """Nor JAX with it, which takes 130 MB and a second."""
    job = importlib.util.find_spec("sora_jax.prepare")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", job)
    ((_, found),) = workers.run(clips.modules, [0], num_workers=1)
    assert "sora_jax.data.workers" in found
    assert not {"jax", "sora_jax.prepare"} & {*found}


def test_a_failure_carries_its_traceback():
    task = functools.partial(collect, clips.Clips(fails_at=1))
    with pytest.raises(RuntimeError, match="KeyError: 'interrupted here'"):
        list(workers.run(task, [0], num_workers=1))


def test_what_serves_many_items_does_not_count_against_one():
    bounds = workers.Bounds(memory=128 << 20)
    found = workers.run(clips.keeps_memory, [0], num_workers=1, bounds=bounds)
    assert [*found] == [(0, (True, False, 200 << 20))]
