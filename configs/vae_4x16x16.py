"""A video VAE from scratch: 4 x 16 x 16 with 48 channels, a narrower Wan 2.2 VAE.

It trains on images and short windows first and on whole clips last; the discriminator
joins late, for sharpness. For accelerators, on clips of 256 x 256:

    python -m sora_jax.prepare --source folder:my_videos --size 256x256 \
        --num_frames 33 --fps 16 --out runs/shards
    python -m sora_jax.train --config=configs/vae_4x16x16.py --out=runs/vae_4x16x16 \
        --config.data.shards=runs/shards

Built and shape-checked by the tests; it has not been trained.
"""

from configs import base


def get_config():
    """Returns the config."""
    c = base.get_config()
    c.objective = "vae"
    c.data.batch_size = 16
    c.data.num_workers = 8
    c.data.crops = (
        (0.4, ((9, 64, 64, 1), (1, 128, 128, 2))),
        (0.4, ((17, 128, 128, 1), (1, 256, 256, 1))),
        (0.2, ((0, 0, 0, 1),)),
    )

    vae = c.model.vae
    vae.latent_channels, vae.patch_size = 48, 2
    vae.base_dim, vae.decoder_base_dim = 96, 128
    vae.channel_multipliers, vae.num_res_blocks = (1, 2, 4, 4), 2
    vae.temporal_downsample = (False, True, True)
    vae.spatial_downsample = (True, True, True)
    vae.linear_channels = 32
    vae.dtype = "bfloat16"
    c.model.discriminator.base_dim = 64
    c.model.discriminator.dtype = "bfloat16"

    c.reconstruction.l1, c.reconstruction.bands = 1.0, 1.0
    c.reconstruction.mse = (
        1.0  # with absolute errors alone the video stays flat grey for long
    )
    c.reconstruction.adversarial, c.reconstruction.adversarial_start = 0.1, 0.6

    c.optim.learning_rate, c.optim.muon_learning_rate = 1e-3, 0.02
    c.optim.learning_rate_factors = (("^vae.linear", 0.0),)
    c.optim.warmup_steps = 1000
    c.optim.ema_decay = 0.9995
    c.loop.num_steps = 100_000
    c.loop.checkpoint_every = 2000
    c.loop.eval_every = 5000

    # A small denoiser of its latents, which this objective does not use.
    dit = c.model.dit
    dit.in_channels = dit.out_channels = 48
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 160, 5, 5, 640
    dit.text_dim, dit.freq_dim = 96, 128
    dit.additive_positions = dit.input_skip = True
    dit.rope_theta, dit.time_scale, dit.remat = 100.0, 2.0, "dots"
    c.model.text_encoder.absolute_positions = True
    c.noise.shift = 12.0
    c.known.probabilities.none, c.known.probabilities.first_frame = 0.9, 0.1
    c.sample.num_frames, c.sample.height, c.sample.width = 33, 256, 256
    return c
