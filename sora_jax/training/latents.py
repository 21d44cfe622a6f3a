"""Latents made once: measuring a video VAE, and encoding shards with it.

Letters: b batch, t time, h height, w width, c channels.
"""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import progress
from sora_jax.data import shards
from sora_jax.models import video_vae
from sora_jax.training import checkpoint
from sora_jax.training import state as states

_MEASURED_CLIPS = 512


@dataclasses.dataclass(frozen=True)
class LoadedVAE:
    """A video VAE ready to use: `networks.bind({"vae": params})["vae"]`."""

    config: video_vae.Config
    networks: states.Networks
    params: dict

    def module(self, params: Mapping | None = None) -> video_vae.VideoVAE:
        """Returns the module with its own or the given (traced) parameters."""
        params = self.params if params is None else params
        return self.networks.bind({"vae": params})["vae"]


def networks_of(config: video_vae.Config) -> states.Networks:
    """Returns the networks {"vae"} of a config."""
    return states.Networks(lambda rngs: {"vae": video_vae.VideoVAE(config, rngs=rngs)})


def load_vae(folder: str | pathlib.Path) -> LoadedVAE:
    """Reads the component folder of a video VAE (`RUN/vae`), or a run that has one."""
    folder = pathlib.Path(folder)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    flat, fields = checkpoint.load_weights(folder)
    config = configs.build(video_vae.Config, fields, f"{folder}/config.json")
    networks = networks_of(config)
    params = checkpoint.unflatten(flat, networks.abstract()["vae"], str(folder))
    return LoadedVAE(config, networks, params)


def save_vae(
    folder: str | pathlib.Path,
    params: Mapping,
    config: video_vae.Config,
    clips: shards.Shards,
    batch_size: int = 16,
) -> video_vae.Config:
    """Measures the latents' mean and deviation per channel and writes the component.

    Args:
      folder: the component folder to write.
      params: the VAE's parameters, whole on this process.
      config: its sizes.
      clips: where to measure: the first 512 clips.
      batch_size: clips encoded at once.

    Returns:
      The config with `latent_mean` and `latent_std`.
    """
    vae = LoadedVAE(config, networks_of(config), params)
    count, total, square = 0, 0.0, 0.0
    indices = range(min(len(clips), _MEASURED_CLIPS))
    for latents_bthwc in _encoded(vae, clips, indices, batch_size):
        flat_nc = latents_bthwc.astype(np.float64).reshape(-1, config.latent_channels)
        count += len(flat_nc)
        total = total + flat_nc.sum(0)
        square = square + np.square(flat_nc).sum(0)
    mean_c = total / count
    std_c = np.sqrt(np.maximum(square / count - mean_c**2, 1e-8))
    config = dataclasses.replace(
        config,
        latent_mean=tuple(round(float(x), 6) for x in mean_c),
        latent_std=tuple(round(float(x), 6) for x in std_c),
    )
    checkpoint.save_weights(folder, jax.device_get(params), config)
    return config


def _encoded(
    vae: LoadedVAE, clips: shards.Shards, indices: range, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields the latents' means of whole clips, batch by batch, as they come."""

    @jax.jit
    def encode(params, video_u8):
        video = video_u8.astype(jnp.float32) / 127.5 - 1
        return vae.module(params).encode(video)[0]

    for chosen in itertools.batched(indices, batch_size):
        frames = [clips[i].frames() for i in chosen]
        while len(frames) < batch_size:  # one compiled shape
            frames.append(frames[-1])
        yield np.asarray(encode(vae.params, np.stack(frames)))[: len(chosen)]


def encode(
    shards_folder: str | pathlib.Path,
    vae_folder: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    batch_size: int = 32,
) -> None:
    """Encodes all clips of video shards into a latent cache of normalised latents.

    The cache carries a copy of the VAE (`OUT/vae`), so that what is trained on it can
    be decoded. Finished files are kept when the job is interrupted and started again.

    Raises:
      shards.ShardsError: the folder holds another VAE's or other shards' latents.
    """
    out = pathlib.Path(out)
    vae = load_vae(vae_folder)
    source = pathlib.Path(vae_folder)
    source = source / "vae" if (source / "vae").is_dir() else source
    clips = shards.open(shards_folder)
    vae_digest = checkpoint.weights_digest(source)
    writer = shards.write_latents(out, clips, vae_digest=vae_digest)
    (out / "vae").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "weights.safetensors"):
        shutil.copyfile(source / name, out / "vae" / name)
    mean = np.asarray(vae.config.latent_mean or 0.0, np.float32)
    std = np.asarray(vae.config.latent_std or 1.0, np.float32)
    bar = progress.Progress(len(clips), "encode", "clips", start=writer.done)
    with bar, writer:
        for indices in writer.missing():
            for latents_bthwc in _encoded(vae, clips, indices, batch_size):
                writer.add((latents_bthwc - mean) / std)
                bar.update(len(latents_bthwc))
