"""Reads the parts of a pipeline from a run folder, and releases a run for others."""

import pathlib
from collections.abc import Mapping

import ml_collections

from sora_jax.core import config as configs
from sora_jax.core import digests
from sora_jax.data import conditions
from sora_jax.data import tokenizer as tokenizers
from sora_jax.generation import cache_calibration
from sora_jax.generation import request as requests
from sora_jax.models import dit, text_encoder
from sora_jax.training import (
    adapters,
    checkpoint,
    initial,
    objectives,
    pretrained,
    run_folder,
    trained_vae,
)
from sora_jax.training import state as states

# Fields of a config that name places of one machine.
PATHS = {
    *("data.shards", "data.eval_shards", "data.latents", "data.sample_prompts"),
    *("init", "text.encoder", "reconstruction.lpips_weights"),
}
STORED = ("float32", "bfloat16", "float16")  # types of a released run's weights


def settings(config: Mapping) -> requests.Settings:
    """The defaults of calls to a denoiser, from its run's config."""
    sample = dict(config.sample) | {
        "text_length": config.text.length,
        "shift": config.noise.shift,
        "known_tau": config.known.known_tau,
        "trained_levels": tuple(config.noise.get("levels", (0.0, 1.0))),
    }
    trained = configs.build(conditions.Config, config.known, "known")
    sample["trained_patterns"] = trained.patterns
    if sample.get("takes_images") is None:
        sample["takes_images"] = trained.takes_images
    return configs.build(requests.Settings, sample, "sample")


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a denoiser's run.

    Raises:
      FileNotFoundError, ValueError: there is no run, or it has another objective.
    """
    config = configs.read(folder)
    if config.objective != "denoiser":
        raise ValueError(
            f"{folder} is a run of objective {config.objective}, not of a denoiser"
        )
    return config


def load_tokenizer(folder: pathlib.Path, config: Mapping) -> tokenizers.Tokenizer:
    """Reads the run's tokenizer."""
    return tokenizers.load(folder, config.text.get("clean", False))


def networks_of(config: Mapping, tokenizer: tokenizers.Tokenizer) -> states.Networks:
    """The networks in the run's checkpoints.

    They are the denoiser, or two experts, and the text encoder where it was trained.
    """
    dit_config, text_config = objectives.denoiser_configs(config, tokenizer.vocab_size)

    def make(rngs):
        networks = {"dit": dit.DiT(dit_config, rngs=rngs)}
        if config.sample.get("boundary") is not None:
            networks["dit_2"] = dit.DiT(dit_config, rngs=rngs)
        if not config.text.get("frozen"):
            networks["text_encoder"] = text_encoder.TextEncoder(text_config, rngs=rngs)
        return networks

    return states.Networks(make)


def frozen_text_encoder(
    folder: pathlib.Path,
    config: Mapping,
    tokenizer: tokenizers.Tokenizer,
    *,
    strict: bool = False,
) -> pretrained.Component | None:
    """The text encoder that the run used but did not train, or None."""
    _, text_config = objectives.denoiser_configs(config, tokenizer.vocab_size)
    return initial.frozen_text_encoder(config, folder, text_config, strict=strict)


def load(
    folder: str | pathlib.Path, *, step: int | None = None
) -> checkpoint.LoadedRun:
    """Loads a run's EMA weights onto the current mesh, or the first device.

    Adapters (LoRA) are merged into the weights that they adapt.

    Args:
      folder: the run folder.
      step: of the checkpoint; default: the newest.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    dit_config, _ = objectives.denoiser_configs(config, tokenizer.vocab_size)
    layouts = networks_of(config, tokenizer).layouts()
    return adapters.load_run(folder, dit_config, layouts, step=step)


def parts(run: checkpoint.LoadedRun, *, strict: bool = False) -> dict:
    """The arguments of a run's `Pipeline`; strict: see `Pipeline.from_pretrained`."""
    config, folder = run.config, run.folder
    tokenizer = load_tokenizer(folder, config)
    networks = networks_of(config, tokenizer).bind(run.params)
    source = {
        "model": folder.resolve().name,
        "step": run.step,
        "config_digest": run_folder.digest(folder, run.step),
        "vae_digest": checkpoint.weights_digest(folder / "vae"),
    }
    if "weights" in config:  # converted, not trained
        source["weights"] = config.weights
    if adapters.config_of(config).rank:  # its weights are loaded by now
        adapters.base(folder, networks["dit"].config, strict=strict)
    frozen = frozen_text_encoder(folder, config, tokenizer, strict=strict)
    if frozen is not None:
        networks["text_encoder"] = frozen
        source["text_encoder_digest"] = frozen.digest()
    return networks | {
        "vae": trained_vae.load(folder / "vae", strict=strict).module(),
        "tokenizer": tokenizer,
        "settings": settings(config),
        "source": source,
        "calibration": folder / cache_calibration.FILE,
    }


def release(
    folder: str | pathlib.Path, out: str | pathlib.Path, dtype: str = "float32"
) -> None:
    """Writes what it takes to use a run: its averaged weights, without training state.

    Adapters (LoRA) are merged. The result is a run folder that other jobs take, but
    that cannot be resumed.

    Args:
      folder: the run.
      out: the folder to write.
      dtype: one of STORED; the weights are computed with in the type of the config.

    Raises:
      FileNotFoundError, ValueError: there is no run, or it is damaged.
    """
    run, out = load(folder), pathlib.Path(out)
    tokenizer = tokenizers.find(run.folder)
    digests.copy(tokenizer, out / tokenizer.name)
    vae = trained_vae.load(run.folder / "vae")
    checkpoint.save_weights(out / "vae", states.gather(vae.params), vae.config, dtype)
    text = load_tokenizer(run.folder, run.config)
    frozen = frozen_text_encoder(run.folder, run.config, text)
    if frozen is not None:
        frozen.copy_to(out / "text_encoder")
    fields = configs.flatten(run.config).keys() & PATHS
    run.config.update_from_flattened_dict(dict.fromkeys(fields, ""))
    if adapters.config_of(run.config).rank:
        run.config.lora.rank = 0
    configs.write(out, run.config)
    checkpoint.release(out, states.gather(run.params), run.step, dtype)
