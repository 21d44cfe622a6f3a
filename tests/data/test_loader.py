"""The order is a pure function, the batch does not depend on who reads it."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.data import loader, records


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Record i is the number i; the damaged ones are known."""

    num: int
    damaged: tuple[int, ...] = ()

    def __len__(self):
        return self.num

    def read(self, indices):
        return [
            records.CorruptRecord("file", f"r{i}", "flipped")
            if i in self.damaged
            else i
            for i in indices
        ]


def large(record, rng):
    return {"large": np.full(5003, record, np.int64), **example(record, rng)}


def example(record, rng):
    return {"index": np.int64(record), "drawn": np.array([rng.random(), rng.random()])}


def batches(source, **changes):
    arguments = {"seed": 3, "batch_size": 8, "num_steps": 6} | changes
    with loader.make_loader(source, example, **arguments) as rows:
        return list(rows)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 700),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
)
def test_an_order_is_a_permutation(num, seed, epoch):
    order = loader.permute(np.arange(num), num, seed, np.full(num, epoch))
    assert sorted(order) == list(range(num))


def test_orders_differ_by_seed_and_epoch_and_keep_nothing_in_place():
    num = 1000
    orders = [
        loader.permute(np.arange(num), num, seed, np.full(num, epoch))
        for seed in range(20)
        for epoch in range(20)
    ]
    assert len({tuple(order) for order in orders}) == 400
    at_place = np.mean([order == np.arange(num) for order in orders])
    assert abs(at_place - 1 / num) < 3e-4
    neighbours = np.mean([np.abs(np.diff(order)) == 1 for order in orders])
    assert abs(neighbours - 2 / num) < 5e-4


def test_the_order_of_a_seed_never_changes():
    """A run that goes on after an update of the code must see its own data."""
    order = loader.permute(np.arange(10), 10, 7, np.array([0] * 5 + [1] * 5))
    assert order.tolist() == ORDER
    (rng,) = loader.example_rngs(7, 11, [5])
    assert rng.integers(0, 1 << 62, 2).tolist() == DRAWN


ORDER = [0, 3, 5, 1, 4, 0, 6, 2, 3, 7]
DRAWN = [263858391203431034, 4284801356005667145]


def test_an_epoch_shows_every_record_once():
    rows = np.concatenate([b["index"] for b in batches(Numbers(24), num_steps=6)])
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))
    assert rows[:24].tolist() != rows[24:].tolist()


@pytest.mark.parametrize("start", [1, 4])
def test_a_restart_goes_on_at_any_step(start):
    whole = batches(Numbers(20))
    same(whole[start:], batches(Numbers(20), start_step=start, num_steps=6 - start))


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(count):
    whole = batches(Numbers(20))
    shares = [
        batches(Numbers(20), process_index=index, process_count=count)
        for index in range(count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    same(whole, joined)


def test_examples_draw_their_own_numbers():
    drawn = np.concatenate([b["drawn"] for b in batches(Numbers(5), num_steps=50)])
    assert len(np.unique(drawn)) == drawn.size
    assert abs(drawn.mean() - 0.5) < 0.05
    other = np.concatenate([b["drawn"] for b in batches(Numbers(5), seed=4)])
    assert not np.isin(other, drawn).any()


def test_a_damaged_record_is_replaced_by_the_next_valid_one(caplog):
    damaged = (3, 11)
    clean = batches(Numbers(16), batch_size=16, num_steps=4)
    with loader.make_loader(
        Numbers(16, damaged),
        example,
        seed=3,
        batch_size=16,
        num_steps=4,
        max_corrupt_share=0.2,
    ) as rows:
        found = list(rows)
        assert sorted(rows.quarantine) == ["r11", "r3"]
        assert rows.num_replaced == 8
    assert sum("takes its place" in message for message in caplog.messages) == 2
    for before, after in zip(clean, found, strict=True):
        order = before["index"].tolist()
        for row in range(16):
            expected = row
            while order[expected] in damaged:
                expected = (expected + 1) % 16
            assert after["index"][row] == order[expected]
        np.testing.assert_array_equal(before["drawn"], after["drawn"])


def test_damage_met_by_the_transform_follows_the_same_rule():
    def transform(record, rng):
        if record == 5:
            raise records.CorruptRecord("video bytes", "r5", "does not decode")
        return {"index": np.int64(record)}

    with loader.make_loader(
        Numbers(8),
        transform,
        seed=0,
        batch_size=8,
        num_steps=1,
        max_corrupt_share=0.2,
    ) as rows:
        assert 5 not in next(rows)["index"]
        assert list(rows.quarantine) == ["r5"]


def test_too_many_damaged_records_end_the_run():
    with pytest.raises(loader.TooManyCorruptRecords, match="2 of 16 .* 1.6 that are"):
        batches(Numbers(16, (3, 11)), batch_size=16, max_corrupt_share=0.1)
    with pytest.raises(loader.TooManyCorruptRecords, match="all 4"):
        batches(Numbers(4, (0, 1, 2, 3)), max_corrupt_share=1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 6, "process_count": 4}, "cannot be shared"),
        ({"process_index": 2, "process_count": 2}, "not among"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(Numbers(8), **changes)
    with pytest.raises(ValueError, match="no records"):
        batches(Numbers(0))


_PROGRAM = """
    import numpy as np
    from sora_jax.data import loader
    from tests.data import test_loader

    def main():
        def make(num_steps):
            return loader.make_loader(
                test_loader.Numbers(20), test_loader.large, seed=3, batch_size=8,
                num_steps=num_steps, num_workers=2,
            )
        before = test_loader.blocks_of_ours()
        with make(6) as rows:
            got = list(rows)
        assert not test_loader.blocks_of_ours() - before
        for batch in got:
            large = batch.pop("large")
            assert type(large) is np.ndarray and (large.T == batch["index"]).all()
        test_loader.same(got, test_loader.batches(test_loader.Numbers(20)))
        with make(None) as rows:
            next(rows)
            raise SystemExit(7)

    if __name__ == "__main__":
        main()
"""


def blocks_of_ours():
    """Returns blocks of shared memory of the size that the program's batches have."""
    return {
        entry.name
        for entry in os.scandir("/dev/shm")
        if entry.name.startswith("psm_") and entry.stat().st_size == 8 * 5003 * 8
    }


def test_worker_processes_give_the_same_and_leave_nothing_behind(tmp_path):
    """Closed at the end and in the middle, by an exception, without parsed absl flags:
    no noise at exit, no shared memory left, no process left."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_PROGRAM))
    before = blocks_of_ours()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert not blocks_of_ours() - before
