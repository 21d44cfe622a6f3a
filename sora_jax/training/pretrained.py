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
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import paths, trees
from sora_jax.data import tokenizer
from sora_jax.models import dit, exchange, peer_configs, text_encoder, video_vae
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
    read_config: Callable[[Mapping, str], Any]
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
_SUPPORTED = ("WanPipeline",)
DTYPES = ("float32", "bfloat16")  # what networks compute in
_OURS = "weights"  # stem of the files that hold our own names
# What a network computes in, and what it recomputes: not what it is.
_INCIDENTAL = ("dtype", "remat")


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """How a folder's scheduler samples: the solver, and the shift of its levels."""

    sampler: str
    shift: float


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
        """16 hex digits that name the weights: of the config, and of each tensor its
        name, type, shape and 64 numbers; to read all of 14B would take minutes.
        """
        hashed = hashlib.sha256(f"{self.config}\n".encode())
        for tensor, view in sorted(self.tensors.items()):
            sample = view.reshape(-1)[:: max(1, view.size // 64)]
            hashed.update(f"{tensor} {view.dtype} {view.shape}\n".encode())
            hashed.update(np.ascontiguousarray(sample).tobytes())
        return hashed.hexdigest()[:16]

    def copy_to(self, folder: pathlib.Path) -> None:
        """Copies the files as they are, the config last: where it stands, all is.

        Raises:
          ValueError: other files are there, which would be read in place of these.
        """
        there = {p.name for p in folder.glob("[!.]*")}
        if other := sorted(there - {file.name for file in self.files}):
            raise ValueError(
                f"{folder} holds {other[0]}, which is of another model: remove the "
                "folder, or choose another one"
            )
        for file in (*self.files[1:], self.files[0]):
            paths.copy_atomically(file, folder / file.name)

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
        """
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
            arrays = {path: future.result() for path, future in futures.items()}
        return trees.map_paths(lambda path, _: arrays[path], shapes)


def difference(found: Any, wanted: Any, added: tuple[str, ...] = ()) -> list[str]:
    """Lists the fields in which two networks' configs differ, but for those `added`."""
    one, other = dataclasses.asdict(found), dataclasses.asdict(wanted)
    for name in (*_INCIDENTAL, *added):
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
    if entries[0].layer is None:
        _copy(part, entries[0].view(tensors[entries[0].theirs], shape)[index])
        return part
    for row, entry in zip(part, entries[index[0]], strict=True):
        _copy(row, entry.view(tensors[entry.theirs], shape)[index[1:]])
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


def open_component(folder: str | pathlib.Path, name: str) -> Component:
    """Checks a component folder: `name` is one of KINDS.

    Raises:
      FileNotFoundError, ValueError: what is missing or wrong, all tensors by name.
    """
    folder, kind = pathlib.Path(folder), KINDS[name]
    file = folder / "config.json"
    given = _read_json(file)
    is_ours = weight_files.exist(folder, _OURS)
    if is_ours:
        config = configs.build(kind.config, given, str(file))
    else:
        config = kind.read_config(given, str(file))
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
    scheduler: Scheduler
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


def open_folder(path: str | pathlib.Path) -> Folder:
    """Checks a folder of Wan 2.1 or 2.2 text-to-video weights, and reads no weights.

    Raises:
      FileNotFoundError, ValueError: one sentence: what is missing, damaged, or of a
        model that is not supported.
    """
    path = pathlib.Path(path)
    index = _read_json(path / "model_index.json")
    named = index.get("_class_name")
    if named not in _SUPPORTED:
        raise ValueError(
            f"{path} is a {named}; there is support for {', '.join(_SUPPORTED)} "
            "(text to video of Wan 2.1 and 2.2, and TI2V-5B)"
        )
    present = [name for name in KINDS if _is_there(index, name)]
    lacking = {"transformer", "text_encoder", "vae"} - set(present)
    if lacking:
        raise ValueError(f"{path}/model_index.json lacks {', '.join(sorted(lacking))}")
    boundary = index.get("boundary_ratio")
    if (boundary is None) != ("transformer_2" not in present):
        raise ValueError(
            f"{path}/model_index.json has boundary_ratio {boundary} and "
            f"{'no ' if boundary else 'a '}transformer_2; they go together"
        )
    components = {name: open_component(path / name, name) for name in present}
    _check_together(path, components)
    return Folder(
        path=path,
        components=components,
        scheduler=read_scheduler(path / "scheduler" / "scheduler_config.json"),
        tokenizer=tokenizer.find(path / "tokenizer"),
        boundary=None if boundary is None else float(boundary),
        takes_images=bool(index.get("expand_timesteps")),
    )


def _is_there(index: Mapping, name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


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
    if second and second.config != transformer:
        raise ValueError(f"{path}: transformer and transformer_2 have other sizes")


def read_scheduler(path: pathlib.Path) -> Scheduler:
    """Reads flow-match Euler's or flow-match UniPC's settings.

    Raises:
      ValueError: another scheduler, or a setting that is not supported.
    """
    given = _read_json(path)
    named = given.get("_class_name")
    if named == "UniPCMultistepScheduler":
        wanted = {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True,
            "predict_x0": True, "solver_order": 2, "solver_type": "bh2",
            "lower_order_final": True, "thresholding": False, "disable_corrector": [],
            "final_sigmas_type": "zero", "solver_p": None,
        }  # fmt: skip
        found = Scheduler("unipc", float(given.get("flow_shift", 1.0)))
        defaults = wanted | {"prediction_type": "epsilon", "use_flow_sigmas": False}
    elif named == "FlowMatchEulerDiscreteScheduler":
        wanted = {"invert_sigmas": False, "stochastic_sampling": False}
        found, defaults = Scheduler("euler", float(given.get("shift", 1.0))), wanted
    else:
        raise ValueError(
            f"{path} is a {named}; there are UniPCMultistepScheduler and "
            "FlowMatchEulerDiscreteScheduler"
        )
    wanted |= {
        "num_train_timesteps": 1000, "use_dynamic_shifting": False,
        "use_karras_sigmas": False, "use_exponential_sigmas": False,
        "use_beta_sigmas": False, "shift_terminal": None,
    }  # fmt: skip
    for name, value in wanted.items():
        if given.get(name, defaults.get(name, value)) != value:
            raise ValueError(
                f"{path}: {name} is {given.get(name)!r}; only {value!r} is supported"
            )
    return found


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no fields")
    return found
