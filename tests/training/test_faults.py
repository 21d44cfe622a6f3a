"""What fails beside the steps costs no state: batches, logs, evaluators, full disks."""

import contextlib
import errno
import os
import signal

import jax
import numpy as np
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.models import layers
from sora_jax.training import checkpoint, evaluation, loop, metrics, optim, stopping
from sora_jax.training import state as states

STEPS = 6


class Line:
    """Learns a line: compiled in a moment."""

    networks = states.Networks(lambda rngs: {"line": layers.Linear(3, 1, rngs=rngs)})
    metric_names = {}

    def draw(self, key, batch, share):
        return batch

    def loss(self, modules, batch):
        error = modules["line"](batch["x"]) - batch["y"]
        return (error**2).sum(), float(len(error)), {}


def batch(step):
    x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1, keepdims=True)}


def train(folder, change=lambda step: None, evaluators=None, profile=None, **fields):
    """Six steps; `change(step)` is called before each batch, and may raise."""

    def batches(start):
        def rows():
            for step in range(start + 1, STEPS + 1):
                change(step)
                yield batch(step)

        return contextlib.nullcontext(rows())

    fields = {"log_every": 1, "checkpoint_every": 100} | fields
    mesh = meshes.make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return loop.train(
            loop.Config(num_steps=STEPS, **fields),
            optim.Config(muon_learning_rate=0.0),
            Line(),
            batches,
            seed=0,
            folder=folder,
            mesh=mesh,
            evaluators=evaluators,
            profile=profile,
        )


def rows(folder):
    return metrics.read(folder / "metrics.jsonl")


def weights(state):
    return np.asarray(state.params["line"]["kernel"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a fault: its rows and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    state = train(folder)
    return [row["loss"] for row in rows(folder)], weights(state)


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_goes_on(folder, whole):
    """The same command ends as if nothing had been."""
    np.testing.assert_array_equal(weights(train(folder)), whole[1])
    assert [row["step"] for row in rows(folder)] == [*range(1, STEPS + 1)]
    assert [row["loss"] for row in rows(folder)] == whole[0]


def test_a_batch_that_cannot_be_read_costs_one_step(whole, tmp_path, capsys):
    def unreadable(step):
        if step == 4:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path, unreadable)
    assert checkpoint.steps(tmp_path) == [3]
    assert "train: step 3 is saved\n" in capsys.readouterr().err
    assert_goes_on(tmp_path, whole)


def test_a_log_on_a_full_disk_costs_its_row(tmp_path, whole, monkeypatch):
    write = metrics.MetricsFile.write

    def until(self, step, values):
        return full() if step == 4 else write(self, step, values)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.MetricsFile, "write", until)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path)
    (saved,) = checkpoint.steps(tmp_path)
    assert saved >= 4
    np.testing.assert_array_equal(weights(train(tmp_path)), whole[1])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 5, 6]


def test_a_checkpoint_on_a_full_disk_is_one_sentence(tmp_path, whole, monkeypatch):
    """Orbax tells of it late, with words of TensorStore."""
    said = (
        'RESOURCE_EXHAUSTED: Failed writing: "x": Failed to write 9 bytes to file 11: '
        "No space left on device [os_error_code='28']"
    )
    found = checkpoint.orbax.training.Checkpointer
    wait = found.wait

    def until(self):
        wait(self)
        if self.latest and self.latest.step == 4:
            raise ValueError(said)

    with monkeypatch.context() as patched:
        patched.setattr(found, "wait", until)
        with pytest.raises(checkpoint.NotSaved) as raised:
            train(tmp_path, checkpoint_every=2)
    assert str(raised.value) == (
        f"{tmp_path / 'checkpoints'}: a checkpoint could not be written (No space left "
        "on device); earlier ones are kept"
    )
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert_goes_on(tmp_path, whole)


def test_a_step_whose_save_failed_is_not_said_to_be_saved(
    tmp_path, monkeypatch, capsys
):
    """The save in the background fails and, before that is known, the next batch."""
    listed = checkpoint._list_digests

    async def fails_at_4(folder):
        if "/4.orbax" in str(folder):
            full()
        await listed(folder)

    def unreadable(step):
        if step == 5:
            raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "_list_digests", fails_at_4)
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path, unreadable, checkpoint_every=2)
    assert checkpoint.steps(tmp_path) == [2]
    assert "saved" not in capsys.readouterr().err


class Broken:
    def run(self, params, step):
        yield "norm", 1.0
        raise RuntimeError("a bug")


class Killed:
    """Stands for kill -9 in an evaluation: after it nothing is saved."""

    def run(self, params, step):
        yield "norm", 1.0
        raise KeyboardInterrupt


@pytest.mark.parametrize("every", [0, 4])
def test_the_state_is_saved_before_it_is_measured(tmp_path, whole, every):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, evaluators={"size": Killed()}, eval_every=every)
    assert checkpoint.steps(tmp_path) == [every or STEPS]
    assert_goes_on(tmp_path, whole)


def test_a_signal_does_not_end_the_last_save(tmp_path, monkeypatch):
    close = checkpoint.Checkpointer.close

    def signalled(self):
        signal.raise_signal(signal.SIGINT)
        close(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "close", signalled)
    try:
        train(tmp_path)
    except KeyboardInterrupt:
        pytest.fail("the save was interrupted")
    assert checkpoint.steps(tmp_path) == [STEPS]


def test_one_process_alone_stops_at_sigterm_also_where_a_scheduler_started_it(
    monkeypatch,
):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with stopping.StopRequest() as stop:
        assert not stop.at(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.at(2)


def test_an_evaluator_that_fails_ends_no_run(tmp_path, whole, capsys):
    with pytest.raises(evaluation.Failed, match="'bad' failed at step 6") as raised:
        train(tmp_path, evaluators={"bad": Broken()}, eval_every=2)
    said = capsys.readouterr().err
    for step in (2, 4, 6):
        assert f"'bad' failed at step {step} (RuntimeError: a bug; " in said
    assert "Traceback" not in said
    np.testing.assert_array_equal(weights(raised.value.state), whole[1])
    assert checkpoint.steps(tmp_path) == [4, STEPS]
    assert_goes_on(tmp_path, whole)
