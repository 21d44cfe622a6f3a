"""A toy video VAE with a sixteenth of the latent voxels: 4 x 16 x 16, 48 channels.

    python -m sora_jax.prepare --source toyworld:tw64 --num_clips 6400 --out runs/tw64
    python -m sora_jax.train --config=configs/toy_vae_4x16x16.py \
        --out=runs/toy_vae_4x16x16 --config.data.shards=runs/tw64

32 channels are initialised to principal components, 16 are learned. After an hour on two
cores, mostly on windows of five frames, it reaches 35.2 dB on held-out clips, and the
oracle reads all 256 of them correctly (experiments/RESULTS.md).
"""

from configs import toy_vae


def get_config():
    """Returns the config."""
    c = toy_vae.get_config()
    c.model.vae.latent_channels, c.model.vae.linear_channels = 48, 32
    c.model.vae.channel_multipliers = (1, 2, 2)
    c.model.vae.spatial_downsample = (True, True)
    c.data.batch_size = 16
    # Short windows, at a third of the cost, teach shapes; whole clips come last.
    c.data.crops = ((0.8, ((5, 0, 0, 1),)), (0.2, ((0, 0, 0, 1),)))
    c.optim.learning_rate, c.optim.muon_learning_rate = 2e-3, 0.012
    c.optim.learning_rate_factors = (("^vae.linear", 0.0),)
    c.loop.num_steps = 1500
    c.loop.checkpoint_every = 100

    # For a denoiser of its latents.
    c.model.dit.in_channels = c.model.dit.out_channels = 48
    c.sample.num_frames, c.sample.height, c.sample.width = 17, 64, 64
    return c
