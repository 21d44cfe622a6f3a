"""A denoiser of 712M parameters from scratch; see s.py for what it needs.

    python -m sora_jax.train --config=configs/l.py --out=runs/l \
        --config.data.latents=latents \
        --config.text.encoder=Wan2.1-T2V-1.3B-Diffusers

Clips of 49 x 480 x 832 (`prepare --num_frames 49 --size 832x480`), 20,280 tokens a
row. Compiled by preflight, and not run, for v6e-16 with fsdp=4,ulysses=4: 63 % of a
device's memory, 4.3 s a step by estimate (launch/forecasts.md). With fsdp=16 and 256 rows
it does not fit. Proposed meshes, not compiled (a device of a tpu7x is a core):

    v5e-16 fsdp=4,ulysses=4    v5p-8 ulysses=4    v6e-8 fsdp=2,ulysses=4
    v5e-256 fsdp=64,ulysses=4    v5p-128 fsdp=64    v6e-256 fsdp=64,ulysses=4
    tpu7x-8 fsdp=2,ulysses=4    tpu7x-16 fsdp=4,ulysses=4

It has not been trained.
"""

from configs import s


def get_config():
    """Returns the config."""
    c = s.get_config()
    c.data.batch_size = 64
    dit = c.model.dit
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 1536, 18, 12, 6144
    c.noise.shift = 5.0  # larger clips stay recognisable at more noise
    c.optim.learning_rate = 1e-4
    c.loop.num_steps = 300_000
    c.sample.num_frames, c.sample.height, c.sample.width = 49, 480, 832
    return c
