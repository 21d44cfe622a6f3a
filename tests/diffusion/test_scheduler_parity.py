"""The schedules and the solvers against diffusers' own."""

import json
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import samplers, timesteps

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "scheduler.py"
STARTS = np.linspace(-2, 2, 7).astype(np.float32)


@pytest.mark.peers
@pytest.mark.parametrize(
    "form, steps, shift",
    [
        ("even", 20, 5.0),
        ("euler", 20, 3.0),
        ("euler", 1, 1.0),
        ("unipc", 20, 5.0),
        ("unipc", 11, 1.0),
        ("unipc", 2, 12.0),
        ("unipc", 1, 3.0),
    ],
)
def test_levels_and_samples_are_those_of_diffusers(peers_python, form, steps, shift):
    command = [peers_python, str(SCRIPT), form, str(steps), str(shift)]
    run = subprocess.run(
        [*command, *map(str, STARTS)], check=True, capture_output=True, text=True
    )
    peer = json.loads(run.stdout)
    sampler = "unipc" if form == "unipc" else "euler"
    if form == "even":
        taus = timesteps.schedule(steps, shift)
        levels = taus[:-1]
    else:
        taus, levels = timesteps.diffusers_schedule(sampler, steps, shift)
    np.testing.assert_allclose(taus, peer["sigmas"], atol=1e-6)
    np.testing.assert_allclose(levels, peer["levels"], atol=1e-6)
    x = jnp.asarray(STARTS)
    got, *_ = samplers.sample_chunk(
        lambda x, level: jnp.sin(3 * x) + level * x,
        x,
        samplers.init_memory(x, sampler),
        samplers.plan(sampler, taus, levels),
        sampler=sampler,
    )
    np.testing.assert_allclose(got, peer["samples"], atol=3e-5)
