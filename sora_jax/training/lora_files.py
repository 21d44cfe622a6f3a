"""LoRA files in the layout of diffusers: written from a run, merged into a network."""

import pathlib
import sys
from collections.abc import Mapping

import numpy as np
import safetensors
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import paths
from sora_jax.models import dit, lora, lora_exchange
from sora_jax.training import adapters, checkpoint, weight_files

SUFFIX = ".safetensors"


def read(path: str | pathlib.Path, config: dit.Config) -> dict:
    """Reads adapters onto the host, for a scale of 1; see `lora_exchange.restore`.

    Args:
      path: of a file that diffusers or `write` wrote.
      config: of the denoiser that the adapters are for.

    Raises:
      FileNotFoundError, ValueError: there is no such file, it is damaged, or it does not
        fit the denoiser.
    """
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a LoRA file ends in {SUFFIX}, not as {path.name!r} does")
    tensors = weight_files.TensorFiles(path.parent, path.stem)
    for name, view in tensors.items():
        found = weight_files.find_impossible(np.ascontiguousarray(view))
        if found is not None:
            raise ValueError(f"{path} is damaged: {name} holds {found:g}")
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    try:
        return lora_exchange.restore(tensors, config, lora_exchange.scales(metadata))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def merged(path: str | pathlib.Path, network: dit.DiT) -> dit.DiT:
    """The network with a file's adapters merged into its weights, whose type they keep.

    Raises:
      FileNotFoundError, ValueError: see `read`.
    """
    added = read(path, network.config)
    graph, state = nnx.split(network, nnx.Param)
    params = lora.merge(nnx.to_pure_dict(state), added, 1.0)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def digest(path: str | pathlib.Path) -> str:
    """16 hex digits that identify a file, for recipes."""
    return paths.sha256_file(pathlib.Path(path))[:16]


def write(
    path: str | pathlib.Path, params: Mapping, config: dit.Config, scale: float
) -> None:
    """Writes adapters of a denoiser.

    Args:
      path: of the file.
      params: the adapters, as arrays on the host.
      config: of the denoiser.
      scale: of the adapters, which is multiplied into B.

    Raises:
      ValueError: diffusers lacks a layer with an adapter.
    """
    path = pathlib.Path(path)
    tensors = lora_exchange.export(params, config, scale)
    weight_files.write(path.parent, path.stem, tensors, max_bytes=sys.maxsize)


def write_run(path: str | pathlib.Path, run: pathlib.Path) -> None:
    """Writes the averaged adapters of a run.

    Raises:
      FileNotFoundError, ValueError: it is not a run with adapters, or see `write`.
    """
    c = configs.read(run)
    adapted = adapters.config_of(c)
    if not adapted.rank:
        raise ValueError(
            f"{run} was trained without LoRA, so it has no adapters to write: let --out "
            "name a folder"
        )
    config = configs.build(dit.Config, c.model.dit, "model.dit")
    params = checkpoint.load_run(run).params[lora.PART]["dit"]
    write(path, params, config, adapted.scale)
