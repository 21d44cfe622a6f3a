"""The toy denoiser: text to 9 x 32 x 32 videos on two CPU cores.

    python -m sora_jax.train --config=configs/toy.py --out=runs/toy \
        --config.data.latents=runs/latents --config.text.encoder=runs/toy_text
"""

from configs import base


def get_config():
    """Returns the config; `base` was written for this size."""
    return base.get_config()
