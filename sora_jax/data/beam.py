"""Runs the parts of a data job on Apache Beam, by any of its runners.

No data flows through Beam. Each part of a job writes one file into the job's folder, so
the pipeline has a single step, and the runner decides where and when parts are made. All
of its workers must see the job's folders at the same paths.

A worker of Beam makes its parts in a process of `workers.run`. So the limits of an item
hold there too, and a file that crashes its decoder costs only that file: it does not fail
the bundle again and again.

Beam pickles what it sends to its workers, functions by their names: `sora_jax` must be
importable there.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping

from sora_jax.data import workers

_DIRECT, _DASK = "DirectRunner", "DaskRunner"
_RUNNERS = {
    # Beam's own DirectRunner prefers Prism, a program that it downloads.
    _DIRECT: "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    # Beam finds it by its full name only.
    _DASK: "apache_beam.runners.dask.dask_runner.DaskRunner",
}
_DASK_PARTITIONS = {"--dask_npartitions", "--dask_partition_size"}
_MISSING = (
    "--runner needs Apache Beam, which takes older versions of some libraries than "
    "requirements.txt: install launch/requirements/beam.txt into an environment of its "
    "own, and run this command with that (sora_jax/data/README.md)"
)
# What a process that makes parts imports.
_PRELOAD = (
    "sora_jax.data.shards",
    "sora_jax.data.video_clips",
    "sora_jax.data.toy_clips",
)
_POLL = 1.0  # seconds


class BeamError(ValueError):
    """A runner cannot be used, or has not made all parts; the message says why."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A runner of Beam.

    Args:
      runner: its name, such as "DirectRunner", "DaskRunner" or "DataflowRunner".
      options: of Beam and of the runner, such as "--direct_num_workers=2".

    Raises:
      BeamError: Beam or the runner is not installed, or an option is wrong.
    """

    runner: str
    options: tuple[str, ...] = ()

    def __post_init__(self):
        self._pipeline()

    def run(
        self,
        tasks: Mapping[int, workers.Task],
        *,
        bounds: workers.Bounds,
        is_done: Callable[[int], bool],
        on_done: Callable[[int], None],
    ) -> None:
        """Runs all tasks.

        Args:
          tasks: by the numbers of their parts. Each is picklable and stores its result;
            a runner may run it again, even while it is running.
          bounds: of each item; see `workers.run`.
          is_done: whether a part's result is stored; picklable.
          on_done: called once for each part whose result has been stored.

        Raises:
          BeamError: the results of some parts are not there in the end.
        """
        pipeline, beam = self._pipeline(), _import()
        _ = (
            pipeline
            | "parts" >> beam.Create([*tasks.items()])
            | "make" >> beam.Map(_make, bounds, is_done)
        )
        # In a thread, since runners hold back Ctrl-C until all of their workers end.
        running, missing, pause = _Run(pipeline), set(tasks), _POLL
        running.start()
        while missing:
            alive = running.is_alive()
            running.join(pause)
            began = time.monotonic()
            for part in sorted(filter(is_done, missing)):
                missing.remove(part)
                on_done(part)
            pause = max(_POLL, 20 * (time.monotonic() - began))
            if not alive:
                break
        running.join()
        failure = running.failure
        if missing and failure is None:
            raise BeamError(
                f"{self.runner} has ended, and {len(missing)} of {len(tasks)} parts are "
                "not there: all of its workers must see the same folder"
            )
        if missing:
            raise BeamError(
                f"{self.runner} failed with {len(missing)} of {len(tasks)} parts to go: "
                f"{_last_line(failure)}; the same command goes on"
            ) from failure

    def _pipeline(self):
        """An empty pipeline for the runner."""
        beam = _import()
        try:
            runner = beam.runners.create_runner(_RUNNERS.get(self.runner, self.runner))
        except (AttributeError, ImportError, ValueError) as error:
            raise BeamError(f"--runner {self.runner}: {error}") from None
        # Workers would print what they do; their failures are ours.
        options = ["--default_sdk_harness_log_level=ERROR", *self.options]
        named = {option.partition("=")[0] for option in options}
        if self.runner == _DASK and not named & _DASK_PARTITIONS:
            options.append("--dask_partition_size=1")  # by default 128 parts are one
        said = io.StringIO()
        options = beam.options.pipeline_options.PipelineOptions(options)
        try:
            with contextlib.redirect_stderr(said):
                known = options.get_all_options()
                given = options.get_all_options(retain_unknown_options=True)
        except SystemExit:
            reason = said.getvalue().rpartition("error: ")[2].strip()
            raise BeamError(f"--beam_options: {reason}") from None
        if unknown := sorted(given.keys() - known.keys()):
            raise BeamError(
                f"--beam_options: Beam has no option --{unknown[0]} for {self.runner}"
            )
        try:
            return beam.Pipeline(runner=runner, options=options)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise BeamError(f"--beam_options: {reason}") from None


def _import():
    """The module of Beam."""
    try:
        import apache_beam
    except ModuleNotFoundError:
        raise BeamError(_MISSING) from None
    return apache_beam


class _Run(threading.Thread):
    """Runs a pipeline, and keeps what it raises."""

    failure: Exception | None = None

    def __init__(self, pipeline):
        super().__init__(daemon=True)
        self._pipeline = pipeline

    def run(self) -> None:
        try:
            result = self._pipeline.run()
            try:
                result.wait_until_finish()
            finally:
                if client := getattr(result, "client", None):  # of Dask
                    client.close()
        except Exception as error:  # of any type, by the runner
            self.failure = error


def _make(
    numbered_task: tuple[int, workers.Task],
    bounds: workers.Bounds,
    is_done: Callable[[int], bool],
) -> None:
    """Makes a part, if it is missing; called by Beam in its workers."""
    part, task = numbered_task
    if is_done(part):  # an earlier attempt at its bundle made it
        return
    if multiprocessing.current_process().daemon:
        raise RuntimeError(
            "the worker may not start processes: start Dask's workers with --no-nanny "
            "or with DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment"
        )
    parts = workers.run(task, [part], num_workers=1, bounds=bounds, preload=_PRELOAD)
    for _ in parts:
        pass


def _last_line(error: BaseException) -> str:
    """The reason in an error of a runner, whose text may hold several tracebacks."""
    for line in reversed(str(error).splitlines()):
        if line.strip() and not line.strip().startswith("[while running"):
            return line.strip()
    return type(error).__name__
