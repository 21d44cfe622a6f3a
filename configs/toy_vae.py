"""The toy video VAE: 4 x 8 x 8, 32 channels, on two CPU cores.

    python -m sora_jax.train --config=configs/toy_vae.py --workdir=runs/toy_vae \
        --config.data.shards=runs/shards
"""

from configs import base


def get_config():
    """Returns the config."""
    c = base.get_config()
    c.objective = "vae"
    c.data.batch_size = 8
    c.optim.learning_rate = 2e-3
    c.optim.learning_rate_factors = ()
    c.optim.ema_decay = 0.99
    c.loop.num_steps = 700
    return c
