"""The toy captioner: reads clips of 9 x 32 x 32 and writes captions of three tiers.

    python -m sora_jax.train --config=configs/toy_captioner.py --out=runs/captioner \\
        --config.data.shards=runs/labelled

As in DALL-E 3 it may be trained in two stages: on short captions of the main thing
(--config.text.tiers.short=1 and the others 0), then, with --init, on all.
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    c.objective = "captioner"
    c.data.batch_size, c.data.gap_clips = 32, 0
    c.data.mirror, c.data.shift, c.data.noise = 0.5, 2, 8.0
    c.text.dropout, c.text.shuffle = 0.2, 0.5
    tiers = c.text.tiers
    tiers.short, tiers.medium, tiers.dense, tiers.structured = 0.15, 0.0, 0.7, 0.15
    c.model.captioner.tiers = ("short", "dense", "structured")
    c.model.captioner.length = 112  # the longest dense caption has 111 tokens

    c.optim.learning_rate, c.optim.muon_learning_rate = 2e-3, 0.01
    c.optim.not_muon, c.optim.learning_rate_factors = (), ()
    c.optim.warmup_steps, c.optim.ema_decay = 50, 0.995
    c.loop.num_steps, c.loop.checkpoint_every, c.loop.eval_every = 3000, 500, 0
    return c
