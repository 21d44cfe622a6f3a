"""Components as folders, and whole folders in diffusers' layout: weights on the mesh.

    source = pretrained.open_folder("Wan2.1-T2V-1.3B-Diffusers")
    params = source.components["transformer"].load("bfloat16")

A component is a network's config.json and its safetensors files, with the names of
diffusers and transformers or with our own (`weights.safetensors`). Opening a component
checks every file's header and every tensor's name and shape, so that damaged folders and
unsupported models are refused before anything is loaded. Loading reads tensor by tensor,
each device its own shard: the host never holds a whole model.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import digests, paths, trees
from sora_jax.data import tokenizer
from sora_jax.models import (
    dit,
    exchange,
    identity,
    peer_configs,
    text_encoder,
    video_vae,
)
from sora_jax.training import checkpoint, weight_files
from sora_jax.training import state as states

# Small errors in these would add up over all blocks or steps; diffusers also keeps them
# in float32.
_FLOAT32 = ("scale_shift_table", "time_embedder", "norm", "distance_bias")
_COLUMNS = 32  # of two bytes: a cache line
_READERS = 2  # threads; each holds one device's shard of one array


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of network: the peer's files, and how config and weights are read."""

    config: type
    stem: str
    read_config: Callable[[Mapping, str, peer_configs.Unknown], Any]
    write_config: Callable[[Any], dict]
    peer: exchange.Peer


_TRANSFORMER = _Kind(
    dit.Config,
    "diffusion_pytorch_model",
    peer_configs.read_transformer,
    peer_configs.write_transformer,
    exchange.TRANSFORMER,
)
KINDS = {
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "text_encoder": _Kind(
        text_encoder.Config,
        "model",
        peer_configs.read_text_encoder,
        peer_configs.write_text_encoder,
        exchange.TEXT_ENCODER,
    ),
    "vae": _Kind(
        video_vae.Config,
        "diffusion_pytorch_model",
        peer_configs.read_vae,
        peer_configs.write_vae,
        exchange.VAE,
    ),
}
DTYPES = ("float32", "bfloat16")  # what networks compute in
_OURS = "weights"  # stem of the files that hold our own names


@dataclasses.dataclass(frozen=True)
class Component:
    """A checked component folder; `load` reads its weights.

    files: paths of its config and its weights. tensors: views of the weights by name;
    `is_ours` says whether the names are our own.
    """

    kind: _Kind
    config: Any
    tensors: Mapping[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    is_ours: bool

    @property
    def folder(self) -> pathlib.Path:
        """The folder itself."""
        return self.files[0].parent

    @property
    def nbytes(self) -> int:
        """Size of the weights as stored."""
        return sum(view.nbytes for view in self.tensors.values())

    def fitted(self, config: Any) -> "Component":
        """The same weights in a network of another config, which may have more parts.

        Parts that the peer lacks (such as the embedding of known tokens) start at zero,
        so the network's output does not change.

        Raises:
          ValueError: the networks differ; the message lists the fields.
        """
        added = () if self.is_ours else self.kind.peer.added
        if differ := difference(self.config, config, added):
            raise ValueError(
                f"the network of {self.folder} differs from the config's: "
                + "; ".join(differ)
            )
        return dataclasses.replace(self, config=config)

    def digest(self) -> str:
        """16 hex digits that identify the weights.

        Hashes the network's config and each tensor's name, type, shape and 64 of its
        numbers: reading all of 14B would take minutes.
        """
        # Leaves out how it is computed, and fields that this project added later.
        network = identity.of(self.config)
        fields = {f.name: f.default for f in dataclasses.fields(network)}
        said = {n: getattr(network, n) for n in fields}
        said = {n: value for n, value in said.items() if value != fields[n]}
        hashed = hashlib.sha256(f"{sorted(said.items())}\n".encode())
        for tensor, view in sorted(self.tensors.items()):
            sample = view.reshape(-1)[:: max(1, view.size // 64)]
            hashed.update(f"{tensor} {view.dtype} {view.shape}\n".encode())
            hashed.update(np.ascontiguousarray(sample).tobytes())
        return hashed.hexdigest()[:16]

    def copy_to(self, folder: pathlib.Path) -> None:
        """Copies the files, the config last: a folder with a config is complete.

        Raises:
          ValueError: the folder has other files, which would be read instead.
          digests.Damaged: a file differs from what was written, or holds a value that
            cannot be a weight: NaN, infinite or absurdly large.
        """
        there = {p.name for p in folder.glob("[!.]*")} - {digests.FILE}
        if other := sorted(there - {file.name for file in self.files}):
            raise ValueError(
                f"{folder} holds {other[0]}, which belongs to another model: remove "
                "the folder, or choose another one"
            )
        for file in (*self.files[1:], self.files[0]):
            digests.copy(file, folder / file.name)

    def computing(self, dtype: str) -> "Component":
        """The same weights in a network that computes in `dtype`."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
        config = dataclasses.replace(self.config, dtype=dtype)
        return dataclasses.replace(self, config=config)

    def module(self) -> nnx.Module:
        """The network with its weights, in its compute type."""
        return self.networks.bind({"component": self.load(self.config.dtype)})[
            "component"
        ]

    @property
    def networks(self) -> states.Networks:
        """The network {"component"} without arrays."""
        return states.Networks(
            lambda rngs: {"component": self.kind.peer.make(self.config, rngs)}
        )

    def load(self, dtype: str = "float32") -> dict:
        """Reads the parameters onto the current mesh, or onto the first device.

        Args:
          dtype: of the weights; norms, tables and the time embedding stay float32.

        Returns:
          nested dict of arrays, sharded by the rules.

        Raises:
          digests.Damaged: a file differs from what was written, or holds a value that
            cannot be a weight: NaN, infinite or absurdly large.
        """
        # Checked here and not in `open_component`, which reads no weights.
        digests.check_all(self.files, required=self.is_ours)
        networks = self.networks
        shapes = networks.abstract()["component"]
        layouts = trees.flatten(networks.layouts()["component"])
        entries = (
            {
                path: [exchange.Entry(path, path, tuple(range(like.ndim)))]
                for path, like in trees.flatten(shapes).items()
            }
            if self.is_ours
            else self.kind.peer.by_parameter(self.config)
        )

        def read(path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            target = type_of(path, dtype)
            sources = entries.get(path, [])
            return _place(sources, self.tensors, like.shape, target, layouts[path])

        flat = trees.flatten(shapes)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            futures = {path: pool.submit(read, path, flat[path]) for path in flat}
            try:
                arrays = {path: future.result() for path, future in futures.items()}
            except digests.Damaged as error:
                raise digests.Damaged(f"{self.folder}: {error}") from None
            finally:  # after an error, read nothing more
                pool.shutdown(wait=False, cancel_futures=True)
        return trees.map_paths(lambda path, _: arrays[path], shapes)


def type_of(path: str, dtype: str) -> np.dtype:
    """The type of a weight that is loaded for a network which computes in `dtype`."""
    return np.dtype("float32" if any(name in path for name in _FLOAT32) else dtype)


def difference(found: Any, wanted: Any, added: tuple[str, ...] = ()) -> list[str]:
    """Lists the fields in which two networks differ, except those `added`.

    How they are computed does not count; see `models/identity.py`.
    """
    one, other = (dataclasses.asdict(identity.of(c)) for c in (found, wanted))
    for name in added:
        one.pop(name, None)
        other.pop(name, None)
    return configs.difference(one, other)


def _place(
    entries: list[exchange.Entry],
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype,
    layout: jax.sharding.Sharding,
) -> jax.Array:
    """Makes one array from its tensors (one a layer, if stacked), shard by shard."""
    parts, last = [], (None, None)
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds != last[0]:  # replicas reuse the shard that was just read
            last = bounds, _read_part(entries, tensors, shape, dtype, index)
        parts.append(jax.device_put(last[1], device))
    return jax.make_array_from_single_device_arrays(shape, layout, parts)


def _read_part(entries, tensors, shape, dtype, index) -> np.ndarray:
    size = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
    if not entries:  # a part that the peer lacks
        return np.zeros(size, dtype)
    part = np.empty(size, dtype)
    stacked = entries[0].layer is not None
    rows, inner = (part, index[1:]) if stacked else (part[None], index)
    of_rows = entries[index[0]] if stacked else entries
    for row, entry in zip(rows, of_rows, strict=True):
        _copy(row, entry.view(tensors[entry.theirs], shape)[inner])
        if (found := weight_files.find_impossible(row)) is not None:
            raise digests.Damaged(
                f"{entry.theirs} holds {found:g}, which cannot be a weight: the file is "
                "damaged"
            )
    return part


def _copy(into: np.ndarray, view: np.ndarray) -> None:
    if into.dtype == view.dtype and into.itemsize == 2:
        # numpy copies integers several times faster than bfloat16.
        into, view = into.view(np.uint16), view.view(np.uint16)
    # A transposed matrix is copied a cache line of columns at a time: six times faster.
    turned = view.ndim > 1 and view.strides[-1] > view.strides[-2]
    step = _COLUMNS if turned else max(1, view.shape[-1])
    for first in range(0, view.shape[-1], step):
        columns = np.s_[..., first : first + step]
        np.copyto(into[columns], view[columns], casting="unsafe")


def open_component(
    folder: str | pathlib.Path, name: str, *, strict: bool = False
) -> Component:
    """Checks a component folder.

    Args:
      folder: of one component.
      name: one of KINDS.
      strict: refuse unknown fields of a peer's config instead of warning of them.

    Raises:
      FileNotFoundError, ValueError: names the file, or every tensor, that is missing or
        wrong.
    """
    unknown: peer_configs.Unknown = {}
    component = _open_component(pathlib.Path(folder), name, unknown)
    _report(unknown, strict)
    return component


def _open_component(
    folder: pathlib.Path, name: str, unknown: peer_configs.Unknown
) -> Component:
    kind, file = KINDS[name], folder / "config.json"
    fields = weight_files.read_json(file)
    is_ours = weight_files.exist(folder, _OURS)
    if is_ours:
        config = configs.build(kind.config, fields, str(file))
    else:
        config = kind.read_config(fields, str(file), unknown)
    files = weight_files.TensorFiles(folder, _OURS if is_ours else kind.stem)
    component = Component(kind, config, files, (file, *files.paths), is_ours)
    if is_ours:
        shapes = component.networks.abstract()["component"]
        checkpoint.unflatten(files, shapes, str(folder))
        return component
    try:
        tensors = kind.peer.resolve(files)
        kind.peer.check(tensors, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return dataclasses.replace(component, tensors=tensors)


def _report(unknown: peer_configs.Unknown, strict: bool) -> None:
    """Warns of unknown fields, once for each folder, or refuses them."""
    if not unknown:
        return
    fields = peer_configs.describe(unknown)
    if strict:
        raise ValueError(f"fields that are not known: {fields}")
    _warn(
        "fields that are not known are ignored (train, convert and generate refuse them "
        f"with --strict): {fields}"
    )


@functools.cache  # each text once
def _warn(text: str) -> None:
    if jax.process_index() == 0:
        logging.warning(text)


def write_component(
    folder: pathlib.Path, name: str, params: Mapping, config: Any
) -> None:
    """Writes a component in its peer's layout, in the weights' own types.

    Raises:
      ValueError: the peer lacks parts of the network; the message lists them.
    """
    kind = KINDS[name]
    tensors = kind.peer.export(params, config, lazily=True)
    weight_files.write(folder, kind.stem, tensors)
    text = json.dumps(kind.write_config(config), indent=2, sort_keys=True) + "\n"
    paths.write_atomically(folder / "config.json", text)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checked folder: components by name, scheduler, experts and tokenizer file.

    boundary: the noise level below which transformer_2 takes over; None for a single
    transformer. takes_images: an image enters as a first latent at level 0
    (`expand_timesteps` of TI2V-5B).
    """

    path: pathlib.Path
    components: dict[str, Component]
    scheduler: peer_configs.Scheduler
    tokenizer: pathlib.Path
    boundary: float | None
    takes_images: bool

    def digest(self) -> str:
        """16 hex digits that identify the weights of all components."""
        parts = sorted(self.components.items())
        text = "".join(f"{name} {component.digest()}\n" for name, component in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_folder(path: str | pathlib.Path) -> bool:
    """Whether a path is a folder in diffusers' layout."""
    return (pathlib.Path(path) / "model_index.json").is_file()


def open_folder(path: str | pathlib.Path, *, strict: bool = False) -> Folder:
    """Checks a folder of Wan 2.1 or 2.2 text-to-video weights without reading them.

    Args:
      path: the folder.
      strict: refuse unknown fields instead of warning of them.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or the model is not
        supported.
    """
    path = pathlib.Path(path)
    unknown: peer_configs.Unknown = {}

    def read(file: pathlib.Path, reader: Callable) -> Any:
        # The folder may have a list of digests for its step-cache calibration alone.
        fields = weight_files.read_json(file, is_peers=True)
        return reader(fields, str(file), unknown)

    index = read(path / "model_index.json", peer_configs.read_index)
    present = [name for name in KINDS if name in index.parts]
    components = {name: _open_component(path / name, name, unknown) for name in present}
    _check_together(path, components)
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read(file, peer_configs.read_scheduler)
    _report(unknown, strict)
    return Folder(
        path=path,
        components=components,
        scheduler=scheduler,
        tokenizer=tokenizer.find(path / "tokenizer"),
        boundary=index.boundary,
        takes_images=index.takes_images,
    )


def _check_together(path: pathlib.Path, components: Mapping[str, Component]) -> None:
    transformer = components["transformer"].config
    text, vae = components["text_encoder"].config, components["vae"].config
    if transformer.text_dim != text.dim:
        raise ValueError(
            f"{path}: the transformer reads text of width {transformer.text_dim}, "
            f"the text encoder's is {text.dim}"
        )
    if transformer.in_channels != vae.latent_channels:
        raise ValueError(
            f"{path}: the transformer takes {transformer.in_channels} latent channels, "
            f"the video VAE has {vae.latent_channels}"
        )
    second = components.get("transformer_2")
    if second and (differ := difference(transformer, second.config)):
        raise ValueError(
            f"{path}: transformer and transformer_2 differ in {'; '.join(differ)}"
        )
