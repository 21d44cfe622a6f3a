"""What diffusers' flow-matching Euler scheduler computes, as JSON on standard output.

Run by the peers' Python: `python scheduler.py STEPS SHIFT X ...` integrates
dx / dsigma = sin(3 x) + sigma x from each X.
"""

import json
import sys

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def main(steps: str, shift: str, *starts: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    # As the pipelines of Flux and Wan call it.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / int(steps), int(steps)))
    x = torch.tensor([float(start) for start in starts])
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        velocity = torch.sin(3 * x) + sigma * x
        x = scheduler.step(velocity, timestep, x).prev_sample
    result = {"sigmas": scheduler.sigmas.tolist(), "samples": x.tolist()}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
