"""The training loop: one for every objective.

Restore or start, then: fetch a batch, dispatch the step, read the metrics of the previous
step, save and evaluate when due, stop cleanly when asked to. A failure outside of the
steps (in a batch, the log or an evaluator) does not lose the state.
"""

import collections
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.core import config as configs
from sora_jax.core import progress, sharding
from sora_jax.training import checkpoint, evaluation, optim, stopping
from sora_jax.training import metrics as run_metrics
from sora_jax.training import state as states
from sora_jax.training import step as steps
from sora_jax.training import trace as traces
from sora_jax.training import trackers as run_trackers

# The steps between which a run of loop.minutes measures its speed.
_FIT_FROM, FIT_AT = 10, 40
_SLACK = 0.03  # share of the time that is left for what was not measured

Every = Annotated[int, configs.Range("[1, 2147483647]", 0, "only at the end")]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long a run is, and how often it logs, saves and evaluates."""

    num_steps: configs.Count = 1000
    # Wall time of a new run until its last step, at most num_steps. After FIT_AT steps
    # the run measures its speed, and then knows how many steps it will take.
    minutes: Annotated[float, configs.Range("[0.1, 1e6]", 0, "take num_steps")] = 0.0
    # Steps between rows of metrics, saves and evaluations; 0: only at the end. The
    # state is also saved before each evaluation.
    log_every: Every = 20
    checkpoint_every: Every = 200
    eval_every: Every = 0
    # How many of the newest checkpoints are kept; 0: all of them.
    keep_checkpoints: Annotated[int, configs.Range("[1, 1e6]", 0, "all")] = 2
    accumulation: configs.Size = 1  # micro-batches in a step
    max_skipped_in_a_row: configs.Count = 20  # steps that are not finite; then it fails

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that happens every `every` steps (0: at the end) is due."""
        return step == self.num_steps or every > 0 and step % every == 0


def to_device(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Joins each process's rows into global arrays, sharded over the batch axes."""
    _, parts = sharding.process_rows(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding.named_sharding(mesh, "batch", *(None,) * (leaf.ndim - 1)),
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
    evaluators: Mapping[str, evaluation.Evaluator] | None = None,
    trackers: run_trackers.Tracker = run_trackers.Trackers({}),
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
      initial: reads the parameters that a new run starts from, by network; networks
        without an entry start at random. They are freed once the state is made.
      fixed: reads the parameters of networks that are used but not trained.
      row_flops: training FLOPs of one row, for the utilisation (0: not logged).
      peak_flops: FLOP/s of all devices together.
      evaluators: by name; their values are logged as `name/value`.
      trackers: get the metrics as well, and are closed at the end.
      profile: steps that are traced into `folder/profile`, see `trace.Trace`.

    Raises:
      stopping.Preempted: SIGTERM or Ctrl-C arrived; the state is saved.
      FloatingPointError: too many steps in a row were not finite.
      evaluation.Failed: an evaluator failed at the last step, or in one of several
        processes.
      OSError: the log or a checkpoint could not be written. A run of one process first
        tries to save the state, as it does for all errors not listed above.
    """
    began, is_fitted = time.monotonic(), not config.minutes
    process = jax.process_index()

    # Restore or start.
    chrono = run_metrics.Chrono()
    fixed_params = fixed()
    make_state = jax.jit(
        states.make_init(
            objective.networks,
            optim.make(optim_config, config.num_steps),
            seed,
            tuple(fixed_params),
        )
    )
    saver = checkpoint.Checkpointer(
        folder / "checkpoints", keep=config.keep_checkpoints
    )
    if saver.latest() is None:
        with chrono("init"):
            state = jax.block_until_ready(make_state(initial()))
    else:
        with chrono("restore"):
            state, meta = saver.restore(abstract_state(make_state, mesh))
        chrono.seconds = dict(meta["seconds"])
        if config.minutes and meta["num_steps"]:
            config = dataclasses.replace(config, num_steps=int(meta["num_steps"]))
            is_fitted = True
    state = dataclasses.replace(state, fixed=fixed_params)
    start = int(state.step)

    def make_train_step():
        made = steps.make_train_step(
            objective,
            optim.make(optim_config, config.num_steps),
            seed=seed,
            num_steps=config.num_steps,
            ema_decay=optim_config.ema_decay,
            accumulation=config.accumulation,
        )
        return jax.jit(made, donate_argnums=0)

    train_step = make_train_step()
    log = run_metrics.MetricsFile(
        folder / "metrics.jsonl", start_step=start, write=process == 0
    )
    sums = run_metrics.Accumulator()
    rows_since_log, seconds_at_log = 0, dict(chrono.seconds)
    bar = progress.Progress(
        config.num_steps,
        "train",
        "steps",
        start=start,
        process_index=process,
        compiles=True,
    )

    def write(step: int, values: Mapping[str, float]) -> None:
        log.write(step, values)
        trackers.scalars(step, values)

    def settle(leave: int = 0) -> None:
        """Reads the pending metrics, except those of the newest `leave` steps."""
        while len(pending) > leave:
            log_step(*pending.popleft())

    def log_step(step: int, rows: int, metrics) -> None:
        """Reads the metrics of a dispatched step; writes a row when one is due."""
        nonlocal rows_since_log, seconds_at_log
        with chrono("step"):
            metrics = jax.device_get(metrics)
        _check_finite(metrics, config, step)
        sums.add(metrics)
        rows_since_log += rows
        if not config.is_due(config.log_every, step):
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
        write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
        rows_since_log, seconds_at_log = 0, dict(chrono.seconds)

    def save(step: int) -> None:
        with chrono("save"):
            about = {
                "seconds": dict(chrono.seconds),
                "num_steps": config.num_steps * is_fitted,
            }
            saver.save(step, state, about)

    @contextlib.contextmanager
    def state_saved_on_error():
        """Saves the state if something fails that leaves the state valid."""
        try:
            yield
        except (FloatingPointError, stopping.Preempted):
            raise
        except Exception:
            # Not with several processes: saving needs all of them, and the others do
            # not know of the failure.
            with contextlib.suppress(OSError, RuntimeError, FloatingPointError):
                whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
                if jax.process_count() == 1 and whole and int(state.step) > start:
                    step = int(state.step)
                    if saver.latest() != step:
                        with contextlib.suppress(checkpoint.NotSaved):
                            saver.wait()  # an earlier save may have failed
                        save(step)
                    saver.wait()
                    print(f"train: step {step} is saved", file=sys.stderr)
                    settle()
            raise

    def evaluate(step: int) -> None:
        with chrono("eval"):
            for values in measuring.run(step, state.ema | state.fixed):
                write(step, values)

    def fit(step: int, seconds_per_step: float) -> Config:
        """The config with as many steps as fit into the time that is left."""
        with run_metrics.compile_seconds() as compiling:
            before = time.monotonic()
            evaluate(step)
            # Later evaluations need not be compiled.
            evaluation_seconds = time.monotonic() - before - sum(compiling)
        left = 60 * config.minutes - (time.monotonic() - began)
        # The step is compiled once more, for its learning rate; the last evaluation is
        # that of the last step.
        left -= chrono.seconds["compile"] + evaluation_seconds
        if config.eval_every:
            seconds_per_step += evaluation_seconds / config.eval_every
        more = max(1, int((1 - _SLACK) * left / seconds_per_step))
        more = int(multihost_utils.broadcast_one_to_all(np.int64(more)))
        num_steps = min(step + more, config.num_steps)
        bar.total = num_steps
        if process == 0:
            print(
                f"train: {config.minutes:g} minutes are {num_steps} steps here, at "
                f"{1 / seconds_per_step:.2f} steps/s with evaluations",
                file=sys.stderr,
            )
        return dataclasses.replace(config, num_steps=num_steps)

    # The loop.
    pending, compiled = collections.deque(), set()
    tracing = traces.Trace(folder / "profile", profile, start, config.num_steps)
    measuring = evaluation.Evaluation(evaluators or {}, folder)
    with (
        stopping.StopRequest() as stop,  # until the last save is written
        contextlib.closing(saver),
        contextlib.closing(log),
        contextlib.closing(trackers),
        bar,
        tracing,
        state_saved_on_error(),
        batches(start) as rows,
    ):
        step = start
        while step < config.num_steps:
            step += 1
            tracing.before(step)
            with chrono("data"):
                batch = to_device(next(rows), mesh)
            shapes = tuple(leaf.shape for leaf in batch.values())
            if shapes in compiled:
                with chrono("step"):
                    state, metrics = train_step(state, batch)
            else:
                settle()
                with chrono("compile"):
                    state, metrics = jax.block_until_ready(train_step(state, batch))
                compiled.add(shapes)
            pending.append((step, shapes[0][0], metrics))
            settle(leave=1)

            last, stops = step == config.num_steps, stop.at(step)
            measured = bool(evaluators) and config.is_due(config.eval_every, step)
            # Also before an evaluation: if that kills the process (a signal, out of
            # memory), the same command resumes after it.
            saves = stops or measured or config.is_due(config.checkpoint_every, step)
            if saves or tracing.is_last(step):
                settle()
            tracing.after(step)
            if saves:
                save(step)
            if measured:
                evaluate(step)
            bar.update(1)
            if not is_fitted and step - start == _FIT_FROM:
                settle()
                fit_from = time.monotonic()
            if not is_fitted and step - start == FIT_AT and step < config.num_steps:
                settle()
                rate = (time.monotonic() - fit_from) / (FIT_AT - _FIT_FROM)
                config, is_fitted = fit(step, rate), True
                train_step, compiled = make_train_step(), set()
                bar.compiling()
            if stops and not last:
                raise stopping.Preempted(
                    f"stopped at step {step}, as asked; the state is saved"
                )
    if measuring.failure:
        raise evaluation.Failed(measuring.failure, state)
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
