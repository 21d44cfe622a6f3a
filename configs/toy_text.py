"""The toy text encoder: reads one caption of a clip and writes another.

    python -m sora_jax.train --config=configs/toy_text.py --out=runs/toy_text \
        --config.data.latents=runs/latents

It takes a minute on two CPU cores.
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    c.objective = "text_encoder"
    c.data.batch_size = 64
    c.optim.not_muon = ()
    c.optim.learning_rate_factors = ()
    c.optim.warmup_steps = 30
    c.optim.ema_decay = 0.98
    c.loop.num_steps = 1000
    c.loop.checkpoint_every = 500
    c.loop.eval_every = 0
    return c
