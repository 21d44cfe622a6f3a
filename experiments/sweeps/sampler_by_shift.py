"""Solvers by shifts of the noise levels.

    python -m experiments.sweep --sweep experiments/sweeps/sampler_by_shift.py \\
        --out runs/sampler_by_shift --set model=runs/quickstart/model \\
        --set shards=runs/quickstart/shards

A shift of 1 spaces the levels evenly; a larger one moves steps towards pure noise, where
the toy's captions are decided (experiments/noise_band.py). Heun evaluates the network
twice per step except in the last, so it gets half the steps.
"""

from experiments.sweeping.points import Sweep, axis, product, prompts, zipped


def get_sweep() -> Sweep:
    """Nine points, all of nearly the same cost."""
    solvers = zipped(
        axis("sampler", ["euler", "unipc", "heun"]),
        axis("num_inference_steps", [10, 10, 5]),
    )
    return Sweep(
        job="evaluate",
        points=product(solvers, axis("shift", [3, 6, 12])),
        base=prompts(motion=64, relation=64),
        quality="relation/side",
        columns=("motion/colour", "motion/direction", "FVD-toy"),
    )
