"""The loop on every mesh, through restarts, bad numbers and micro-batches."""

import dataclasses
import itertools
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.core import rng
from sora_jax.training import checkpoint, loop, metrics, optim, stopping
from sora_jax.training import state as states
from sora_jax.training import step as steps
from tests.training import tiny

MESHES = {
    "one": {"fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "2 x 2 x 2": {"replica": 2, "fsdp": 2, "tensor": 2},
    "context": {"fsdp": 2, "ring": 2, "ulysses": 2},
}


def make_mesh(shape):
    count = int(np.prod(list(shape.values())))
    return meshes.make_mesh(shape, jax.devices()[:count])


def losses(folder):
    return np.array(
        [row["loss"] for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Ten steps on one device: the folder and the final state on the host."""
    folder = tmp_path_factory.mktemp("one")
    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        state = tiny.train(folder, mesh)
    return folder, jax.device_get(state)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    "name", ["2 x 2 x 2", "context", pytest.param("fsdp 8", marks=pytest.mark.slow)]
)
def test_losses_do_not_depend_on_the_mesh(name, reference, tmp_path):
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        state = tiny.train(tmp_path, mesh)
    found, wanted = losses(tmp_path), losses(reference[0])
    print(name, "largest relative difference", np.abs(found / wanted - 1).max())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    split = state.params["dit"]["blocks"]["ffn"]["up"]["kernel"].sharding.spec
    assert split == jax.P(None, ("fsdp", "ring", "ulysses"), "tensor")


@pytest.mark.parametrize(
    "other", ["context", pytest.param("2 x 2 x 2", marks=pytest.mark.slow)]
)
def test_heads_that_share_keys_learn_the_same_on_every_mesh(other, tmp_path):
    config = dataclasses.replace(tiny.DIT, num_heads=4, num_kv_heads=2)
    found = []
    for name in ("one", other):
        mesh = make_mesh(MESHES[name])
        with jax.set_mesh(mesh):
            state = tiny.train(tmp_path / name, mesh, num_steps=3, config=config)
        assert state.params["dit"]["blocks"]["attn1"]["to_k"]["kernel"].shape[2] == 16
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_noise_is_the_same_on_every_mesh(name):
    objective = tiny.objective()
    draw = jax.jit(lambda batch: objective.draw(rng.key(0, "train", 3), batch, 0.0))
    wanted = draw(tiny.batch(3))
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        found = draw(loop.to_device(tiny.batch(3), mesh))
        for drawn in ("noise", "tau", "drop", "known_tau"):
            assert found[drawn].sharding.spec[0] == ("replica", "fsdp"), drawn
            np.testing.assert_array_equal(found[drawn], wanted[drawn])


def test_micro_batches_change_nothing(reference, tmp_path):
    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        tiny.train(tmp_path, mesh, accumulation=4)
    np.testing.assert_allclose(losses(tmp_path), losses(reference[0]), rtol=1e-5)


def test_a_run_cut_off_goes_on_from_its_last_checkpoint(reference, tmp_path):
    def cut(step, values):
        if step == 8:
            raise KeyboardInterrupt
        return values

    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path, mesh, change=cut, checkpoint_every=3)
        state = tiny.train(tmp_path, mesh, checkpoint_every=3)
    assert_same_bits(state, reference[1])
    np.testing.assert_array_equal(losses(tmp_path), losses(reference[0]))


def test_sigterm_saves_and_the_run_goes_on_exactly(reference, tmp_path):
    def change(step, values):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return values

    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        with pytest.raises(stopping.Preempted, match="step 4"):
            tiny.train(tmp_path, mesh, change=change)
        state = tiny.train(tmp_path, mesh)
    assert_same_bits(state, reference[1])
    # One row a step, none twice.
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    np.testing.assert_array_equal(losses(tmp_path), losses(reference[0]))


def test_a_checkpoint_goes_on_on_another_mesh(reference, tmp_path):
    small, large = make_mesh(MESHES["one"]), make_mesh(MESHES["2 x 2 x 2"])

    def change(step, values):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return values

    with jax.set_mesh(small), pytest.raises(stopping.Preempted):
        tiny.train(tmp_path, small, change=change)
    with jax.set_mesh(large):
        tiny.train(tmp_path, large)
    np.testing.assert_allclose(losses(tmp_path), losses(reference[0]), rtol=1e-5)


def spoiled(step, values):
    if step in (3, 4):
        values["latents"][0] = np.nan
    return values


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    objective = tiny.objective()
    optimizer = optim.make(tiny.OPTIM, 10)
    state = jax.jit(states.make_init(objective.networks, optimizer, 0))({})
    step = jax.jit(
        steps.make_train_step(objective, optimizer, seed=0, num_steps=10, ema_decay=0.9)
    )
    state, _ = step(state, tiny.batch(1))
    after, _ = step(state, spoiled(3, tiny.batch(3)))
    for name in ("params", "ema", "opt_state"):
        assert_same_bits(getattr(after, name), getattr(state, name))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    after, _ = step(after, tiny.batch(4))
    assert (after.skipped, after.skipped_in_a_row) == (1, 0)
    with pytest.raises(AssertionError):
        assert_same_bits(after.params, state.params)


def test_too_many_bad_steps_end_the_run(tmp_path):
    mesh = make_mesh(MESHES["one"])
    with (
        jax.set_mesh(mesh),
        pytest.raises(FloatingPointError, match="step 4 the last 2 losses"),
    ):
        tiny.train(tmp_path, mesh, change=spoiled, max_skipped_in_a_row=2)


def test_evaluators_see_the_average_and_are_logged(tmp_path):
    class Norm:
        def run(self, params, step):
            yield "norm", float(np.sum(jax.tree.leaves(params)[0] ** 2))

    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        state = tiny.train(tmp_path, mesh, eval_every=5, evaluators={"size": Norm()})
    rows = [r for r in metrics.read(tmp_path / "metrics.jsonl") if "size/norm" in r]
    assert [row["step"] for row in rows] == [5, 10]
    final = float(np.sum(jax.tree.leaves(state.ema)[0] ** 2))
    assert rows[-1]["size/norm"] == pytest.approx(final)


def test_given_parameters_take_the_layout_of_random_ones():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    objective = tiny.objective()
    with jax.set_mesh(mesh):
        optimizer = optim.make(tiny.OPTIM, 10)
        make = jax.jit(states.make_init(objective.networks, optimizer, 0))
        begun = make({})
        given = jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.5, jax.numpy.bfloat16),
            begun.params["text_encoder"],
        )
        started = make({"text_encoder": given})
    for before, params, average in zip(
        *(jax.tree.leaves(t) for t in (begun.params, started.params, started.ema)),
        strict=True,
    ):
        assert params.sharding == average.sharding == before.sharding
        np.testing.assert_array_equal(params, average)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(started.ema["text_encoder"]),
        given,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(state.params["dit"]) for state in (begun, started)),
    )


def test_an_interval_of_0_means_only_at_the_end(tmp_path):
    class Steps:
        def run(self, params, step):
            yield "seen", 1.0

    mesh = make_mesh(MESHES["one"])
    never = {"log_every": 0, "checkpoint_every": 0, "eval_every": 0}
    with jax.set_mesh(mesh):
        tiny.train(tmp_path, mesh, evaluators={"e": Steps()}, **never)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [(row["step"], "loss" in row, "e/seen" in row) for row in rows] == [
        (10, True, False), (10, False, True),
    ]  # fmt: skip
    assert checkpoint.steps(tmp_path) == [10]


@pytest.mark.slow
def test_the_loss_learns_what_the_text_says():
    """Two texts, two latents: the loss falls far below that of blind guessing."""
    objective = tiny.objective()
    config = dataclasses.replace(tiny.OPTIM, learning_rate=1e-2)
    optimizer = optim.make(config, 150)
    state = jax.jit(states.make_init(objective.networks, optimizer, 0))({})
    step = jax.jit(
        steps.make_train_step(objective, optimizer, seed=0, num_steps=9, ema_decay=0.9),
        donate_argnums=0,
    )
    ids = np.repeat(np.where(np.arange(8)[:, None] % 2, 5, 9), 6, 1).astype(np.int32)
    sign = np.where(np.arange(8) % 2, 1.0, -1.0)[:, None, None, None, None]
    batch = {
        "latents": np.broadcast_to(3 * sign, (8, 2, 4, 4, 4)).astype(np.float32),
        "text_ids": ids,
        "text_mask": np.ones((8, 6), bool),
    }
    first = last = None
    for _ in range(150):
        state, values = step(state, batch)
        last = float(values["loss"][0] / values["loss"][1])
        first = first or last
    assert last < first / 8, (first, last)

    # Where noise hides the latents, the text alone decides.
    drawn = objective.draw(rng.key(1, "drawn"), batch, 0.0)
    drawn["tau"] = jnp.full_like(drawn["tau"], 0.98)
    drawn |= {name: jnp.zeros_like(drawn[name]) for name in ("drop", "known")}

    @jax.jit
    def loss_of(params, ids):
        modules = objective.networks.bind(params)
        return objective.loss(modules, drawn | {"text_ids": ids})[0]

    right, wrong = (loss_of(state.params, x) for x in (ids, ids[::-1]))
    assert wrong > 4 * right, (right, wrong)


def test_a_run_of_minutes_takes_the_steps_that_fit(tmp_path, monkeypatch, capsys):
    """By a clock on which a step takes a second; compilation counts as it is."""

    def clock():  # at the start, after steps 10 and 40, and when steps are fitted
        times = itertools.chain(
            [0.0, 10.0, 40.0, 42.0, 42.0, 42.0], itertools.repeat(1e9)
        )
        made = types.SimpleNamespace(monotonic=lambda: next(times))
        monkeypatch.setattr(loop, "time", made)

    def cut(step, values):
        if step == 60:
            raise KeyboardInterrupt
        return values

    settings = {"num_steps": 10**6, "minutes": 2.0, "checkpoint_every": 50}
    mesh = make_mesh(MESHES["one"])
    with jax.set_mesh(mesh):
        clock()
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path, mesh, change=cut, **settings)
        said = re.search(r"2 minutes are (\d+) steps here", capsys.readouterr().err)
        fitted = int(said[1])
        compiling = metrics.read(tmp_path / "metrics.jsonl")[0]["seconds"]
        # Two minutes less what has passed, what compiling again takes, and the slack.
        assert 0 <= (40 + 0.97 * 78) - fitted <= compiling + 1
        state = tiny.train(tmp_path, mesh, **settings)  # resumed, it does not fit anew
        assert int(state.step) == fitted
        clock()
        few = tiny.train(tmp_path / "few", mesh, **(settings | {"num_steps": 45}))
        assert int(few.step) == 45  # never more than num_steps
    assert metrics.read(tmp_path / "metrics.jsonl")[-1]["step"] == fitted
