"""The toy prompt upsampler: reads short prompts and writes captions that say everything.

    python -m sora_jax.train --config=configs/toy_upsampler.py --out=runs/upsampler \\
        --config.data.shards=runs/shards

It reads captions of text.tiers, and writes those of model.captioner.tiers, as it is asked
to. It takes minutes on two CPU cores.
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    c.objective = "upsampler"
    c.data.batch_size, c.data.gap_clips = 64, 0
    c.text.tiers.short, c.text.tiers.medium, c.text.tiers.structured = 0.5, 0.5, 0.0
    captioner = c.model.captioner
    captioner.reads, captioner.tiers = "text", ("medium", "dense", "structured")
    captioner.dim, captioner.num_heads, captioner.mlp_dim = 96, 3, 192
    captioner.num_layers, captioner.decoder_layers = 2, 2
    captioner.read_length, captioner.length = 32, 112

    c.optim.learning_rate, c.optim.muon_learning_rate = 3e-3, 0.02
    c.optim.not_muon, c.optim.learning_rate_factors = (), ()
    c.optim.warmup_steps, c.optim.ema_decay = 50, 0.99
    c.loop.num_steps, c.loop.checkpoint_every, c.loop.eval_every = 2000, 500, 0
    return c
