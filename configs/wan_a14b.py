"""Wan 2.2 T2V A14B: one of its two experts, for noise levels above 0.875.

    python -m sora_jax.train --config=configs/wan_a14b.py --out=runs/high \
        --config.data.latents=latents --init Wan2.2-T2V-A14B-Diffusers/transformer
    python -m sora_jax.train --config=configs/wan_a14b.py --out=runs/low \
        --config.data.latents=latents --init Wan2.2-T2V-A14B-Diffusers/transformer_2 \
        --config.noise.levels="(0.0,0.875)"
    python -m sora_jax.convert --from runs/high --expert_2 runs/low --boundary 0.875 \
        --out tuned --license apache-2.0
"""

from configs import wan_14b


def get_config():
    """Returns the config."""
    c = wan_14b.get_config()
    c.noise.shift = 12.0
    c.noise.levels = (0.875, 1.0)
    c.sample.num_inference_steps, c.sample.guidance_scale = 40, 4.0
    return c
