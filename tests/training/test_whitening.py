"""Whitened latents: their covariance is as asked, and they decode as before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import video_vae
from sora_jax.training import trained_vae, whitening
from tests.data import clips

VAE = video_vae.Config(latent_channels=4, base_dim=4, num_res_blocks=1)


def uneven():
    """A video VAE whose latents' variances differ by orders of magnitude."""
    networks = trained_vae.networks_of(VAE)
    params = jax.device_get(jax.jit(networks.init)(jax.random.key(0))["vae"])
    scales = np.float32([30.0, 3.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0])
    quant = params["quant_conv"]
    quant = {"kernel": quant["kernel"] * scales, "bias": quant["bias"] + scales}
    return networks, dict(params) | {"quant_conv": quant}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_whitened_latents_decode_to_the_same_video(tmp_path, share):
    networks, params = uneven()
    records = [clips.clip(index) for index in range(8)]

    class Clips:
        def __len__(self):
            return len(records)

        def read(self, indices):
            return [records[index] for index in indices]

    def normalized(folder):
        vae = trained_vae.load(folder)
        latents = trained_vae.encoder(vae, 8)(records)
        latents = np.asarray(vae.module().normalize(latents)).astype(np.float64)
        return vae, latents

    plain = trained_vae.save(tmp_path / "plain", params, VAE, Clips())
    even = trained_vae.save(
        tmp_path / "even", params, VAE, Clips(), whitening_share=share
    )
    assert len(set(plain.latent_std)) == 4 and len(set(even.latent_std)) == 1
    assert dataclasses.replace(even, latent_mean=(), latent_std=()) == VAE

    raw = trained_vae.encoder(trained_vae.LoadedVAE(VAE, networks, params), 8)(records)
    raw_nc = raw.reshape(-1, 4).astype(np.float64)
    values, basis = np.linalg.eigh(np.cov(raw_nc.T, bias=True))
    assert values[-1] / values[0] > 1000
    wanted = (basis * values ** (1 - share)) @ basis.T
    vae, latents = normalized(tmp_path / "even")
    found = np.cov(latents.reshape(-1, 4).T, bias=True)
    np.testing.assert_allclose(found, wanted * 4 / np.trace(wanted), atol=2e-3)
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=1e-3)

    @jax.jit
    def decode(latents):
        return vae.module().decode(vae.module().denormalize(latents))

    before = trained_vae.LoadedVAE(VAE, networks, params).module()
    np.testing.assert_allclose(
        decode(jnp.float32(latents)), jax.jit(before.decode)(raw), atol=2e-3
    )


def test_a_linear_codec_is_not_whitened():
    config = dataclasses.replace(VAE, linear_channels=2)
    with pytest.raises(ValueError, match="latent_whitening is 0.5"):
        whitening.check(config, 0.5)
    whitening.check(config, 0.0)
