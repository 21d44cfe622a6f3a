"""A denoiser of 57M parameters from scratch: Wan's block, on latents of Wan 2.1's VAE.

    python -m sora_jax.prepare --source folder:my_videos --size 256x256 \
        --num_frames 17 --fps 16 --out shards
    python -m sora_jax.prepare --source shards:shards --out latents \
        --vae Wan2.1-T2V-1.3B-Diffusers
    python -m sora_jax.prepare --source latents:latents \
        --text_encoder Wan2.1-T2V-1.3B-Diffusers
    python -m sora_jax.train --config=configs/s.py --out=runs/s \
        --config.data.latents=latents \
        --config.text.encoder=Wan2.1-T2V-1.3B-Diffusers

1,280 tokens a row. Compiled by preflight, and not run, for v5e-16 with fsdp=16: 11 % of a
device's memory, .19 s a step by estimate (launch/forecasts.md). A device of a tpu7x is a
core, two of which are a chip. Proposed meshes, not compiled:

    v5p-8 fsdp=4    v6e-8 fsdp=8    tpu7x-8 fsdp=8

Unlike Wan's weights, it masks the padding of text, measures time in seconds, so that
clips of several frame rates can be mixed, and learns to continue from a first frame. It
has not been trained.
"""

from configs import wan_1_3b


def get_config():
    """Returns the config."""
    c = wan_1_3b.get_config()
    c.data.batch_size = 256
    dit = c.model.dit
    # Attention kernels of TPUs and GPUs are optimised for heads of 128.
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 512, 12, 4, 2048
    dit.mask_text = dit.known_embedding = dit.pooled_text = True
    dit.time_scale = 4.0  # a unit is a latent frame at 16 frames a second
    dit.remat = "attention"

    c.known.probabilities.none, c.known.probabilities.first_frame = 0.8, 0.2
    c.known.known_tau = 0.02

    c.optim.learning_rate, c.optim.weight_decay = 3e-4, 0.01
    c.optim.warmup_steps, c.optim.ema_decay = 2000, 0.9999
    c.loop.num_steps, c.loop.checkpoint_every = 200_000, 5000

    c.sample.num_frames, c.sample.height, c.sample.width = 17, 256, 256
    c.sample.sampler, c.sample.levels = "euler", "even"
    return c
