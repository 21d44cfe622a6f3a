"""A denoiser of 252M parameters from scratch; see s.py for what it needs.

    python -m sora_jax.train --config=configs/b.py --out=runs/b \
        --config.data.latents=latents \
        --config.text.encoder=Wan2.1-T2V-1.3B-Diffusers

Clips of 33 x 256 x 256 (`prepare --num_frames 33`), 2,304 tokens a row. Compiled by
preflight, and not run, for v5e-16 with fsdp=16: 40 % of a device's memory, 1.1 s a step
by estimate (launch/forecasts.md). Proposed meshes, not compiled (a device of a tpu7x is
a core):

    v5p-8 fsdp=4    v6e-8 fsdp=8    tpu7x-8 fsdp=8

It has not been trained.
"""

from configs import s


def get_config():
    """Returns the config."""
    c = s.get_config()
    dit = c.model.dit
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 1024, 14, 8, 4096
    c.optim.learning_rate = 2e-4
    c.loop.num_steps = 300_000
    c.sample.num_frames = 33
    return c
