"""The video VAE's bench at a size that tests can afford: it compares before it times."""

import dataclasses

import numpy as np
import pytest

from experiments.bench import video_vae
from sora_jax.models import video_vae as models

TINY = dataclasses.replace(
    models.WAN_2_1,
    base_dim=4,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
)


@pytest.mark.slow
@pytest.mark.peers
def test_results_are_compared_before_timing(peers_python):
    ratios = video_vae.compare(peers_python, TINY, (5, 16, 24), 1)
    names = ("encode", "decode", "train", "conv3d", "conv3d_channels_last")
    assert set(ratios) == set(names)
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_different_results_are_not_timed(wrong):
    ours, theirs = {"conv3d": np.ones(3)}, {"conv3d_channels_last": np.ones(3)}
    video_vae.check(ours, theirs)
    with pytest.raises(ValueError, match="conv3d_channels_last differs"):
        video_vae.check({"conv3d": wrong * np.ones(3)}, theirs)


def test_a_long_video_stays_within_its_memory(capsys):
    video_vae.minute(TINY, 9, (16, 24), 1, 2e9)
    assert "9 frames of (16, 24)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="9 frames took"):
        video_vae.minute(TINY, 9, (16, 24), 1, -1)
