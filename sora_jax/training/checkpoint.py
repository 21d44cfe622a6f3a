"""Checkpoints of a run, and weights as files; the only importer of Orbax.

A run folder's `checkpoints/` holds whole train states, written while training goes on.
A component folder (`vae/` in a denoiser's run, an exported model) holds
`config.json` and `weights.safetensors`: numbers and literals only, no code.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from orbax.checkpoint import v1 as orbax

from sora_jax.core import config as configs
from sora_jax.core import paths, trees
from sora_jax.training import state as states


class NotSaved(OSError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpointer:
    """Saves and restores the train states of one run.

    Args:
      folder: the run's checkpoint folder.
      every: steps between saves; `keep`: how many of the newest stay, 0: all.
    """

    def __init__(self, folder: str | pathlib.Path, *, every: int, keep: int):
        self.every = every
        self._orbax = orbax.training.Checkpointer(
            pathlib.Path(folder).absolute(),
            save_decision_policy=(
                orbax.training.save_decision_policies.FixedIntervalPolicy(every)
            ),
            preservation_policy=orbax.training.preservation_policies.LatestN(
                keep or None
            ),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The newest finished step; None where there is none."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(
        self, step: int, state: states.TrainState, meta: Mapping, *, force: bool = False
    ) -> None:
        """Saves in the background where the step is due, or now if forced.

        Returns when the arrays are copied off the device. An error of the save before
        is raised here.

        Raises:
          NotSaved: one of the two could not be written.
        """
        if not (force or (step % self.every == 0)) or step == self.latest():
            return
        self.wait()
        with _writing(self._orbax.directory):
            self._orbax.save_checkpointables_async(
                step, {"state": _fields(state), "meta": dict(meta)}, force=True
            )

    def restore(
        self, abstract: states.TrainState, step: int | None = None
    ) -> tuple[states.TrainState, dict]:
        """Reads a state into the shapes, dtypes and shardings of `abstract`.

        Raises:
          ValueError: the checkpoint's tree differs from the wanted one.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self._orbax.directory} holds no checkpoint")
        found = self._orbax.load_checkpointables(
            step, {"state": _fields(abstract), "meta": None}
        )
        return states.TrainState(**found["state"]), found["meta"]

    def close(self) -> None:
        """Waits for the save in the background and raises its error, if any."""
        with _writing(self._orbax.directory):
            self._orbax.close()

    def wait(self) -> None:
        """Waits until nothing is being written; raises NotSaved where it failed."""
        with _writing(self._orbax.directory):
            self._orbax.wait()


@contextlib.contextmanager
def _writing(folder: pathlib.Path):
    """Turns what Orbax raises of a full disk and the like, whatever it is, to NotSaved."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        told = paths.error_of(str(error), folder)
        raise NotSaved(
            f"{folder}: a checkpoint could not be written ({told.strerror or told}); "
            "those before it are kept"
        ) from error


def _fields(state: states.TrainState) -> dict:
    names = [field.name for field in dataclasses.fields(state)]
    return {name: getattr(state, name) for name in names if name != "fixed"}


def unflatten(flat: Mapping[str, np.ndarray], like: Mapping, where: str) -> dict:
    """The inverse of `trees.flatten`, strict about names and shapes.

    Raises:
      ValueError: naming every missing, unexpected and mis-shaped entry.
    """
    wanted = trees.flatten(like)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - flat.keys())]
    problems += [
        f"{name} is unexpected" for name in sorted(flat.keys() - wanted.keys())
    ]
    problems += [
        f"{name} has shape {tuple(flat[name].shape)}, wanted {tuple(leaf.shape)}"
        for name, leaf in sorted(wanted.items())
        if name in flat and tuple(flat[name].shape) != tuple(leaf.shape)
    ]
    if problems:
        raise ValueError(f"{where} does not fit the network: " + "; ".join(problems))

    return trees.map_paths(lambda name, _: flat[name], like)


def save_weights(
    folder: str | pathlib.Path, params: Mapping, config: Mapping | object
) -> None:
    """Writes a component folder: `weights.safetensors` and `config.json`.

    Args:
      folder: where to.
      params: nested dict of float32 arrays.
      config: the network's frozen dataclass, or a mapping of literals.
    """
    folder = pathlib.Path(folder)
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    flat = {
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in trees.flatten(params).items()
    }
    paths.write_atomically(folder / "weights.safetensors", safetensors.numpy.save(flat))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    paths.write_atomically(folder / "config.json", text)


def weights_digest(folder: str | pathlib.Path) -> str:
    """Returns 16 hex digits that name a component's weights and config."""
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    joined = "".join(map(paths.sha256_file, files))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What is needed to use a run: its config, averaged weights and step."""

    config: ml_collections.ConfigDict
    params: dict
    step: int
    folder: pathlib.Path


def steps(folder: str | pathlib.Path) -> list[int]:
    """The steps of a run folder's finished checkpoints, oldest first."""
    found = pathlib.Path(folder).glob("checkpoints/*")
    return sorted(int(step.name) for step in found if step.name.isdigit())


def has_any(folder: str | pathlib.Path) -> bool:
    """Whether a run folder holds a finished checkpoint."""
    return bool(steps(folder))


def check_kept(folder: str | pathlib.Path, step: int) -> None:
    """Checks that a run folder holds the checkpoint of a step.

    Raises:
      FileNotFoundError: it does not; the message names those that it holds.
    """
    if step not in (kept := steps(folder)):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of step {step}, only of {kept}; the run's "
            "config says how many stay (loop.keep_checkpoints)"
        )


def saved(folder: str | pathlib.Path, step: int) -> str | None:
    """16 hex digits that tell a checkpoint from any other of the same step, by its times.

    None where the run folder does not hold it.
    """
    # Orbax writes into it when the checkpoint was begun and finished, to the nanosecond.
    file = pathlib.Path(folder) / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    try:
        return paths.sha256_file(file)[:16]
    except FileNotFoundError:
        return None


def networks_in(folder: str | pathlib.Path) -> dict[str, int]:
    """The networks whose averaged weights a run's newest checkpoint holds: bytes each.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
    """
    with _reader(pathlib.Path(folder)) as (reader, step):
        found = reader.checkpointables_metadata(step).metadata["state"]["ema"]
    return {
        name: sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(found[name])
        )
        for name in found
    }


def load_run(
    folder: str | pathlib.Path,
    *,
    step: int | None = None,
    average: bool = True,
    layouts: Mapping | None = None,
) -> LoadedRun:
    """Reads the weights of a run folder.

    Args:
      folder: the run folder.
      step: which checkpoint, by default the newest.
      average: the moving average of the weights, or else the weights themselves.
      layouts: a sharding for each parameter; None: whole arrays on the host.

    Raises:
      FileNotFoundError: the folder holds no run or no finished checkpoint, or none of
        that step.
    """
    folder = pathlib.Path(folder)
    config = configs.read(folder)
    part = "ema" if average else "params"
    step, state = _read(folder, step, part, layouts)
    return LoadedRun(config, state[part], step, folder)


def save_run(folder: str | pathlib.Path, params: Mapping) -> None:
    """Writes weights as the checkpoint of a run's step 0, without an optimizer's state.

    They are the average and nothing else: for use, and to begin another run with.
    """
    checkpoints = (pathlib.Path(folder) / "checkpoints").absolute()
    with _writing(checkpoints), orbax.training.Checkpointer(checkpoints) as writer:
        writer.save_checkpointables(0, {"state": {"ema": dict(params)}})


def read_state(folder: str | pathlib.Path, step: int | None = None) -> dict:
    """Reads a run's whole train state onto the host, as plain nested containers."""
    return _read(pathlib.Path(folder), step)[1]


@contextlib.contextmanager
def _reader(folder: pathlib.Path):
    """Yields what reads a run's checkpoints, or parts of them, and the newest step."""
    checkpoints = (folder / "checkpoints").absolute()
    missing = f"{folder} holds no checkpoint yet: train it first"
    if not checkpoints.is_dir():
        raise FileNotFoundError(missing)
    context = orbax.Context()
    context.pytree.loading.partial_load = True
    with context, orbax.training.Checkpointer(checkpoints) as reader:
        if reader.latest is None:
            raise FileNotFoundError(missing)
        yield reader, reader.latest.step


def _read(
    folder: pathlib.Path,
    step: int | None,
    part: str | None = None,
    layouts: Mapping | None = None,
) -> tuple[int, dict]:
    """Reads a state, or one part of it and nothing else; on the host without layouts."""
    with _reader(folder) as (reader, newest):
        step = newest if step is None else step
        check_kept(folder, step)
        found = reader.checkpointables_metadata(step).metadata["state"]
        if part is not None:
            found = {part: found[part]}

        # Host arrays, so that a run is read on any machine, whatever mesh wrote it.
        def on_host(leaf):
            return np.empty(leaf.shape, leaf.dtype)

        def on_device(leaf, layout):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

        wanted = (
            jax.tree.map(on_host, found)
            if layouts is None
            else {part: jax.tree.map(on_device, found[part], layouts)}
        )
        return step, reader.load_checkpointables(step, {"state": wanted})["state"]
