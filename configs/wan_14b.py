"""Wan 2.1 T2V 14B; see wan_1_3b.py.

    python -m sora_jax.train --config=configs/wan_14b.py --workdir=runs/tuned \
        --config.data.latents=latents --init Wan2.1-T2V-14B-Diffusers
"""

from configs import wan_1_3b


def get_config():
    """Returns the config."""
    c = wan_1_3b.get_config()
    dit = c.model.dit
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 5120, 40, 40, 13_824
    dit.remat, c.optim.moments = "offload", "bfloat16"
    c.noise.shift = 5.0
    c.sample.height, c.sample.width = 720, 1280
    return c
