"""Components as folders, and whole folders in diffusers' layout: weights on the mesh.

    source = pretrained.open_folder("Wan2.1-T2V-1.3B-Diffusers")
    params = source.components["transformer"].load("bfloat16")

A component is a network's config.json and its safetensors: under the names of diffusers
and transformers, or under our own (`weights.safetensors`). Opening checks every file's
header, name and shape, so that nothing is loaded of a folder that is damaged or of a
model that is not supported. Loading reads tensor by tensor, each device its own part:
the host never holds a model.
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

# Small errors of these would add up over all blocks, or over all steps; diffusers keeps
# them in float32 too.
_FLOAT32 = ("scale_shift_table", "time_embedder", "norm", "distance_bias")
_COLUMNS = 32  # of two bytes: a cache line
_READERS = 2  # threads; each holds one device's part of one array


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of network: its peer's files, and how both become ours."""

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

    files: its config and what holds its weights, by path. tensors: views of the latter
    by name, our own names where `is_ours`.
    """

    kind: _Kind
    config: Any
    tensors: Mapping[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    is_ours: bool

    @property
    def folder(self) -> pathlib.Path:
        """Where it lies."""
        return self.files[0].parent

    @property
    def nbytes(self) -> int:
        """Of its weights, as they are stored."""
        return sum(view.nbytes for view in self.tensors.values())

    def fitted(self, config: Any) -> "Component":
        """The same weights in a network of another config, which may do more.

        What the peer does not have (such as the embedding of known tokens) is zero at
        first, so the network computes what it did.

        Raises:
          ValueError: the sizes or forms differ, which are named.
        """
        added = () if self.is_ours else self.kind.peer.added
        if differ := difference(self.config, config, added):
            raise ValueError(
                f"the network of {self.folder} is another than the config's: "
                + "; ".join(differ)
            )
        return dataclasses.replace(self, config=config)

    def digest(self) -> str:
        """16 hex digits that name the weights: of the network, and of each tensor its
        name, type, shape and 64 numbers; to read all of 14B would take minutes.
        """
        # Not how it is computed, nor fields that this project has added since.
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
        """Copies the files as they are, the config last: where it stands, all is.

        Raises:
          ValueError: other files are there, which would be read in place of these.
          digests.Damaged: a file is not what was written, or holds a number that is no
            weight: NaN, infinite or absurdly large.
        """
        there = {p.name for p in folder.glob("[!.]*")} - {digests.FILE}
        if other := sorted(there - {file.name for file in self.files}):
            raise ValueError(
                f"{folder} holds {other[0]}, which is of another model: remove the "
                "folder, or choose another one"
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
        """The network with its weights, in the type that it computes in."""
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
        """Reads the parameters onto the mesh that is set, or onto the first device.

        Args:
          dtype: of the weights; norms, tables and the time embedding stay float32.

        Returns:
          nested dict of arrays, laid out by the sharding rules.

        Raises:
          digests.Damaged: a file is not what was written, or holds a number that is no
            weight: NaN, infinite or absurdly large.
        """
        # Here and not when it is opened, which reads no weights.
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
            kept = any(name in path for name in _FLOAT32)
            target = np.dtype(np.float32 if kept else dtype)
            found = entries.get(path, [])
            return _place(found, self.tensors, like.shape, target, layouts[path])

        flat = trees.flatten(shapes)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            futures = {path: pool.submit(read, path, flat[path]) for path in flat}
            try:
                arrays = {path: future.result() for path, future in futures.items()}
            except digests.Damaged as error:
                raise digests.Damaged(f"{self.folder}: {error}") from None
            finally:  # nothing more is read for an error
                pool.shutdown(wait=False, cancel_futures=True)
        return trees.map_paths(lambda path, _: arrays[path], shapes)


def difference(found: Any, wanted: Any, added: tuple[str, ...] = ()) -> list[str]:
    """Lists the fields in which two networks differ, but for those `added`.

    How they are computed is no part of them; see `models/identity.py`.
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
    """Makes one array from its tensors (a row each, if stacked), part by part."""
    parts, last = [], (None, None)
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds != last[0]:  # copies for replicas come from the part before
            last = bounds, _read_part(entries, tensors, shape, dtype, index)
        parts.append(jax.device_put(last[1], device))
    return jax.make_array_from_single_device_arrays(shape, layout, parts)


def _read_part(entries, tensors, shape, dtype, index) -> np.ndarray:
    size = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
    if not entries:  # what the peer does not have
        return np.zeros(size, dtype)
    part = np.empty(size, dtype)
    stacked = entries[0].layer is not None
    rows, inner = (part, index[1:]) if stacked else (part[None], index)
    of_rows = entries[index[0]] if stacked else entries
    for row, entry in zip(rows, of_rows, strict=True):
        _copy(row, entry.view(tensors[entry.theirs], shape)[inner])
        if (found := weight_files.find_impossible(row)) is not None:
            raise digests.Damaged(
                f"{entry.theirs} holds {found:g}, which is no weight: the file is damaged"
            )
    return part


def _copy(into: np.ndarray, view: np.ndarray) -> None:
    if into.dtype == view.dtype and into.itemsize == 2:
        # numpy moves whole numbers several times faster than bfloat16.
        into, view = into.view(np.uint16), view.view(np.uint16)
    # A turned matrix is copied a cache line of columns at a time, six times as fast.
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
      strict: refuse fields of a peer's config that are not known; they are warned of
        otherwise.

    Raises:
      FileNotFoundError, ValueError: what is missing or wrong, all tensors by name.
    """
    unknown: peer_configs.Unknown = {}
    found = _open_component(pathlib.Path(folder), name, unknown)
    _report(unknown, strict)
    return found


def _open_component(
    folder: pathlib.Path, name: str, unknown: peer_configs.Unknown
) -> Component:
    kind, file = KINDS[name], folder / "config.json"
    given = weight_files.read_json(file)
    is_ours = weight_files.exist(folder, _OURS)
    if is_ours:
        config = configs.build(kind.config, given, str(file))
    else:
        config = kind.read_config(given, str(file), unknown)
    found = weight_files.TensorFiles(folder, _OURS if is_ours else kind.stem)
    component = Component(kind, config, found, (file, *found.paths), is_ours)
    if is_ours:
        shapes = component.networks.abstract()["component"]
        checkpoint.unflatten(found, shapes, str(folder))
        return component
    try:
        tensors = kind.peer.resolve(found)
        kind.peer.check(tensors, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return dataclasses.replace(component, tensors=tensors)


def _report(unknown: peer_configs.Unknown, strict: bool) -> None:
    """Warns of fields that are not known, once of each folder, or refuses them."""
    if not unknown:
        return
    fields = peer_configs.describe(unknown)
    if strict:
        raise ValueError(f"fields that are not known: {fields}")
    _warn(
        "fields that are not known are ignored (train, convert and generate refuse them "
        f"with --strict): {fields}"
    )


@functools.cache  # of equal texts once
def _warn(text: str) -> None:
    if jax.process_index() == 0:
        logging.warning(text)


def write_component(
    folder: pathlib.Path, name: str, params: Mapping, config: Any
) -> None:
    """Writes a component in its peer's layout, in the types that the weights have.

    Raises:
      ValueError: the peer cannot express what the network does; all of it is named.
    """
    kind = KINDS[name]
    tensors = kind.peer.export(params, config, lazily=True)
    weight_files.write(folder, kind.stem, tensors)
    text = json.dumps(kind.write_config(config), indent=2, sort_keys=True) + "\n"
    paths.write_atomically(folder / "config.json", text)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A whole folder, checked: components by name, scheduler, experts, tokenizer file.

    boundary: the noise level below which transformer_2 takes over, None where there is
    one transformer. takes_images: a picture enters as a first latent at level 0
    (`expand_timesteps` of TI2V-5B).
    """

    path: pathlib.Path
    components: dict[str, Component]
    scheduler: peer_configs.Scheduler
    tokenizer: pathlib.Path
    boundary: float | None
    takes_images: bool

    def digest(self) -> str:
        """16 hex digits that name the weights of all components."""
        parts = sorted(self.components.items())
        text = "".join(f"{name} {component.digest()}\n" for name, component in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_folder(path: str | pathlib.Path) -> bool:
    """Whether a path is a folder in diffusers' layout."""
    return (pathlib.Path(path) / "model_index.json").is_file()


def open_folder(path: str | pathlib.Path, *, strict: bool = False) -> Folder:
    """Checks a folder of Wan 2.1 or 2.2 text-to-video weights, and reads no weights.

    Args:
      path: of the folder.
      strict: refuse fields that are not known; they are warned of otherwise.

    Raises:
      FileNotFoundError, ValueError: one sentence: what is missing, damaged, or of a
        model that is not supported.
    """
    path = pathlib.Path(path)
    unknown: peer_configs.Unknown = {}

    def read(file: pathlib.Path, reader: Callable) -> Any:
        # A step cache that is calibrated for the folder is listed beside the index.
        given = weight_files.read_json(file, is_peers=True)
        return reader(given, str(file), unknown)

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
