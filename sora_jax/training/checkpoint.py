"""Checkpoints of a run, and weights as files; the only importer of Orbax.

A run folder's `checkpoints/` holds whole train states, written in the background:
`STEP/ema` has the averaged weights, `STEP/state` the rest of the train state, `STEP/meta`
what is not an array. Each has a list of digests, which is checked before anything is
read. A released run has no checkpoints, but its averaged weights alone, in the file
`weights.safetensors`. A component folder (`vae/` in a denoiser's run, an exported model) holds
`config.json` and `weights.safetensors`: numbers and literals only, no code.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from orbax.checkpoint import v1 as orbax

from sora_jax.core import config as configs
from sora_jax.core import digests, paths, trees
from sora_jax.training import intact
from sora_jax.training import state as states

_RELEASED = "weights.safetensors"  # of a run folder, with the step as metadata
_OWNER = re.compile(r"process_(\d+)(/|$)")  # in the path of what one process wrote


class _Digested(orbax.handlers.CheckpointableHandler):
    """Orbax's handler of trees, which also writes the list of digests.

    Each process hashes the files that it has just written, which are still in its page
    cache. This happens in the background, before Orbax renames the checkpoint to its
    final name: no process reads files of others, no step waits, and every finished
    checkpoint has its digests.
    """

    def __init__(self):
        self._trees = orbax.handlers.PyTreeHandler()

    async def save(self, directory, checkpointable):
        written = await self._trees.save(directory, checkpointable)

        async def digest():
            await written  # by all processes; their files are merged by then
            await _list_digests(pathlib.Path(await directory.await_creation()))

        return digest()

    async def load(self, directory, abstract_checkpointable=None):
        return await self._trees.load(directory, abstract_checkpointable)

    async def metadata(self, directory):
        return await self._trees.metadata(directory)

    def is_handleable(self, checkpointable):
        return self._trees.is_handleable(checkpointable)

    def is_abstract_handleable(self, abstract_checkpointable):
        return self._trees.is_abstract_handleable(abstract_checkpointable)


async def _list_digests(folder: pathlib.Path) -> None:
    """Writes the list of digests of a part, to which all processes have written."""
    process, count = jax.process_index(), jax.process_count()

    def owner(name: str) -> int:
        match = _OWNER.search(name)
        return int(match[1]) if match else 0

    mine = [name for name in digests.files_in(folder) if owner(name) == process]
    listed = await asyncio.to_thread(digests.hash_files, folder, mine)
    if count > 1:
        mine = f"{digests.FILE}.process_{process}"
        digests.write_list(folder, listed, mine)
        key = f"digests of {folder.parent.name}/{folder.name}"
        await orbax.multihost.sync_global_processes(key, operation_id=str(folder))
        if process:
            return
        for other in range(count):
            file = folder / f"{digests.FILE}.process_{other}"
            listed |= digests.read_list(file)
            file.unlink()
    digests.write_list(folder, listed)


def _context(partial_load: bool = False) -> orbax.Context:
    registry = orbax.handlers.local_registry(include_global_registry=False)
    for name in intact.PARTS:
        registry.add(_Digested, checkpointable_name=name)
    context = orbax.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial_load
    return context


class NotSaved(OSError):
    """A checkpoint could not be written; earlier ones are kept."""


class Checkpointer:
    """Saves and restores the train states of one run.

    If the newest checkpoints are damaged, it says so, renames them to `STEP.damaged`,
    and uses the newest good one.

    Args:
      folder: the run's checkpoint folder.
      keep: how many of the newest checkpoints to keep; 0: all.

    Raises:
      digests.Damaged: all checkpoints are damaged.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int):
        self._folder = pathlib.Path(folder).absolute()
        self._latest = intact.newest(self._folder, intact.PARTS, move_aside=True)
        self._orbax = orbax.training.Checkpointer(
            self._folder,
            context=_context(),
            preservation_policy=orbax.training.preservation_policies.LatestN(
                keep or None
            ),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The newest step that was saved or is being saved; None if there is none."""
        return self._latest

    def save(self, step: int, state: states.TrainState, meta: Mapping) -> None:
        """Saves in the background; does nothing if `step` is the latest.

        Returns once the arrays are copied off the device.

        Raises:
          NotSaved: this save could not start, or the previous one failed.
        """
        if step == self._latest:
            return
        self.wait()
        rest = _fields(state)
        ema = rest.pop("ema")
        about = {**meta, "networks": _sizes(ema)}
        parts = {"ema": ema, "state": rest, "meta": about}
        with _writing(self._folder):
            self._orbax.save_checkpointables_async(step, parts, force=True)
        self._latest = step

    def restore(self, abstract: states.TrainState) -> tuple[states.TrainState, dict]:
        """Reads the latest state into the shapes, dtypes and shardings of `abstract`.

        Raises:
          ValueError: the checkpoint's tree differs from that of `abstract`.
        """
        if self._latest is None:
            raise FileNotFoundError(f"{self._folder} holds no checkpoint")
        rest = _fields(abstract)
        wanted = {"ema": rest.pop("ema"), "state": rest, "meta": None}
        with _context():
            parts = orbax.load_checkpointables(self._folder / str(self._latest), wanted)
        return states.TrainState(ema=parts["ema"], **parts["state"]), parts["meta"]

    def wait(self) -> None:
        """Waits for pending saves; raises NotSaved if one failed."""
        with _writing(self._folder):
            self._orbax.wait()

    def close(self) -> None:
        """Waits as `wait` does, and stops Orbax's threads."""
        with _writing(self._folder):
            self._orbax.close()


@contextlib.contextmanager
def _writing(folder: pathlib.Path):
    """Turns Orbax's errors, which for a full disk have several types, into NotSaved."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        cause = paths.error_of(str(error), folder)
        reason = cause.strerror or str(cause).removeprefix(f"{folder}: ")
        raise NotSaved(
            f"{folder}: a checkpoint could not be written ({reason}); earlier ones are "
            "kept"
        ) from error


def _fields(state: states.TrainState) -> dict:
    names = [field.name for field in dataclasses.fields(state)]
    return {name: getattr(state, name) for name in names if name != "fixed"}


def unflatten(flat: Mapping[str, np.ndarray], like: Mapping, where: str) -> dict:
    """The inverse of `trees.flatten`, strict about names and shapes.

    Raises:
      ValueError: lists every missing, unexpected and mis-shaped entry.
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
    folder: str | pathlib.Path,
    params: Mapping,
    config: Mapping | object,
    dtype: str = "float32",
) -> None:
    """Writes a component folder: `weights.safetensors` and `config.json`.

    Args:
      folder: to write to.
      params: nested dict of float32 arrays.
      config: the network's frozen dataclass, or a mapping of literals.
      dtype: that the weights are stored in.
    """
    folder = pathlib.Path(folder)
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    content = safetensors.numpy.save(_flat(params, dtype))
    digests.store(folder / "weights.safetensors", content)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    digests.store(folder / "config.json", text)


def _flat(params: Mapping, dtype: str) -> dict[str, np.ndarray]:
    flat = trees.flatten(params)
    return {name: np.ascontiguousarray(leaf, dtype) for name, leaf in flat.items()}


def release(folder: str | pathlib.Path, params: Mapping, step: int, dtype: str) -> None:
    """Writes the averaged weights of a run as the weights of a released run.

    Such a run can be used, and another run can start from it, but it cannot be resumed.

    Args:
      folder: to write to.
      params: by network, on the host.
      step: of the checkpoint that they come from.
      dtype: that they are stored in.
    """
    content = safetensors.numpy.save(_flat(params, dtype), {"step": str(step)})
    digests.store(pathlib.Path(folder) / _RELEASED, content)


def is_released(folder: str | pathlib.Path) -> bool:
    """Whether a run folder holds weights without checkpoints."""
    return (pathlib.Path(folder) / _RELEASED).is_file()


def _released_step(folder: pathlib.Path) -> int:
    """The step of a released run.

    Raises:
      digests.Damaged: its file of weights is not one.
    """
    try:
        with safetensors.safe_open(folder / _RELEASED, "numpy") as file:
            return int(file.metadata()["step"])
    except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        raise digests.Damaged(f"{folder / _RELEASED} is damaged: {error}") from None


def weights_digest(folder: str | pathlib.Path) -> str:
    """Returns 16 hex digits that identify a component's weights and config."""
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    joined = "".join(map(paths.sha256_file, files))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's config, averaged weights and step."""

    config: ml_collections.ConfigDict
    params: dict
    step: int
    folder: pathlib.Path


def steps(folder: str | pathlib.Path) -> list[int]:
    """The steps of a run folder's finished checkpoints, oldest first."""
    folder = pathlib.Path(folder)
    if is_released(folder):
        return [_released_step(folder)]
    return intact.steps(folder / "checkpoints")


def has_any(folder: str | pathlib.Path) -> bool:
    """Whether a run folder holds a finished checkpoint."""
    return bool(steps(folder))


def check_kept(folder: str | pathlib.Path, step: int) -> None:
    """Checks that a run folder holds the checkpoint of a step.

    Raises:
      FileNotFoundError: it does not; the message lists the steps that it holds.
    """
    if step not in (kept := steps(folder)):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of step {step}, only of {kept}; the run's "
            "config says how many stay (loop.keep_checkpoints)"
        )


def saved(folder: str | pathlib.Path, step: int) -> str | None:
    """16 hex digits that identify a checkpoint; None if the run folder lacks it.

    A repeated run may have another checkpoint of the same step.
    """
    file = pathlib.Path(folder) / "checkpoints" / str(step) / "ema" / digests.FILE
    if is_released(folder):
        file = pathlib.Path(folder) / _RELEASED
    try:
        return paths.sha256_file(file)[:16]
    except FileNotFoundError:
        return None


def newest_good(folder: str | pathlib.Path) -> int:
    """The newest step of a run folder whose averaged weights are undamaged.

    Reports on stderr which newer checkpoints are damaged.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
      digests.Damaged: all checkpoints are damaged.
    """
    return _choose(pathlib.Path(folder), None, "ema")


def networks_in(folder: str | pathlib.Path) -> dict[str, int]:
    """The networks in a run's newest checkpoint, and the bytes of their weights.

    Reads no weights.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
      digests.Damaged: all checkpoints are damaged.
    """
    folder = pathlib.Path(folder)
    if is_released(folder):
        return _sizes(_read_released(folder))
    step = _choose(folder, None, "meta")
    return _read(folder, step, "meta", names=["networks"])["networks"]


def _sizes(networks: Mapping) -> dict[str, int]:
    """The bytes of each network's weights."""
    return {
        name: sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(params)
        )
        for name, params in networks.items()
    }


def load_run(
    folder: str | pathlib.Path,
    *,
    step: int | None = None,
    layouts: Mapping | None = None,
) -> LoadedRun:
    """Reads the averaged weights of a run folder.

    Args:
      folder: the run folder.
      step: which checkpoint; by default the newest undamaged one.
      layouts: a sharding for each parameter; None: whole arrays on the host.

    Raises:
      FileNotFoundError: the folder holds no run or no finished checkpoint, or none of
        that step.
      digests.Damaged: that checkpoint is damaged, or all are.
    """
    folder = pathlib.Path(folder)
    config = configs.read(folder)
    step = _choose(folder, step, "ema")
    return LoadedRun(config, _read(folder, step, "ema", layouts), step, folder)


def save_run(folder: str | pathlib.Path, params: Mapping) -> None:
    """Writes averaged weights as a run's checkpoint of step 0, without optimizer state.

    Such a run can be used, and another run can start from it, but it cannot be resumed.
    """
    checkpoints = (pathlib.Path(folder) / "checkpoints").absolute()
    with (
        _writing(checkpoints),
        orbax.training.Checkpointer(checkpoints, context=_context()) as writer,
    ):
        parts = {"ema": dict(params), "meta": {"networks": _sizes(params)}}
        writer.save_checkpointables(0, parts)


def read_state(folder: str | pathlib.Path) -> dict:
    """Reads a run's newest train state onto the host, as plain nested containers."""
    folder = pathlib.Path(folder)
    step = _choose(folder, None, "ema", "state")
    return {"ema": _read(folder, step, "ema"), **_read(folder, step, "state")}


def _choose(folder: pathlib.Path, step: int | None, *parts: str) -> int:
    """Returns `step`, or the newest undamaged step, after checking those parts.

    All processes return the same step or raise the same error.
    """
    checkpoints = folder / "checkpoints"
    if is_released(folder):
        digests.check(folder / _RELEASED)
        step = _released_step(folder) if step is None else step
        check_kept(folder, step)
        return step
    if step is not None:
        try:
            intact.check(checkpoints, step, parts)
        except digests.Damaged:
            check_kept(folder, step)
            raise
        return step
    newest = intact.newest(checkpoints, parts)
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: train it first")
    return newest


def _read(
    folder: pathlib.Path,
    step: int,
    part: str,
    layouts: Mapping | None = None,
    names: Sequence[str] | None = None,
) -> dict:
    """Reads a part of a checkpoint, or some names of it; on the host without layouts."""
    if is_released(folder):
        return _read_released(folder, layouts)
    checkpoint = (folder / "checkpoints" / str(step)).absolute()

    # Host arrays, so that a run is read on any machine, whatever mesh wrote it.
    def on_host(leaf):
        return leaf if np.isscalar(leaf) else np.empty(leaf.shape, leaf.dtype)

    def on_device(leaf, layout):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    with _context(partial_load=True):
        stored = orbax.checkpointables_metadata(checkpoint).metadata[part]
        names = layouts if names is None else names
        if names is not None:  # a run may have trained networks that are not used
            stored = {name: stored[name] for name in names}
        if layouts is None:
            wanted = jax.tree.map(on_host, stored)
        else:
            wanted = jax.tree.map(on_device, stored, layouts)
        return orbax.load_checkpointables(checkpoint, {part: wanted})[part]


def _read_released(folder: pathlib.Path, layouts: Mapping | None = None) -> dict:
    """The weights of a released run as float32, by network."""
    params: dict = {}
    with safetensors.safe_open(folder / _RELEASED, "numpy") as file:
        for name in file.keys():
            *parents, last = name.split(".")
            inner = params
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = file.get_tensor(name).astype(np.float32)
    if layouts is None:
        return params
    wanted = {name: params[name] for name in layouts}
    return jax.tree.map(jax.device_put, wanted, dict(layouts))
