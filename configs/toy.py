"""The toy denoiser: text to 9 x 32 x 32 videos on two CPU cores.

    python -m sora_jax.train --config=configs/toy.py --out=runs/toy \
        --config.data.latents=runs/latents --config.text.encoder=runs/toy_text
"""

from configs import base


def get_config():
    """Returns the config."""
    c = base.get_config()
    c.data.batch_size = 32
    c.data.gap_clips = 32
    c.text.length, c.text.vocab_size = 36, 640
    # Short captions do not say how fast something moves; structured ones say all.
    c.text.tiers.short, c.text.tiers.medium, c.text.tiers.structured = 0.25, 0.55, 0.2

    dit = c.model.dit
    dit.in_channels = dit.out_channels = 24
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 160, 5, 5, 640
    dit.text_dim, dit.freq_dim = 96, 128
    dit.additive_positions = dit.input_skip = True
    dit.context_embedding = True  # for --init toy: the shipped weights have it
    dit.rope_theta = 100.0  # for a grid of a few tokens a side
    dit.time_scale = 2.0
    dit.remat = "dots"

    text = c.model.text_encoder
    text.num_layers, text.num_heads, text.head_dim, text.mlp_dim = 2, 3, 32, 192
    text.absolute_positions = True

    vae = c.model.vae
    vae.latent_channels, vae.patch_size, vae.base_dim = 24, 4, 64
    vae.channel_multipliers, vae.num_res_blocks = (1, 1, 1), 1
    # Space is compressed by folding alone. Upsampling repeats voxels, and what lies
    # inside a block must then be learned from its neighbours, which takes several times
    # as long as this recipe has.
    vae.temporal_downsample, vae.spatial_downsample = (True, True), (False, False)

    # What a caption says is decided at high levels. A run that begins with weights that
    # read captions draws shapes better with shift 4, std 1.5 and focus 2.
    c.noise.shift = 12.0
    c.known.probabilities.none, c.known.probabilities.first_frame = 0.9, 0.1

    c.state_loss.weight = 0.1

    c.optim.learning_rate, c.optim.muon_learning_rate = 3e-3, 0.02
    # A trained text encoder (text.encoder) already knows what words mean; a random one
    # needs the full rate: ().
    c.optim.learning_rate_factors = (("^text_encoder", 0.1),)
    c.optim.warmup_steps, c.optim.ema_decay = 50, 0.998
    c.loop.num_steps, c.loop.checkpoint_every, c.loop.eval_every = 4400, 500, 1000

    c.sample.num_frames, c.sample.height, c.sample.width = 9, 32, 32
    c.sample.num_inference_steps, c.sample.guidance_scale = 20, 2.0
    return c
