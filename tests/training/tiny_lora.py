"""Adapters of the tiny folder's denoiser, the config of a run that trains them, a run."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np

from configs import wan_1_3b
from sora_jax.core import config as configs
from sora_jax.generation import wan
from sora_jax.models import dit, lora
from sora_jax.training import checkpoint, objectives, pretrained
from tests.training import tiny_folder
from tests.training.test_initial import TINY

LORA = {
    "lora.rank": 2, "lora.alpha": 3.0, "optim.learning_rate": 0.02,
    "lora.layers": (r"\.attn[12]\.to_(q|k|v|out)$", r"dit\.blocks\.ffn\."),
    "data.batch_size": 8, "optim.ema_decay": 0.5,
}  # fmt: skip


def config(made: pathlib.Path, **changes):
    """The config of a run with LoRA.

    Args:
      made: what `tiny_folder.write_with_latents` wrote.
      changes: fields, with __ in place of dots.
    """
    c = wan_1_3b.get_config()
    given = TINY | LORA
    given |= {"data.latents": str(made / "latents"), "init": str(made / "folder")}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    c.update_from_flattened_dict(given)
    return c


def adapters(config: lora.Config, denoiser: dit.Config = tiny_folder.DIT) -> dict:
    """Random adapters of a denoiser."""
    networks = objectives.denoiser_networks(denoiser, None, config)
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32),
        networks.abstract()["lora"]["dit"],
    )


def write_run(folder: pathlib.Path, run: pathlib.Path, config: lora.Config) -> None:
    """Writes a run as if it had trained adapters of a tiny folder, to random ones."""
    source = pretrained.open_folder(folder)
    wan.to_run(source, run)
    shutil.rmtree(run / "checkpoints")
    checkpoint.save_run(run, {"lora": {"dit": adapters(config)}})
    source.components["transformer"].copy_to(run / "transformer")
    c = configs.read(run)
    c.lora = dataclasses.asdict(config)
    configs.write(run, c)
