"""The toy denoiser of every task: text, pictures, parts of a clip, levels of its own.

    python -m sora_jax.train --config=configs/toy_mixture.py --init toy \\
        --out=runs/mixture --config.data.latents=runs/latents_scenes,\\
        runs/latents_groups,runs/latents_loops,runs/latents_rates

sora_jax/training/README.md has the commands that make these latents.
Its rows are packed, since clips have several lengths, and pictures add tokens to some.
"""

from configs import toy


def get_config():
    """Returns the config."""
    c = toy.get_config()
    # Rows of four clips of 48 tokens each, or fewer with what is given beside them.
    c.data.batch_size, c.data.gap_clips = 8, 0
    c.packing.shapes, c.packing.tokens, c.packing.unit, c.packing.clips = 1, 192, 16, 4

    shares = c.known.probabilities
    shares.none, shares.first_frame, shares.head = 0.06, 0.08, 0.06
    shares.tail, shares.both, shares.keyframes, shares.every = 0.06, 0.06, 0.07, 0.05
    shares.region, shares.levels = 0.06, 0.02
    # Of clips that have other clips; of the rest nothing is given. All loops are loops.
    shares.reference, shares.edit, shares.loop = 0.2, 0.27, 0.01
    # Most are nearly clean, since a task gives clean latents; noisier ones for what a
    # model has made itself.
    c.known.levels = ((0.005, 0.7), (0.1, 0.2), (0.5, 0.1))
    c.known.known_tau, c.known.dropout, c.known.mid_clip = 0.005, 0.05, 0.1
    c.known.images = 0.03

    # The run begins with weights that read captions.
    c.noise.shift, c.noise.std, c.state_loss.focus = 4.0, 1.5, 2.0
    c.optim.learning_rate, c.optim.muon_learning_rate = 1.5e-3, 0.01
    c.optim.ema_decay, c.loop.num_steps = 0.999, 6000
    c.sample.guidance_scale = 3.0
    return c
