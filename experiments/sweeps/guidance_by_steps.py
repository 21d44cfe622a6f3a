"""Numbers of sampling steps by guidance scales.

    python -m experiments.sweep --sweep experiments/sweeps/guidance_by_steps.py \\
        --out runs/guidance_by_steps --set model=runs/quickstart/model \\
        --set shards=runs/quickstart/shards

Guidance evaluates the network twice per step, so 20 steps without it cost as much as 10
with it.
"""

from experiments.sweeping.points import Sweep, axis, product, prompts


def get_sweep() -> Sweep:
    """Nine points."""
    return Sweep(
        job="evaluate",
        points=product(
            axis("guidance_scale", [1, 2, 3.5]),
            axis("num_inference_steps", [5, 10, 20]),
        ),
        base=prompts(motion=64, relation=64),
        quality="relation/side",
        columns=("motion/colour", "motion/direction", "FVD-toy"),
    )
