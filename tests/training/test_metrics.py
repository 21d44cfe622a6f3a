"""Rows of a run through restarts, full disks and steps that are not finite."""

import errno
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import paths
from sora_jax.data import captions
from sora_jax.training import metrics
from tests.training import tiny


def opened(path, start_step):
    return metrics.MetricsFile(path, start_step=start_step, write=True)


def filled(path, steps):
    log = opened(path, 0)
    for step in range(1, steps + 1):
        log.write(step, {"loss": 1 / step})
    log.close()
    return path.read_bytes()


def test_a_restart_keeps_earlier_rows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = filled(path, 9)

    def never(*arguments):
        pytest.fail("a file that is right was written again")

    with monkeypatch.context() as patched:
        patched.setattr(paths, "write_atomically", never)
        log = opened(path, 9)
    log.write(10, {"loss": math.inf})
    log.close()
    assert path.read_bytes() == before + b'{"step": 10, "loss": null}\n'


@pytest.mark.parametrize(
    "torn", [b'{"step": 10, "lo', b"12\n", b"\x00\x00\xff", b'"step"\n', b""]
)
def test_later_rows_and_torn_lines_are_dropped(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = filled(path, 9)
    path.write_bytes(before + torn)
    log = opened(path, 7)
    log.write(8, {"loss": 2.0})
    log.close()
    lines = before.splitlines(keepends=True)[:7]
    assert path.read_bytes() == b"".join(lines) + b'{"step": 8, "loss": 2.0}\n'


def test_a_full_disk_at_a_restart_loses_no_row(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = filled(path, 199)

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(paths.os, "fsync", no_space)
    with pytest.raises(OSError) as raised:
        opened(path, 5)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_row_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = filled(path, 9)
    log = opened(path, 9)

    class Full:
        """A disk that takes five more bytes."""

        def __init__(self, file):
            self._file, self._left = file, 5

        def write(self, content):
            if not self._left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self._file.write(content[: self._left])
            self._left -= written
            return written

        def __getattr__(self, name):
            return getattr(self._file, name)

    disk, log._file = log._file, Full(log._file)
    with pytest.raises(OSError, match="No space left on device") as raised:
        log.write(10, {"loss": 1.0})
    assert raised.value.filename == str(path) and path.read_bytes() == before
    log._file = disk
    log.write(10, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in metrics.read(path)] == [*range(1, 11)]


def test_a_bad_step_is_counted_and_left_out_of_the_means():
    sums = metrics.Accumulator()
    names = {"band": ["low", "high"]}
    for loss, high in ((2.0, 6.0), (math.nan, math.inf), (4.0, 2.0)):
        band = (np.array([1.0, high]), np.array([1.0, 2.0]))
        sums.add({"loss": (loss * 2, 2.0), "band": band, "norm": (loss, 1.0)})
    assert sums.take(names) == {
        "loss": 3.0, "norm": 3.0, "band/low": 1.0, "band/high": 2.0,
        "steps_not_finite": 1,
    }  # fmt: skip
    sums.add({"loss": (math.nan, 1.0)})
    assert math.isnan(sums.take({})["loss"])
    sums.add({"loss": (1.0, 1.0)})
    assert sums.take({}) == {"loss": 1.0}


def test_losses_are_given_by_the_tier_that_was_read():
    """A row whose text was dropped counts as one without."""
    objective, random = tiny.objective(), np.random.default_rng(0)
    tier_b = random.integers(0, len(captions.REALISED), 24).astype(np.int32)
    loss_b = random.random(24, np.float32)
    batch = tiny.batch(0, 24) | {"text_tier": tier_b}

    def summed(batch, loss_b):
        drawn = objective.draw(jax.random.key(1), batch, jnp.zeros(()))
        clips = {
            name: drawn[name].reshape(24, 1) for name in ("tau", "drop", "text_tier")
        }
        loss_bk = loss_b[:, None]
        found = objective._summed(loss_bk, jnp.ones_like(loss_bk), clips)
        return found[2], drawn["drop"][:, 0]

    found, drop_b = jax.jit(summed)(batch, loss_b)
    assert 0 < drop_b.sum() < 24
    read_b = np.where(drop_b, captions.REALISED.index("none"), tier_b)
    wanted = {
        f"loss_tier/{name}": loss_b[read_b == place].mean()
        for place, name in enumerate(captions.REALISED)
        if (read_b == place).any()
    }
    means = metrics.means(found, objective.metric_names)
    means = {name: means[name] for name in means if name.startswith("loss_tier")}
    assert means == pytest.approx(wanted, rel=1e-5) and len(means) > 4
