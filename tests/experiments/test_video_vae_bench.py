"""The video VAE's bench at a size that tests can afford: it compares before it times."""

import pytest

from experiments.bench import video_vae


@pytest.mark.peers
def test_both_compute_the_same_before_they_are_timed(peers_python, monkeypatch):
    run = (peers_python, 4, (5, 16, 24), 1)
    ratios = video_vae.compare(*run)
    names = ("encode", "decode", "train", "conv3d", "conv3d_channels_last")
    assert set(ratios) == {f"their {name}" for name in names}
    assert all(ratio > 0 for ratio in ratios.values())
    convolve = video_vae.conv.causal_conv3d
    monkeypatch.setattr(
        video_vae.conv, "causal_conv3d", lambda x, k, **o: 1.001 * convolve(x, k, **o)
    )
    with pytest.raises(ValueError, match="differs from the peer's"):
        video_vae.compare(*run)


def test_a_long_video_is_held_to_its_memory(capsys):
    video_vae.minute(4, 9, (16, 24), 1, 2e9)
    assert "9 frames of (16, 24)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="9 frames took"):
        video_vae.minute(4, 9, (16, 24), 1, -1)
