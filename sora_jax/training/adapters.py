"""Runs with LoRA: weights that stay as they are, and adapters in the checkpoints.

The weights that a run adapts are copied once into its folder `transformer`, as a frozen
text encoder is. A checkpoint holds the adapters and their optimizer state alone.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from sora_jax.core import config as configs
from sora_jax.models import dit, lora
from sora_jax.training import checkpoint, objectives, pretrained

FOLDER = "transformer"


def config_of(c: Mapping) -> lora.Config:
    """The adapters of a run, from its config; older and converted runs have none."""
    return configs.build(lora.Config, c.get("lora", {}), "lora")


def base(
    folder: pathlib.Path, config: dit.Config, *, strict: bool = False
) -> pretrained.Component:
    """The weights that a run adapts.

    Args:
      folder: of the run.
      config: of the network that they are loaded into.
      strict: see `pretrained.open_component`.

    Raises:
      FileNotFoundError, ValueError: they are not there, or damaged.
    """
    component = pretrained.open_component(folder / FOLDER, FOLDER, strict=strict)
    return component.fitted(config)


def load_run(
    folder: pathlib.Path,
    config: dit.Config,
    layouts: Mapping,
    *,
    step: int | None = None,
) -> checkpoint.LoadedRun:
    """Loads a denoiser's averaged weights, adapters merged into those that they adapt.

    Args:
      folder: of the run.
      config: of its denoiser.
      layouts: a sharding for each parameter of the networks without adapters.
      step: of the checkpoint; default: the newest.

    Raises:
      FileNotFoundError, digests.Damaged: see `checkpoint.load_run`.
    """
    adapted = config_of(configs.read(folder))
    if not adapted.rank:
        return checkpoint.load_run(folder, step=step, layouts=layouts)
    networks = objectives.denoiser_networks(config, None, adapted)
    own = {lora.PART: networks.layouts()[lora.PART]}
    run = checkpoint.load_run(folder, step=step, layouts=own)
    weights = base(folder, config).load()
    merged = lora.merge(weights, run.params[lora.PART]["dit"], adapted.scale)
    return dataclasses.replace(run, params={"dit": merged})
