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
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import jax
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import progress, sharding
from sora_jax.training import checkpoint, evaluation, optim, stopping
from sora_jax.training import metrics as run_metrics
from sora_jax.training import state as states
from sora_jax.training import step as steps
from sora_jax.training import trace as traces

Every = Annotated[int, configs.Range("[1, 2147483647]", 0, "only at the end")]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long a run is, and how often it logs, saves and evaluates."""

    num_steps: configs.Count = 1000
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
      profile: steps that are traced into `folder/profile`, see `trace.Trace`.

    Raises:
      stopping.Preempted: SIGTERM or Ctrl-C arrived; the state is saved.
      FloatingPointError: too many steps in a row were not finite.
      evaluation.Failed: an evaluator failed at the last step, or in one of several
        processes.
      OSError: the log or a checkpoint could not be written. A run of one process first
        tries to save the state, as it does for all errors not listed above.
    """
    optimizer = optim.make(optim_config, config.num_steps)
    process = jax.process_index()

    # Restore or start.
    chrono = run_metrics.Chrono()
    fixed_params = fixed()
    make_state = jax.jit(
        states.make_init(objective.networks, optimizer, seed, tuple(fixed_params))
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
    state = dataclasses.replace(state, fixed=fixed_params)
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
        log.write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
        rows_since_log, seconds_at_log = 0, dict(chrono.seconds)

    def save(step: int) -> None:
        with chrono("save"):
            saver.save(step, state, {"seconds": dict(chrono.seconds)})

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

    # The loop.
    pending, compiled = collections.deque(), set()
    tracing = traces.Trace(folder / "profile", profile, start, config.num_steps)
    measuring = evaluation.Evaluation(evaluators or {}, folder)
    with (
        stopping.StopRequest() as stop,  # until the last save is written
        contextlib.closing(saver),
        contextlib.closing(log),
        bar,
        tracing,
        state_saved_on_error(),
        batches(start) as rows,
    ):
        for step in range(start + 1, config.num_steps + 1):
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
                with chrono("eval"):
                    for values in measuring.run(step, state.ema | state.fixed):
                        log.write(step, values)
            bar.update(1)
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
