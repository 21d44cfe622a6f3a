"""Latents of large clips, which pass through the video VAE in chunks."""

import jax
import numpy as np

from sora_jax.models import video_vae
from sora_jax.training import trained_vae
from tests.data import clips

VAE = video_vae.Config(latent_channels=4, base_dim=4, num_res_blocks=1)


def test_a_large_clip_is_encoded_in_chunks(monkeypatch):
    networks = trained_vae.networks_of(VAE)
    params = jax.jit(networks.init)(jax.random.key(0))["vae"]
    vae = trained_vae.LoadedVAE(VAE, networks, params)
    records = [clips.clip(index, num_frames=21) for index in range(2)]
    whole = trained_vae.encoder(vae, 2)(records)
    assert whole.shape == (2, 6, 2, 2, 4)
    calls = []
    stream = video_vae.VideoVAE.encode_stream
    monkeypatch.setattr(
        video_vae.VideoVAE,
        "encode_stream",
        lambda self, *a: (calls.append(1), stream(self, *a))[1],
    )
    monkeypatch.setattr(trained_vae, "VOXELS_AT_ONCE", 1)
    np.testing.assert_allclose(trained_vae.encoder(vae, 2)(records), whole, atol=1e-5)
    # One that is not full is filled up, so that no other program is compiled.
    np.testing.assert_allclose(
        trained_vae.encoder(vae, 2)(records[:1]), whole[:1], atol=1e-5
    )
    assert len(calls) == 2


def test_statistics_are_measured_on_clips_of_the_whole_set(tmp_path, monkeypatch):
    networks = trained_vae.networks_of(VAE)
    params = jax.jit(networks.init)(jax.random.key(0))["vae"]
    found = [clips.clip(index) for index in range(2)]
    records = [found[0]] * 20 + [found[1]] * 20
    seen = []

    class Clips:
        def __len__(self):
            return len(records)

        def entry(self, index):
            clip = records[index]
            return {
                name: getattr(clip, name) for name in ("num_frames", "height", "width")
            }

        def read(self, indices):
            seen.extend(indices)
            return [records[index] for index in indices]

    monkeypatch.setattr(trained_vae, "_MEASURED_CLIPS", 4)
    trained_vae.save(tmp_path / "vae", params, VAE, Clips())
    assert seen == [0, 13, 26, 39]
