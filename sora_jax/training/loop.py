"""The training loop: one for every objective.

Restore or start, then: fetch a batch, dispatch the step, read the metrics of the step
before, evaluate and save where due, stop cleanly when asked to.
"""

import contextlib
import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.core import progress, rng, sharding
from sora_jax.training import checkpoint, optim
from sora_jax.training import metrics as run_metrics
from sora_jax.training import state as states
from sora_jax.training import step as steps

# The code with which a job exits that saved and stopped because it was told to:
# "temporary failure, start me again" (sysexits.h).
PREEMPTED_EXIT_CODE = 75


@dataclasses.dataclass(frozen=True)
class Config:
    """How long a run is, and what happens on the way."""

    num_steps: int = 1000
    log_every: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only at the end
    accumulation: int = 1  # micro-batches in a step
    max_skipped_in_a_row: int = 20  # steps that are not finite


class Preempted(Exception):
    """The run saved its state and stopped because it was asked to."""


class Evaluator(Protocol):
    """Measures a state; the same class runs in training and in `evaluate.py`."""

    def run(self, params: dict) -> Iterator[tuple[str, float]]:
        """Yields names and values for the averaged weights of a step."""


class _StopRequest:
    """Remembers SIGTERM or Ctrl-C; agreed on by all processes at the same step.

    A second Ctrl-C does not wait for the step.
    """

    def __init__(self):
        self._asked = False

    def __enter__(self):
        # With several processes JAX's own service listens and finds a common step.
        self._mine = (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        )
        self._before = {}
        if self._mine:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def at(self, step: int) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


def to_device(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Joins each process's rows into global arrays, rows over the batch axes."""
    _, parts = sharding.process_rows(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding.named(mesh, "batch", *(None,) * (leaf.ndim - 1)),
            leaf,
            (leaf.shape[0] * parts, *leaf.shape[1:]),
        )
        for name, leaf in batch.items()
    }


def train(
    config: Config,
    optim_config: optim.Config,
    objective: steps.Objective,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    *,
    seed: int,
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    initial: Callable[[], Mapping[str, states.Params]] = dict,
    fixed: Callable[[], dict[str, states.Params]] = dict,
    row_flops: float = 0.0,
    peak_flops: float = 0.0,
    evaluators: Mapping[str, Evaluator] | None = None,
    profile: range | None = None,
) -> states.TrainState:
    """Trains until `config.num_steps`, from the folder's newest checkpoint if any.

    Args:
      config, optim_config: lengths and optimizer.
      objective: networks and loss.
      batches: start step -> context manager and iterator over this process's rows.
      seed: root of all randomness of the run.
      folder: run folder; `checkpoints/` and `metrics.jsonl` are written to it.
      mesh: the mesh, which must be set.
      initial: reads what a new run begins with in place of random parameters, by
        network; they are freed once the state is made.
      fixed: reads the parameters of the networks that are used and not trained.
      row_flops: training FLOPs of one row, for the utilisation (0: not logged).
      peak_flops: FLOP/s of all devices together.
      evaluators: by name; their values are logged as `name/value`.
      profile: steps that are traced into `folder/profile`.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      FloatingPointError: too many steps in a row were not finite.
    """
    optimizer = optim.make(optim_config, config.num_steps)
    process = jax.process_index()

    # Restore or start.
    chrono = run_metrics.Chrono()
    held = fixed()
    make_state = jax.jit(
        lambda given: states.init(
            objective.networks, optimizer, rng.key(seed, "init"), given, held.keys()
        )
    )
    saver = checkpoint.Checkpointer(
        folder / "checkpoints",
        every=config.checkpoint_every,
        keep=config.keep_checkpoints,
    )
    if saver.latest() is None:
        with chrono("init"):
            state = jax.block_until_ready(make_state(initial()))
    else:
        with chrono("restore"):
            state, meta = saver.restore(abstract_state(make_state, mesh))
        chrono.seconds = dict(meta["seconds"])
    state = dataclasses.replace(state, fixed=held)
    start = int(state.step)

    train_step = jax.jit(
        steps.make_train_step(
            objective,
            optimizer,
            seed=seed,
            num_steps=config.num_steps,
            ema_decay=optim_config.ema_decay,
            accumulation=config.accumulation,
        ),
        donate_argnums=0,
    )
    log = run_metrics.MetricsFile(
        folder / "metrics.jsonl", start_step=start, write=process == 0
    )
    sums = run_metrics.Accumulator()
    rows_since_log, seconds_at_log = 0, dict(chrono.seconds)
    bar = progress.Progress(
        config.num_steps, "train", "steps", start=start, process_index=process
    )

    def settle(pending) -> None:
        """Reads the metrics of a dispatched step; writes a row where one is due."""
        nonlocal rows_since_log, seconds_at_log
        step, rows, metrics = pending
        with chrono("step"):
            metrics = jax.device_get(metrics)
        _check_finite(metrics, config, step)
        sums.add(metrics)
        rows_since_log += rows
        if step % config.log_every and step != config.num_steps:
            return
        spent = {
            name: seconds - seconds_at_log.get(name, 0.0)
            for name, seconds in chrono.seconds.items()
        }
        values = sums.take(objective.metric_names)
        busy = spent.get("step", 0.0) + spent.get("data", 0.0)
        values["clips_per_second"] = rows_since_log / busy
        values["data_wait_share"] = spent.get("data", 0.0) / busy
        if row_flops and peak_flops:
            values["mfu"] = values["clips_per_second"] * row_flops / peak_flops
        values["seconds"] = sum(chrono.seconds.values())
        log.write(step, values)
        bar.update(0, loss=values["loss"])
        rows_since_log, seconds_at_log = 0, dict(chrono.seconds)

    def evaluate(step: int) -> None:
        with chrono("eval"):
            for name, evaluator in (evaluators or {}).items():
                measured = evaluator.run(state.ema | state.fixed)
                found = {f"{name}/{key}": value for key, value in measured}
                log.write(step, found)

    # The loop.
    pending, compiled = None, set()
    with (
        contextlib.closing(saver),
        contextlib.closing(log),
        _StopRequest() as stop,
        bar,
        batches(start) as rows,
    ):
        for step in range(start + 1, config.num_steps + 1):
            if profile and step == profile.start:
                jax.profiler.start_trace(str(folder / "profile"))
            with chrono("data"):
                batch = to_device(next(rows), mesh)
            shapes = tuple(leaf.shape for leaf in batch.values())
            if shapes in compiled:
                with chrono("step"):
                    state, metrics = train_step(state, batch)
            else:
                if pending:
                    settle(pending)
                    pending = None
                with chrono("compile"):
                    state, metrics = jax.block_until_ready(train_step(state, batch))
                compiled.add(shapes)
            if pending:
                settle(pending)
            pending = (step, shapes[0][0], metrics)

            last, stopping = step == config.num_steps, stop.at(step)
            due = last or stopping or step % config.checkpoint_every == 0
            measured = last or (config.eval_every and step % config.eval_every == 0)
            traced = profile and step == profile.stop
            if due or measured or traced:
                settle(pending)
                pending = None
            if traced:
                jax.profiler.stop_trace()
            if measured:
                evaluate(step)
            if due:
                with chrono("save"):
                    meta = {"seconds": dict(chrono.seconds)}
                    saver.save(step, state, meta, force=True)
            bar.update(1)
            if stopping and not last:
                raise Preempted(f"stopped at step {step}, as asked; the state is saved")
    return state


def _check_finite(metrics, config: Config, step: int) -> None:
    in_a_row = float(metrics.pop("skipped_in_a_row")[0])
    if in_a_row >= config.max_skipped_in_a_row:
        raise FloatingPointError(
            f"at step {step} the last {in_a_row:.0f} losses or gradients were not "
            "finite: lower the learning rate or look at the data of these steps"
        )


def abstract_state(make_state, mesh: jax.sharding.Mesh) -> states.TrainState:
    """Shapes, dtypes and shardings of a state, without making one."""

    def one(leaf):
        layout = leaf.sharding.spec if leaf.sharding else jax.P()  # None for scalars
        sharding_of_leaf = jax.NamedSharding(mesh, layout)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of_leaf)

    return jax.tree.map(one, jax.eval_shape(make_state, {}))
