"""A trained video VAE: loaded, run on clips, measured and saved.

Letters: b batch, t time, h height, w width, c channels.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import mesh as meshes
from sora_jax.core import paths
from sora_jax.data import records, samples, shards
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, pretrained
from sora_jax.training import state as states

_MEASURED_CLIPS = 512
# Of video in one pass: more is no faster, and large clips would not fit.
VOXELS_AT_ONCE = 2**21


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


def component(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns the component folder of a video VAE: the folder itself, or its `vae/`."""
    folder = paths.model(folder)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def load(folder: str | pathlib.Path, *, strict: bool = False) -> LoadedVAE:
    """Loads a video VAE.

    Args:
      folder: a component folder, ours or diffusers', or a folder that has one as `vae/`.
      strict: see `pretrained.open_component`.

    Raises:
      FileNotFoundError, ValueError: the VAE is missing or damaged.
    """
    opened = pretrained.open_component(component(folder), "vae", strict=strict)
    return LoadedVAE(opened.config, networks_of(opened.config), opened.load())


def clips_at_once(shape: tuple[int, int, int]) -> int:
    """Returns how many clips of (frames, height, width) are encoded in one batch."""
    return max(1, min(32, VOXELS_AT_ONCE // math.prod(shape)))


def encoder(
    vae: LoadedVAE, batch_size: int | Callable[[tuple[int, int, int]], int]
) -> Callable[[Sequence[records.ClipRecord]], np.ndarray]:
    """Returns a function from clips to latent means, float32 [b, t, h, w, c], unscaled.

    The clips of a call have one size. Fewer of them than `batch_size`, or what it says
    for their (frames, height, width), are padded to it, so that one program is compiled
    for each size.
    """

    encode = video_encoder(vae)

    def encode_clips(clips: Sequence[records.ClipRecord]) -> np.ndarray:
        frames = [clip.frames() for clip in clips]
        count = batch_size(frames[0].shape[:3]) if callable(batch_size) else batch_size
        frames += [frames[-1]] * (count - len(frames))
        return encode(np.stack(frames))[: len(clips)]

    return encode_clips


def video_encoder(vae: LoadedVAE) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from videos, uint8 [b, t, h, w, 3], to their latent means.

    Those of more than VOXELS_AT_ONCE are encoded in chunks, in memory that does not grow
    with their length.
    """

    @jax.jit
    def encode(params, video_u8):
        video = video_u8.astype(jnp.float32) / 127.5 - 1
        return vae.module(params).encode(video)[0]

    module = vae.module()

    def encode_video(video_bthwc: np.ndarray) -> np.ndarray:
        if video_bthwc[..., 0].size <= VOXELS_AT_ONCE:
            return np.asarray(encode(vae.params, video_bthwc))
        chunks = (
            chunk.astype(np.float32) / 127.5 - 1
            for chunk in np.array_split(video_bthwc, video_bthwc.shape[1], axis=1)
        )
        means = [np.asarray(mean) for mean, _ in module.encode_stream(chunks)]
        return np.concatenate(means, axis=1)

    return encode_video


def save(
    folder: str | pathlib.Path,
    params: Mapping,
    config: video_vae.Config,
    clips: shards.Shards | None,
) -> video_vae.Config:
    """Measures each latent channel's mean and deviation, and writes the component.

    Args:
      folder: the component folder to write.
      params: the VAE's parameters, unsharded.
      config: its sizes.
      clips: to measure on; 512 of them are used, spread evenly. None: the config has the
        mean and deviation.

    Returns:
      The config with `latent_mean` and `latent_std`.
    """
    if clips is None:
        checkpoint.save_weights(folder, jax.device_get(params), config)
        return config
    of_shape = collections.defaultdict(list)
    for index in samples.evenly(len(clips), _MEASURED_CLIPS):
        of_shape[records.shape_of(clips.entry(index))].append(index)

    def batch_size(shape: tuple[int, int, int]) -> int:
        return min(clips_at_once(shape), len(of_shape[shape]))

    encode_clips = encoder(LoadedVAE(config, networks_of(config), params), batch_size)
    count, total, square = 0, 0.0, 0.0
    batches = (
        batch
        for shape, indices in of_shape.items()
        for batch in itertools.batched(indices, batch_size(shape))
    )
    for chosen in batches:
        batch = [c for c in clips.read(chosen) if isinstance(c, records.ClipRecord)]
        if not batch:
            continue
        latents_nc = encode_clips(batch).astype(np.float64)
        latents_nc = latents_nc.reshape(-1, config.latent_channels)
        count += len(latents_nc)
        total = total + latents_nc.sum(0)
        square = square + np.square(latents_nc).sum(0)
    mean_c = total / count
    std_c = np.sqrt(np.maximum(square / count - mean_c**2, 1e-8))
    config = dataclasses.replace(
        config,
        latent_mean=tuple(round(float(x), 6) for x in mean_c),
        latent_std=tuple(round(float(x), 6) for x in std_c),
    )
    checkpoint.save_weights(folder, jax.device_get(params), config)
    return config


def gather_and_save(
    folder: pathlib.Path,
    params: Mapping,
    config: video_vae.Config,
    clips: shards.Shards | None,
) -> None:
    """Saves a VAE whose parameters are sharded over a mesh.

    Every process calls it; process 0 measures, on one of its devices, and writes.
    """
    whole = states.gather(params)
    if jax.process_index() == 0:
        with jax.set_mesh(meshes.make_mesh(devices=jax.local_devices()[:1])):
            save(folder, whole, config, clips)
