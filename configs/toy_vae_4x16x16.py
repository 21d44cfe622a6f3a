"""The toy video VAE with a sixteenth of the voxels: 4 x 16 x 16, 48 channels.

    python -m sora_jax.prepare --source toyworld:tw64 --num_clips 1600 --out runs/tw64
    python -m sora_jax.train --config=configs/toy_vae_4x16x16.py \
        --workdir=runs/toy_vae_4x16x16 --config.data.shards=runs/tw64

It begins at the 29 dB of as many principal components and has 31.75 dB on clips that it
has not seen after 600 steps. Colours and paths come through; one of two small objects has
lost its shape in a tenth to a fifth of them (experiments/RESULTS.md).
"""

from configs import toy_vae


def get_config():
    """Returns the config."""
    c = toy_vae.get_config()
    c.model.vae.latent_channels = 48
    c.model.vae.channel_multipliers = (1, 2, 2)
    c.model.vae.spatial_downsample = (True, True)
    c.model.vae.linear_path = True
    c.optim.learning_rate_factors = (("^vae.linear", 0.0),)
    c.loop.num_steps = 900
    c.loop.checkpoint_every = 100

    # What a denoiser of its latents would be given.
    c.model.dit.in_channels = c.model.dit.out_channels = 48
    c.sample.num_frames, c.sample.height, c.sample.width = 17, 64, 64
    return c
