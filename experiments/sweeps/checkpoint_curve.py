"""What did each stretch of training bring? Scores of every checkpoint that a run kept.

    python -m experiments.sweep --sweep experiments/sweeps/checkpoint_curve.py \\
        --out runs/checkpoint_curve --set model=runs/quickstart/model \\
        --set shards=runs/quickstart/shards

A run keeps its newest two; one that is trained for this curve keeps more:
`--config.loop.keep_checkpoints=20 --config.loop.checkpoint_every=250`.
"""

from experiments.sweeping.points import EVERY, Sweep, axis, prompts


def get_sweep() -> Sweep:
    """As many points as there are checkpoints."""
    return Sweep(
        job="evaluate",
        points=axis("checkpoints", [EVERY]),
        base=prompts(motion=64, relation=64),
        quality="relation/side",
        cost="checkpoints",
        columns=("motion/colour", "motion/direction", "FVD-toy"),
    )
