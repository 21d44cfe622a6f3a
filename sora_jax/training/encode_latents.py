"""Encoding video shards into a cache of latents."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from sora_jax.core import mesh as meshes
from sora_jax.data import (
    caches,
    conditions,
    latent_cache,
    records,
    regions,
    samples,
    shards,
)
from sora_jax.training import checkpoint, pretrained, trained_vae


def picture_frames(num_frames: int, pictures: int) -> tuple[int, ...]:
    """Which frames of a clip are encoded alone: so many, evenly, and the last three."""
    last = range(max(0, num_frames - conditions.MOST_PICTURES), num_frames)
    return tuple(sorted({*samples.evenly(num_frames, pictures), *last}))


def encode(
    shards_folder: str | pathlib.Path,
    vae_folder: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    pictures: int = 0,
    with_regions: bool = False,
) -> dict:
    """Encodes all clips of video shards into a cache of normalised latents.

    The cache holds a copy of the VAE (`OUT/vae`), so that a model trained on it can
    decode. The clips may have several sizes; a batch has one. Finished files are kept
    when the job is interrupted and started again. Processes that share the folder share
    the work.

    Args:
      shards_folder: the clips.
      vae_folder: run or folder of the video VAE.
      out: the folder to write.
      pictures: frames of each clip that are also encoded alone, spread evenly from the
        first to the last, beside the last three.
      with_regions: whether a part of each clip is also encoded with the rest in grey.

    Returns:
      The cache's manifest.

    Raises:
      ShardsError: the folder holds latents of another VAE, of other shards or with other
        views of them.
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

    encode_video = trained_vae.video_encoder(vae)
    strides = vae.config.spatial_stride, vae.config.temporal_stride

    def latents_of(videos: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Latents of videos of one size, padded to `count` for one program."""
        padded = np.stack([*videos, *[videos[-1]] * (count - len(videos))])
        return (encode_video(padded)[: len(videos)] - mean) / std

    def encode_clips(batch: Sequence[records.ClipRecord]) -> np.ndarray:
        videos = [clip.frames() for clip in batch]
        return latents_of(videos, batch_size(videos[0].shape[:3]))

    def views(batch: Sequence[records.ClipRecord]) -> list[latent_cache.Views]:
        videos = [clip.frames() for clip in batch]
        t, h, w, _ = videos[0].shape
        count = batch_size((t, h, w))
        found = [latent_cache.Views()] * len(batch)
        if pictures:
            frames = picture_frames(t, pictures)
            of_frames = [
                latents_of([video[frame : frame + 1] for video in videos], count)
                for frame in frames
            ]
            pictures_nphwc = np.concatenate(of_frames, axis=1)
            found = [
                dataclasses.replace(one, frames=frames, pictures=latents)
                for one, latents in zip(found, pictures_nphwc, strict=True)
            ]
        if with_regions:
            masks = [regions.of_clip(clip.id, (t, h, w)) for clip in batch]
            kept_nthwc = latents_of([*map(regions.blanked, videos, masks)], count)
            found = [
                dataclasses.replace(
                    one, kept=latents, region=regions.of_latents(mask, *strides)
                )
                for one, latents, mask in zip(found, kept_nthwc, masks, strict=True)
            ]
        return found

    # Only where there are some, so that latents without them are still continued.
    stated = {"pictures": pictures} if pictures else {}
    stated |= {"regions": True} if with_regions else {}
    manifest = latent_cache.write(
        out,
        clips,
        encode_clips,
        vae_digest=checkpoint.weights_digest(source),
        preprocessing={"pixels": "[-1, 1]", "normalised": True, **stated},
        views=views if stated else None,
        batch_size=batch_size,
        processes=caches.Processes(
            jax.process_index(), jax.process_count(), meshes.barrier
        ),
    )
    if jax.process_index() == 0:
        pretrained.open_component(source, "vae").copy_to(out / "vae")
    return manifest
