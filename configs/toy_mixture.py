"""The toy denoiser of every task: text, pictures, parts of a clip, levels of its own.

    python -m sora_jax.prepare --source shards:runs/shards --vae toy \\
        --pictures 9 --regions --out runs/latents
    python -m sora_jax.train --config=configs/toy_mixture.py --init toy \\
        --out=runs/toy_mixture --config.data.latents=runs/latents

Its rows are packed, since pictures add tokens to some clips.
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    # Rows of four clips of 48 tokens each, or fewer with their pictures.
    c.data.batch_size, c.data.gap_clips = 8, 0
    c.packing.shapes, c.packing.tokens, c.packing.unit, c.packing.clips = 1, 192, 16, 4

    shares = c.known.probabilities
    shares.none, shares.first_frame, shares.head = 0.4, 0.12, 0.1
    shares.tail, shares.both, shares.keyframes, shares.every = 0.07, 0.08, 0.08, 0.04
    shares.region, shares.levels = 0.05, 0.06
    # Half nearly clean, since a task gives clean latents; noisier ones for what a model
    # has made itself.
    c.known.levels = ((0.005, 0.5), (0.1, 0.3), (0.5, 0.2))
    c.known.known_tau, c.known.dropout, c.known.mid_clip = 0.005, 0.05, 0.1
    c.state_loss.weight = 0.0
    return c
