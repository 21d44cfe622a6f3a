"""The video VAE compiled for TPUs that are not there: what a chip must hold.

XLA is asked not to optimize, which is ten times as fast; temporary memory differs by a
hundredth from that of the program that would run (experiments/RESULTS.md, "Video VAE").
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def compiled(libtpu, topology, what) -> dict[str, float]:
    """Runs the bench's command; returns a chip's gigabytes by kind."""
    command = [sys.executable, "-m", "experiments.bench.video_vae", "--base_dim", "96"]
    command += ["--tpu", topology, "--passes", what]
    environment = {
        **os.environ,
        "TPU_LIBRARY_PATH": libtpu,
        "JAX_OPTIMIZATION_LEVEL": "O0",
        # The session's cache is for programs that run.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    kinds = re.findall(r"(arguments|results|in_place|temporary) ([\d.]+)", done.stdout)
    return {kind: float(number) for kind, number in kinds}


@pytest.mark.tpu
def test_the_decoder_of_wan_fits_one_chip_at_480_x_832(libtpu):
    """Full width, bfloat16, one latent after another: 16 GB are more than enough."""
    found = compiled(libtpu, "v5e:1x1", "decode")
    # The state is handed on in place: its 2 GB are there once.
    assert found["results"] - found["in_place"] < 0.1 and found["in_place"] > 1.9
    assert found["arguments"] < 2.5 and found["temporary"] < 3.7


@pytest.mark.tpu
def test_four_chips_share_the_decoders_frames(libtpu):
    found = compiled(libtpu, "v5e:2x2", "decode")
    assert found["arguments"] < 0.9 and found["temporary"] < 1.6
