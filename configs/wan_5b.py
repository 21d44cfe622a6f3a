"""Wan 2.2 TI2V 5B: text to video, and from a first frame; see wan_1_3b.py.

    python -m sora_jax.train --config=configs/wan_5b.py --out=runs/tuned \
        --config.data.latents=latents --init Wan2.2-TI2V-5B-Diffusers

Compiled by preflight, and not run, for v6e-16 with fsdp=4,ulysses=4 and four clips of 121
frames of 704 x 1280 (27,280 tokens): 30 % of a device's memory, 2.1 s a step by estimate.
"""

from configs import wan_1_3b


def get_config():
    """Returns the config."""
    c = wan_1_3b.get_config()
    dit = c.model.dit
    dit.in_channels = dit.out_channels = 48
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 3072, 30, 24, 14_336

    vae = c.model.vae
    vae.latent_channels, vae.patch_size, vae.base_dim = 48, 2, 160
    vae.temporal_downsample = (False, True, True)
    vae.residual_shortcuts, vae.decoder_base_dim = True, 256

    c.noise.shift = 5.0
    c.known.probabilities.none, c.known.probabilities.first_frame = 0.7, 0.3
    c.sample.num_frames, c.sample.height, c.sample.width = 121, 704, 1280
    return c
