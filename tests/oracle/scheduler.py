"""What diffusers' flow-matching schedulers compute, as JSON on standard output.

Run by the peers' Python: `python scheduler.py FORM STEPS SHIFT X ...` integrates
dx / dsigma = sin(3 x) + t x, where t is the timestep that the network is told / 1000,
from each X. FORM is "even" (Euler at sigmas that the caller gives, as for Flux), or
"euler" or "unipc" as Wan's pipelines call them.
"""

import json
import sys

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler


def main(form: str, steps: str, shift: str, *starts: str) -> None:
    if form == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=float(shift),
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    if form == "even":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / int(steps), int(steps)))
    else:
        scheduler.set_timesteps(int(steps))
    x = torch.tensor([float(start) for start in starts])[:, None]  # [batch, channel]
    for timestep in scheduler.timesteps:
        velocity = torch.sin(3 * x) + timestep / 1000 * x
        x = scheduler.step(velocity, timestep, x).prev_sample
    result = {
        "sigmas": scheduler.sigmas.tolist(),
        "levels": (scheduler.timesteps / 1000).tolist(),
        "samples": x[:, 0].tolist(),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
