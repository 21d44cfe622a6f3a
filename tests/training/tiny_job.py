"""A recipe of a few thousand parameters for the job `train`, and latents for it."""

import jax
import numpy as np

from sora_jax.data import latent_cache, shards, toy_clips
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, trained_vae

STEPS = 20
TINY = {
    "model.dit.dim": 32, "model.dit.num_heads": 2, "model.dit.num_layers": 1,
    "model.dit.mlp_dim": 32, "model.dit.text_dim": 16, "model.dit.freq_dim": 16,
    "model.dit.in_channels": 4, "model.dit.out_channels": 4,
    "model.text_encoder.num_layers": 1, "model.text_encoder.num_heads": 2,
    "model.text_encoder.head_dim": 8, "model.text_encoder.mlp_dim": 16,
    "text.vocab_size": 300, "optim.learning_rate_factors": (), "data.batch_size": 8,
    "loop.num_steps": STEPS, "loop.log_every": 1, "loop.checkpoint_every": 4,
}  # fmt: skip


def write_latents(out, shards_folder, grid):
    """A cache of made-up latents of four channels."""

    def encode(batch):
        numbers = np.array([clip.frames()[0, 0, 0, 0] for clip in batch])
        noise = np.random.default_rng(numbers.tolist()).normal(size=(*grid, 4))
        return (noise + numbers[:, None, None, None, None] / 24).astype(np.float32)

    latent_cache.write(
        out, shards.open(shards_folder), encode, vae_digest="tiny", preprocessing={}
    )


def write_vae(folder):
    """A video VAE of random weights and four channels, as a latent cache holds it."""
    config = video_vae.Config(latent_channels=4, base_dim=4, num_res_blocks=1)
    params = jax.jit(trained_vae.networks_of(config).init)(jax.random.key(0))["vae"]
    checkpoint.save_weights(folder, jax.device_get(params), config)


def write_toy_world(out, num_clips):
    """Shards of that many toy-world clips, their latents and a video VAE, in `out`."""
    shards.write(out / "shards", toy_clips.ToyClips("tw16", num_clips))
    write_latents(out / "latents", out / "shards", (2, 4, 4))
    write_vae(out / "latents" / "vae")
    return out / "latents"
