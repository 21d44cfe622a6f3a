"""Wan 2.1 T2V 1.3B: fine-tuned from open weights, or trained from scratch.

    python -m sora_jax.prepare --source shards:shards --out latents \
        --vae Wan2.1-T2V-1.3B-Diffusers
    python -m sora_jax.prepare --source latents:latents \
        --text_encoder Wan2.1-T2V-1.3B-Diffusers
    python -m sora_jax.train --config=configs/wan_1_3b.py --out=runs/tuned \
        --config.data.latents=latents --init Wan2.1-T2V-1.3B-Diffusers

To train from scratch, replace `--init` by
`--config.text.encoder=Wan2.1-T2V-1.3B-Diffusers`. The recipes of other sizes start from
this one. Compiled by preflight, and not run, for v5e-4 with ulysses=4 and one clip of 81
frames of 480 x 832: 55 % of a device's memory.
"""

from configs import base


def get_config():
    """Returns the config."""
    c = base.get_config()
    c.data.batch_size = 8

    c.text.length = 512
    c.text.clean = True
    c.text.frozen = True
    tiers = c.text.tiers
    tiers.alt, tiers.short, tiers.medium, tiers.dense = 0.1, 0.1, 0.2, 0.6

    dit = c.model.dit
    dit.in_channels = dit.out_channels = 16
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 1536, 30, 12, 8960
    dit.text_dim, dit.freq_dim = 4096, 256
    dit.mask_text = dit.known_embedding = dit.pooled_text = False
    dit.additive_positions = dit.input_skip = False
    dit.rope_theta, dit.time_scale = 10_000.0, None
    dit.dtype, dit.remat = "bfloat16", "full"

    text = c.model.text_encoder  # UMT5-XXL
    text.vocab_size, text.num_layers, text.num_heads = 256_384, 24, 64
    text.head_dim, text.mlp_dim, text.absolute_positions = 64, 10_240, False
    text.dtype = "bfloat16"

    vae = c.model.vae
    vae.latent_channels, vae.patch_size, vae.base_dim = 16, 1, 96
    vae.channel_multipliers, vae.num_res_blocks = (1, 2, 4, 4), 2
    vae.temporal_downsample = (False, True, True)
    vae.spatial_downsample = (True, True, True)
    vae.residual_shortcuts = False

    c.noise.shift = 3.0
    c.known.probabilities.none, c.known.probabilities.first_frame = 1.0, 0.0
    c.known.known_tau = 0.0

    c.optim.learning_rate, c.optim.muon_learning_rate = 1e-5, 0.0
    c.optim.learning_rate_factors = ()
    c.optim.warmup_steps, c.optim.ema_decay = 100, 0.999

    c.loop.num_steps = 5000
    c.sample.num_frames, c.sample.height, c.sample.width = 81, 480, 832
    c.sample.num_inference_steps, c.sample.guidance_scale = 50, 5.0
    c.sample.sampler, c.sample.levels = "unipc", "diffusers"
    return c
