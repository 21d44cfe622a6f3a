"""Measures of reconstruction against their definitions, and what each must notice."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from sora_jax.evals.metrics import reconstruction
from sora_jax.models import video_vae
from sora_jax.training import perceptual, trained_vae
from tests.training import tiny_lpips

VAE = video_vae.Config(
    latent_channels=4, patch_size=2, base_dim=8, channel_multipliers=(1, 1),
    num_res_blocks=1, temporal_downsample=(True,),
)  # fmt: skip


@pytest.fixture(scope="module")
def clips():
    random = np.random.default_rng(0)
    coarse = random.uniform(size=(6, 5, 6, 8, 3))
    smooth = ndimage.zoom(coarse, (1, 1, 4, 4, 1), order=1)
    return smooth.astype(np.float32)


def reference_ssim(a, b):
    """Gaussian window by scipy, cut where it would leave the frame."""

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.34, mode="constant")[
            5:-5, 5:-5
        ]

    values = []
    for frame_a, frame_b in zip(a, b, strict=True):
        for c in range(3):
            x, y = (f[..., c].astype(np.float64) for f in (frame_a, frame_b))
            mx, my = blur(x), blur(y)
            vx, vy = blur(x * x) - mx**2, blur(y * y) - my**2
            both = blur(x * y) - mx * my
            top = (2 * mx * my + 0.01**2) * (2 * both + 0.03**2)
            values.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return np.mean(values)


def test_ssim_agrees_with_the_paper(clips):
    random = np.random.default_rng(1)
    noisy = np.clip(clips + 0.1 * random.normal(size=clips.shape), 0, 1)
    found = reconstruction.ssim(clips, noisy.astype(np.float32))
    wanted = [reference_ssim(a, b) for a, b in zip(clips, noisy, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(reconstruction.ssim(clips, clips), 1, atol=1e-6)


def test_psnr_of_a_known_error(clips):
    found = reconstruction.psnr(clips, clips + 0.1)
    np.testing.assert_allclose(found, 20, atol=1e-4)
    np.testing.assert_allclose(reconstruction.psnr(clips, clips), 100)


def test_a_constant_error_does_not_flicker(clips):
    steady = clips + 0.1
    flickers = clips + 0.1 * (-1.0) ** np.arange(5)[None, :, None, None, None]
    np.testing.assert_allclose(reconstruction.flicker(clips, steady), 0, atol=1e-6)
    np.testing.assert_allclose(reconstruction.flicker(clips, flickers), 0.2, rtol=1e-5)
    # A still picture of the first frame has an error that moves, wherever the clip does.
    still = np.repeat(clips[:, :1], 5, axis=1)
    assert (reconstruction.flicker(clips, still) > 0.05).all()
    assert not reconstruction.flicker(clips[:, :1], steady[:, :1]).any()


def test_latents_are_described():
    random = np.random.default_rng(2)
    normal = random.normal(size=(64, 3, 4, 4, 4)) * [1.0, 2.0, 0.5, 0.001]
    found = reconstruction.describe_latents(normal)
    assert found["std_most"] == pytest.approx(2, rel=0.05)
    assert found["dead_channels"] == 1
    assert abs(found["kurtosis"]) < 0.2
    heavy = random.standard_t(5, size=(64, 3, 4, 4, 4))
    assert reconstruction.describe_latents(heavy)["kurtosis"] > 1


def test_the_evaluator_measures_a_vae(clips):
    video = np.round(clips[..., :24, :32, :] * 255).astype(np.uint8)
    evaluator = reconstruction.Reconstruction(VAE, video, batch_size=4)
    params = jax.jit(trained_vae.networks_of(VAE).init)(jax.random.key(0))
    found = dict(evaluator.run(params))
    assert found.keys() >= {"psnr", "ssim", "flicker", "latent_kurtosis"}
    frames, means = evaluator.reconstruct(params["vae"])
    assert frames.shape == video.shape and means.shape == (6, 3, 6, 8, 4)
    assert found["psnr"] == pytest.approx(
        np.mean(reconstruction.psnr(video / 255, frames)), rel=1e-4
    )
    assert found["psnr"] < 20 and found["ssim"] < 0.9  # it knows nothing yet


def test_lpips_is_measured_where_weights_are_given(tmp_path, monkeypatch):
    """And is the same whether frames pass at once or in groups with a rest."""
    file = tiny_lpips.write(tmp_path / "a.safetensors")
    lpips = reconstruction.Lpips(perceptual.open_weights(file))
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (3, 5, 32, 40, 3), np.uint8)
    evaluator = reconstruction.Reconstruction(VAE, video, lpips=lpips, batch_size=4)
    params = jax.jit(trained_vae.networks_of(VAE).init)(jax.random.key(0))
    frames, _ = evaluator.reconstruct(params["vae"])
    truth = video.astype(np.float32) / 255
    whole = lpips(truth, frames)
    assert whole.shape == (3,) and (whole > 0).all()
    alone = [lpips(truth[:, [i]], frames[:, [i]]) for i in range(5)]
    np.testing.assert_allclose(np.mean(alone, 0), whole, rtol=1e-5)
    assert dict(evaluator.run(params))["lpips"] == pytest.approx(whole.mean())
    assert lpips(truth, truth).max() < 1e-9 * whole.min()
    with pytest.raises(ValueError, match="at least 31 x 31 pixels"):
        reconstruction.Reconstruction(VAE, video[:, :, :24], lpips=lpips)
    monkeypatch.setattr(trained_vae, "VOXELS_AT_ONCE", 4 * 32 * 40)
    np.testing.assert_allclose(lpips(truth, frames), whole, rtol=1e-5)


def test_large_clips_are_the_same_in_chunks(monkeypatch):
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (2, 9, 8, 8, 3), np.uint8)
    params = jax.jit(trained_vae.networks_of(VAE).init)(jax.random.key(0))["vae"]
    wanted = reconstruction.round_trip(VAE, 2)(params, video)
    monkeypatch.setattr(trained_vae, "VOXELS_AT_ONCE", 8 * 8)
    found = reconstruction.round_trip(VAE, 2)(params, video)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
