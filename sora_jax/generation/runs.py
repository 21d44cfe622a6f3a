"""What a pipeline takes from a run folder."""

import pathlib
from collections.abc import Mapping

import ml_collections

from sora_jax.core import config as configs
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import known
from sora_jax.generation import cache_calibration
from sora_jax.generation import request as requests
from sora_jax.models import dit, text_encoder
from sora_jax.training import (
    checkpoint,
    initial,
    objectives,
    pretrained,
    run_folder,
    trained_vae,
)
from sora_jax.training import state as states


def settings(config: Mapping) -> requests.Settings:
    """What a denoiser run's config says of its defaults."""
    sample = dict(config.sample) | {
        "text_length": config.text.length,
        "shift": config.noise.shift,
        "known_tau": config.known.known_tau,
        "trained_levels": tuple(config.noise.get("levels", (0.0, 1.0))),
    }
    if sample.get("takes_images") is None:
        trained = configs.build(known.Config, config.known, "known")
        sample["takes_images"] = trained.takes_images
    return configs.build(requests.Settings, sample, "sample")


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a denoiser's run.

    Raises:
      FileNotFoundError, ValueError: there is no run, or one of another objective.
    """
    config = configs.read(folder)
    if config.objective != "denoiser":
        raise ValueError(
            f"{folder} is a run of objective {config.objective}: name one of a denoiser"
        )
    return config


def tokenizer(folder: pathlib.Path, config: Mapping) -> tokenizers.Tokenizer:
    """The run's tokenizer."""
    return tokenizers.load(folder, config.text.get("clean", False))


def networks_of(config: Mapping, pieces: tokenizers.Tokenizer) -> states.Networks:
    """The networks that the run's checkpoints hold: the denoiser, or two experts.

    And the text encoder, where it was trained along.
    """
    dit_config, text_config = objectives.denoiser_configs(config, pieces.vocab_size)

    def make(rngs):
        made = {"dit": dit.DiT(dit_config, rngs=rngs)}
        if config.sample.get("boundary") is not None:
            made["dit_2"] = dit.DiT(dit_config, rngs=rngs)
        if not config.text.get("frozen"):
            made["text_encoder"] = text_encoder.TextEncoder(text_config, rngs=rngs)
        return made

    return states.Networks(make)


def frozen_text_encoder(
    folder: pathlib.Path,
    config: Mapping,
    pieces: tokenizers.Tokenizer,
    *,
    strict: bool = False,
) -> pretrained.Component | None:
    """The text encoder that the run used and did not train, where there is one."""
    _, text_config = objectives.denoiser_configs(config, pieces.vocab_size)
    return initial.frozen_text_encoder(config, folder, text_config, strict=strict)


def load(
    folder: str | pathlib.Path, *, step: int | None = None
) -> checkpoint.LoadedRun:
    """Reads a run's averaged weights onto the mesh that is set, or the first device.

    Args:
      folder: the run folder.
      step: which checkpoint, by default the newest.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    networks = networks_of(config, tokenizer(folder, config))
    return checkpoint.load_run(folder, step=step, layouts=networks.layouts())


def parts(run: checkpoint.LoadedRun, *, strict: bool = False) -> dict:
    """The arguments of the pipeline of a run; strict: see `Pipeline.from_pretrained`."""
    config, folder = run.config, run.folder
    pieces = tokenizer(folder, config)
    made = networks_of(config, pieces).bind(run.params)
    source = {
        "model": folder.resolve().name,
        "step": run.step,
        "config_digest": run_folder.digest(folder, run.step),
        "vae_digest": checkpoint.weights_digest(folder / "vae"),
    }
    if "weights" in config:  # converted, not trained
        source["weights"] = config.weights
    frozen = frozen_text_encoder(folder, config, pieces, strict=strict)
    if frozen is not None:
        made["text_encoder"] = frozen
        source["text_encoder_digest"] = frozen.digest()
    return made | {
        "vae": trained_vae.load(folder / "vae", strict=strict).module(),
        "tokenizer": pieces,
        "settings": settings(config),
        "source": source,
        "calibration": folder / cache_calibration.FILE,
    }
