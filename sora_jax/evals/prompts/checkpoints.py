"""The checkpoints of a run: which are scored, and the clips that each one samples.

A run that is still training writes checkpoints and deletes old ones meanwhile, so a
checkpoint may disappear at any time.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.core import config as configs
from sora_jax.core import progress, rng
from sora_jax.evals import protocol
from sora_jax.evals.prompts import make_clips, samples, scoring, toyworld
from sora_jax.generation import cache_calibration, pipeline, runs
from sora_jax.training import checkpoint, run_folder, state

ALL = "all"
POLL_SECONDS = 10.0  # of a run that is followed
QUIET_MINUTES = 30  # without a written file, after which a warning is printed
_DELETE_SECONDS = 5.0  # that deleting a checkpoint may take


class Unreadable(ValueError):
    """A checkpoint is damaged, or was deleted while it was read."""


def chosen(folder: pathlib.Path, asked: Sequence[str]) -> list[int]:
    """Returns the steps that --checkpoints selects, oldest first.

    Args:
      folder: the run folder.
      asked: steps, or `ALL`; empty for the newest undamaged checkpoint.

    Raises:
      FileNotFoundError: the folder holds no run or no checkpoint.
      ValueError: `asked` is neither steps nor `ALL`.
    """
    runs.read_config(folder)
    if not asked:
        return [checkpoint.newest_good(folder)]
    kept = checkpoint.steps(folder)
    if not kept:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: train it first")
    if [*asked] == [ALL]:
        return kept
    if not all(step.isdigit() for step in asked):
        wrong = ",".join(asked)
        raise ValueError(
            f"--checkpoints is all, or steps such as 1000,2000, not {wrong}"
        )
    return sorted({int(step) for step in asked})


def read_seeds(asked: Sequence[str]) -> tuple[int, ...]:
    """Returns the seeds of --seeds.

    Raises:
      ValueError: there are none, or one is not a whole number from 0 to 2^64 - 1.
    """
    valid = [seed.isdecimal() and int(seed) < rng.SEEDS for seed in asked]
    if not valid or not all(valid):
        raise ValueError(
            f"--seeds are whole numbers from 0, such as 0,1, not {','.join(asked)!r}"
        )
    return tuple(map(int, asked))


def follow(
    folder: pathlib.Path, is_scored: Callable[[int], bool], note: Callable[[str], None]
) -> Iterator[int]:
    """Yields steps that are not scored yet as they appear, oldest first.

    It polls until the run's last step. Checkpoints that were deleted before they could be
    read are reported to `note`; a run that has stopped writing causes a warning.

    Args:
      folder: the run folder, possibly without a checkpoint yet.
      is_scored: returns whether a step was scored before.
      note: takes a sentence for the user.

    Raises:
      FileNotFoundError: there is no such run.
    """
    done, warned = set(), False
    while True:
        loop = configs.read(folder).loop  # may change when the run is resumed
        kept = checkpoint.steps(folder)
        newest = max(kept, default=0)
        every = loop.checkpoint_every or loop.num_steps
        since = run_folder.changed_at(folder, "loop.checkpoint_every")
        due = [step for step in range(every, newest, every) if step > since]
        missing = [s for s in due if s not in done and s not in kept]
        gone = [step for step in missing if not is_scored(step)]
        if gone:
            steps = ", ".join(f"{step:,}" for step in gone)
            note(
                f"step {steps}: deleted before it was read, so it is not scored; "
                f"the run keeps its newest {loop.keep_checkpoints} "
                "(loop.keep_checkpoints)"
            )
        waiting = [step for step in kept if step not in done and not is_scored(step)]
        done.update(missing, waiting[:1] or kept)
        if waiting:
            yield waiting[0]
            warned = False
        elif kept and newest >= loop.num_steps:
            return
        else:
            minutes = (time.time() - _last_written(folder)) / 60
            if minutes > QUIET_MINUTES and not warned:
                print(
                    f"evaluate: {folder} is at step {newest:,} of {loop.num_steps:,} and "
                    f"has written nothing for {minutes:.0f} minutes; still waiting "
                    "(Ctrl-C to stop)",
                    file=sys.stderr,
                )
                warned = True
            time.sleep(POLL_SECONDS)


def _last_written(folder: pathlib.Path) -> float:
    files = [
        folder / name for name in ("config.py.txt", "metrics.jsonl", "checkpoints")
    ]
    return max(file.stat().st_mtime for file in files if file.exists())


def on_every_process(steps: Iterator[int]) -> Iterator[int]:
    """Yields the steps of process 0's iterator on all processes.

    If the iterator raises, or the caller closes this generator, it ends on the other
    processes too.
    """
    if jax.process_count() == 1:
        yield from steps
        return
    while True:
        try:
            mine = next(steps, -1) if jax.process_index() == 0 else -1
        except BaseException:
            _broadcast(-1)
            raise
        if (step := _broadcast(mine)) < 0:
            return
        try:
            yield step
        except GeneratorExit:
            _broadcast(-1)
            raise


def _broadcast(value: int) -> int:
    """Returns process 0's value."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _on_all(flag: bool) -> bool:
    """Returns whether the flag is set on all processes."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).all())


def load(folder: pathlib.Path, step: int) -> checkpoint.LoadedRun:
    """Reads the averaged weights (EMA) of a checkpoint onto the current mesh.

    Raises:
      FileNotFoundError: there is no such run or checkpoint.
      Unreadable: the checkpoint is damaged, or was deleted meanwhile.
    """
    if not _on_all(step in checkpoint.steps(folder)):
        checkpoint.check_kept(folder, step)
        raise Unreadable(f"step {step:,}: deleted before all processes could read it")
    try:
        return runs.load(folder, step=step)
    except Exception as error:  # deleted files cause errors of many types
        until = time.monotonic() + _DELETE_SECONDS
        while step in checkpoint.steps(folder) and time.monotonic() < until:
            time.sleep(0.1)
        if step not in checkpoint.steps(folder):
            raise Unreadable(
                f"step {step:,}: deleted while it was read, so it is not scored"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unreadable(
            f"step {step:,}: the checkpoint cannot be read, so it is not scored: "
            f"{lines[0][:300]}"
        ) from error


class Sampling:
    """Samples clips with the checkpoints of a run, for each seed, and untrained weights.

    Programs are compiled for the first checkpoint and reused for all; clips of untrained
    weights are sampled once.

    Args:
      folder: the run folder.
      suites: the prompts.
      parts: folder that keeps the clips of untrained weights.
      seeds: a set of clips is sampled for each.
      batch_size: clips per batch.
      mesh: over which weights and clips are sharded.
      asked: values by the names in `samples.MAKING`; None: the model's own.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        suites: Sequence[toyworld.Suite],
        parts: pathlib.Path,
        *,
        seeds: Sequence[int],
        batch_size: int,
        mesh: jax.sharding.Mesh,
        asked: Mapping[str, object],
    ):
        self._mesh = mesh
        self.folder, self.suites, self.seeds = folder, [*suites], tuple(seeds)
        self._parts, self._batch_size, self._asked = parts, batch_size, dict(asked)
        self._untrained: make_clips.Videos | None = None
        self.config = runs.read_config(folder)
        self.settings = runs.settings(self.config)
        self.making = {
            name: getattr(self.settings, name) if value is None else value
            for name, value in ((n, self._asked.get(n)) for n in samples.MAKING)
        }
        self._caches = bool(self.making["step_cache"])

    @functools.cached_property
    def _networks(self) -> state.Networks:
        return runs.networks_of(
            self.config, runs.load_tokenizer(self.folder, self.config)
        )

    def saved(self, step: int) -> str | None:
        """Returns an id that differs if the step is trained anew; None if deleted."""
        return checkpoint.saved(self.folder, step)

    def made_with(self) -> dict[str, object]:
        """Returns what decides the scores of a step, apart from its weights."""
        return {
            "model": self.folder.resolve().name,
            "config": run_folder.digest(self.folder),
            "vae": checkpoint.weights_digest(self.folder / "vae"),
            "prompts": {s.name: protocol.text_digest(s.texts) for s in self.suites},
            "seeds": self.seeds,
            # Left out without a step cache, so that older scores stay comparable.
            "making": {
                name: value
                for name, value in self.making.items()
                if self._caches or name != "step_cache"
            },
            "code": protocol.code_version(),
        } | self._calibration()

    def _calibration(self) -> dict[str, str]:
        """Returns the digest of the step cache's calibration, if a cache is used."""
        if not self._caches:
            return {}
        read = cache_calibration.read(self.folder / cache_calibration.FILE)
        return {"step_cache": read.digest()}

    def facts(self, *steps: int) -> dict[str, object]:
        """Returns the facts at the head of a report on these steps."""
        shown = [f"{step:,}" for step in steps]
        if len(shown) > 8:
            shown[4:-3] = ["…"]
        return {
            "Model": self.folder,
            "Step" if len(steps) == 1 else "Steps": ", ".join(shown),
            "Parameters": f"{state.count(self._networks.abstract()) / 1e6:.2f} M",
            "Config": run_folder.digest(self.folder),
            "Sampler": "{sampler}, {num_inference_steps} steps, guidance "
            "{guidance_scale:g}, shift {shift:g}".format(**self.making)
            + f", step cache {self.making['step_cache']:g}" * self._caches,
            "Seeds": ", ".join(map(str, self.seeds)),
        }

    def material(self, step: int, parts: pathlib.Path) -> samples.Material:
        """Samples the clips of a checkpoint, or reads those that were sampled before.

        Args:
          step: of the checkpoint.
          parts: folder that keeps its clips.

        Raises:
          FileNotFoundError, Unreadable: see `load`; on this process or another one.
        """
        saved, run, error = checkpoint.saved(self.folder, step), None, None
        with jax.set_mesh(self._mesh):
            try:
                run = load(self.folder, step)
            except (FileNotFoundError, Unreadable) as raised:
                error = raised
            # Sampling is collective: no process may start if another one has failed.
            if not _on_all(run is not None):
                raise error or Unreadable(
                    f"step {step:,}: another process could not read it, so it is not "
                    "scored"
                )
            videos = self._sample(run, saved, parts)
        return samples.Material(
            self.suites, videos, self.making, self.facts(step), seeds=self.seeds
        )

    def _sample(self, run: checkpoint.LoadedRun, saved: str | None, parts):
        few = [s.head(make_clips.UNTRAINED) for s in self.suites if not s.held_out]
        count = len(self.seeds) * sum(map(len, self.suites))
        if self._untrained is None:
            count += sum(map(len, few))
        steps = self.making["num_inference_steps"]
        with progress.Progress(
            count * steps, "sample", "clip steps", compiles=True
        ) as bar:

            def sample(kept, pipe, row, suites, seed, saved, **other):
                return make_clips.sample(
                    samples.Store(kept),
                    pipe,
                    row,
                    suites,
                    seed,
                    saved=saved,
                    progress=bar.update,
                    batch_size=self._batch_size,
                    **self._asked | other,
                )

            pipe = pipeline.Pipeline.from_run(run)
            videos = {}
            for seed in self.seeds:
                row = f"{scoring.MODEL}, seed {seed}"
                videos[row] = sample(parts, pipe, row, self.suites, seed, saved)
            if self._untrained is None:
                first = jax.jit(self._networks.init)(jax.random.key(0))
                other = dataclasses.replace(run, params=first, step=0)
                del pipe
                pipe = pipeline.Pipeline.from_run(other)
                args = (scoring.UNTRAINED, few, self.seeds[0], None)
                # The step cache is not calibrated for untrained weights.
                self._untrained = sample(self._parts, pipe, *args, step_cache=0.0)
        return videos | {scoring.UNTRAINED: self._untrained}
