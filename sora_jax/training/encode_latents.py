"""Encoding video shards into a cache of latents."""

import pathlib

import jax
import numpy as np

from sora_jax.core import mesh as meshes
from sora_jax.data import caches, latent_cache, shards
from sora_jax.training import checkpoint, pretrained, trained_vae


def encode(
    shards_folder: str | pathlib.Path,
    vae_folder: str | pathlib.Path,
    out: str | pathlib.Path,
) -> dict:
    """Encodes all clips of video shards into a cache of normalised latents.

    The cache holds a copy of the VAE (`OUT/vae`), so that a model trained on it can
    decode. The clips may have several sizes; a batch has one. Finished files are kept when the job is interrupted and started again.
    Processes that share the folder share the work.

    Returns:
      The cache's manifest.

    Raises:
      ShardsError: the folder holds latents of another VAE or of other shards.
    """
    out, source = pathlib.Path(out), trained_vae.component(vae_folder)
    vae = trained_vae.load(source)
    mean = np.asarray(vae.config.latent_mean or 0.0, np.float32)
    std = np.asarray(vae.config.latent_std or 1.0, np.float32)
    clips = shards.open(shards_folder)
    counts = {tuple(shape): count for *shape, count in clips.manifest.get("shapes", [])}

    def batch_size(shape: tuple[int, int, int]) -> int:
        usual = trained_vae.clips_at_once(shape)
        return min(usual, counts.get(shape, usual))  # a rare size has a smaller batch

    encode_clips = trained_vae.encoder(vae, batch_size)
    manifest = latent_cache.write(
        out,
        clips,
        lambda clips: (encode_clips(clips) - mean) / std,
        vae_digest=checkpoint.weights_digest(source),
        preprocessing={"pixels": "[-1, 1]", "normalised": True},
        batch_size=batch_size,
        processes=caches.Processes(
            jax.process_index(), jax.process_count(), meshes.barrier
        ),
    )
    if jax.process_index() == 0:
        pretrained.open_component(source, "vae").copy_to(out / "vae")
    return manifest
