"""The schedule and the Euler solver against diffusers' own."""

import json
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import samplers, timesteps

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "scheduler.py"


@pytest.mark.peers
def test_levels_and_samples_are_those_of_diffusers(peers_python):
    steps, shift = 20, 5.0
    starts = np.linspace(-2, 2, 7).astype(np.float32)
    command = [peers_python, str(SCRIPT), str(steps), str(shift), *map(str, starts)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peer = json.loads(run.stdout)
    taus = timesteps.schedule(steps, shift)
    np.testing.assert_allclose(taus, peer["sigmas"], atol=1e-6)
    got = samplers.sample_chunk(
        lambda x, tau: jnp.sin(3 * x) + tau * x, jnp.asarray(starts), taus
    )
    np.testing.assert_allclose(got, peer["samples"], atol=1e-5)
