"""The toy video VAE, for two CPU cores: 4 x 4 x 4 with 24 channels.

    python -m sora_jax.train --config=configs/toy_vae.py --out=runs/toy_vae \
        --config.data.shards=runs/shards
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    c.objective = "vae"
    c.data.batch_size = 8
    c.state_loss.weight = 0.03
    c.reconstruction.latent_noise = 0.4
    c.optim.learning_rate = 5e-3
    c.optim.muon_learning_rate = 0.03
    c.optim.momentum = 0.9
    c.optim.learning_rate_factors = ()
    c.optim.warmup_steps = 20
    c.optim.ema_decay = 0.99
    c.loop.num_steps = 800
    c.loop.checkpoint_every = 200
    c.loop.eval_every = 0
    return c
