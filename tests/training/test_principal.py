"""Where a video VAE with a linear path begins: principal components, against numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from sora_jax.core import rng, trees
from sora_jax.evals.metrics import reconstruction as evaluation
from sora_jax.models import video_vae
from sora_jax.training import optim, principal, reconstruction, trained_vae
from sora_jax.training import state as states

VAE = video_vae.Config(
    latent_channels=12, patch_size=2, base_dim=8, channel_multipliers=(1, 1),
    num_res_blocks=1, temporal_downsample=(True,), linear_channels=10,
)  # fmt: skip


def clips(count=12, frames=9, size=16, seed=0):
    """Smooth moving patterns: far from all directions are used alike."""
    random = np.random.default_rng(seed)
    t, h, w = np.meshgrid(*(np.arange(s) for s in (frames, size, size)), indexing="ij")
    found = []
    for _ in range(count):
        waves = [
            np.sin(random.normal(0, 0.3, 3) @ [t.ravel(), h.ravel(), w.ravel()] + phase)
            for phase in random.uniform(0, 6, 3)
        ]
        video = np.stack(waves, -1).reshape(frames, size, size, 3)
        found.append(np.round(127.5 + 100 * video).astype(np.uint8))
    return found


def exact(blocks_nm, k):
    """What k principal components leave of blocks, by a full decomposition."""
    mean_m = blocks_nm.mean(0)
    u, s, v = np.linalg.svd(blocks_nm - mean_m, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k] + mean_m


def test_components_are_those_of_a_full_decomposition():
    blocks_nm = np.concatenate([principal.blocks(clip, 2, 4) for clip in clips()])
    blocks_nm = blocks_nm / np.float32(127.5) - 1
    mean_m, basis_mk, std_k = principal.components(blocks_nm, 10)
    scores_nk = (blocks_nm - mean_m) @ basis_mk
    np.testing.assert_allclose(basis_mk.T @ basis_mk, np.eye(10), atol=1e-5)
    np.testing.assert_allclose(scores_nk.std(0), std_k, rtol=1e-4)
    assert list(std_k) == sorted(std_k, reverse=True)
    ours = np.square(scores_nk @ basis_mk.T + mean_m - blocks_nm).sum()
    least = np.square(exact(blocks_nm, 10) - blocks_nm).sum()
    assert ours <= least * 1.001


def test_components_beyond_the_numbers_of_a_block_are_zero():
    blocks_nm = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    mean_m, basis_mk, std_k = principal.components(blocks_nm, 6)
    assert not basis_mk[:, 4:].any() and not std_k[4:].any()
    back = (blocks_nm - mean_m) @ basis_mk @ basis_mk.T + mean_m
    np.testing.assert_allclose(back, blocks_nm, atol=1e-5)


@pytest.fixture(scope="module")
def begun():
    """(parameters, latent means and frames of the clips) of a VAE at step 0."""
    videos = clips()
    codec = principal.linear_codec(videos, VAE)
    networks = reconstruction.Reconstruction(VAE, reconstruction.Weights()).networks
    state = jax.jit(
        lambda given: states.init(
            networks, optim.make(optim.Config(), 2), rng.key(0, "init"), given
        )
    )({"vae": {"linear": codec}})
    measured = evaluation.Reconstruction(VAE, np.stack(videos))
    frames, means = measured.reconstruct(state.params["vae"])
    return state.params["vae"], np.stack(videos) / 255, frames, means


def test_a_new_vae_is_the_best_linear_codec(begun):
    """First frames by components of frames, later ones by components of blocks."""
    _, truth, frames, _ = begun
    stride = VAE.spatial_stride
    for begin, end, time in ((0, 1, 1), (1, 9, 2)):
        parts = [principal.blocks(clip[begin:end], time, stride) for clip in truth]
        found = [principal.blocks(clip[begin:end], time, stride) for clip in frames]
        parts, found = np.concatenate(parts), np.concatenate(found)
        least = np.mean(np.square(exact(parts, VAE.linear_channels) - parts))
        # Its components are of every frame, and every phase, not of these alone.
        assert least * 0.99 <= np.mean(np.square(found - parts)) <= least * 1.3


def test_distances_between_latents_are_those_between_pixels(begun):
    """What lies in the components, that is; the rest is lost."""
    _, _, frames, means = begun
    factors = []
    for begin, end, time, gain in ((0, 1, 1, 2), (1, 9, 2, 1)):
        blocks_nm = np.concatenate(
            [principal.blocks(2 * clip[begin:end] - 1, time, 4) for clip in frames]
        )
        voxels = means[:, begin : begin + (end - begin) // time, ..., :10]
        latents_nk = voxels.reshape(-1, VAE.linear_channels)
        pairs = np.random.default_rng(0).permutation(len(blocks_nm))
        pixels = np.square(blocks_nm - blocks_nm[pairs]).sum(1) * gain
        ratio = np.square(latents_nk - latents_nk[pairs]).sum(1)[pixels > 0.1]
        ratio = ratio / pixels[pixels > 0.1]
        assert ratio.std() < 0.02 * ratio.mean()
        factors.append(ratio.mean())
    assert factors[0] == pytest.approx(factors[1], rel=0.02)


def test_channels_have_similar_variances_with_mean_one(begun):
    rest = begun[3][:, 1:, ..., :10].reshape(-1, VAE.linear_channels)
    assert np.mean(np.square(rest)) == pytest.approx(1, abs=0.1)
    assert np.square(rest).mean(0).max() < 1.3
    assert np.square(rest).mean(0).min() > 0.7


def test_the_network_alone_sets_the_other_channels(begun):
    """Empty at first; what stands there is no part of the linear codec's pixels."""
    params, _, frames, means = begun
    assert not means[..., 10:].any()
    vae = trained_vae.networks_of(VAE).bind({"vae": params})["vae"]
    means = means.copy()
    means[..., 10:] = np.random.default_rng(0).normal(size=(*means.shape[:-1], 2))
    decoded = np.asarray(vae.decode(means))
    np.testing.assert_allclose(np.clip(decoded / 2 + 0.5, 0, 1), frames, atol=1e-5)


@pytest.mark.parametrize("linear_channels", [-1, 13])
def test_more_linear_channels_than_there_are_is_refused(linear_channels):
    with pytest.raises(ValueError, match="it must be from 0 to the 12 latent channels"):
        dataclasses.replace(VAE, linear_channels=linear_channels)


@pytest.mark.parametrize("k", [1, 2, 24])
def test_a_rotation_equalizes_variances(k):
    variance_k = np.exp(-0.5 * np.arange(k))
    rotation_kk = principal.equalize_variance(variance_k, np.random.default_rng(0))
    np.testing.assert_allclose(rotation_kk.T @ rotation_kk, np.eye(k), atol=1e-9)
    found = np.diag(rotation_kk.T @ np.diag(variance_k) @ rotation_kk)
    np.testing.assert_allclose(found, variance_k.mean(), rtol=1e-6)


def test_a_still_video_has_constant_latents(begun):
    params = begun[0]
    still = np.stack([np.repeat(clip[:1], 9, axis=0) for clip in clips(seed=5)])
    _, means = evaluation.Reconstruction(VAE, still).reconstruct(params)
    first, rest = means[:, 0], means[:, 2]
    assert np.corrcoef(first.ravel(), rest.ravel())[0, 1] > 0.95


def test_parameters_without_initial_values_are_random(begun):
    flat = trees.flatten(begun[0])
    assert np.asarray(flat["encoder.conv_in.kernel"]).std() > 0
    assert not np.asarray(flat["decoder.conv_out.kernel"]).any()


def test_fewer_blocks_than_channels_are_refused():
    config = dataclasses.replace(VAE, latent_channels=64, linear_channels=64)
    with pytest.raises(ValueError, match="blocks of 1 x 4 x 4 .* clips have 16"):
        principal.linear_codec(clips(count=1, frames=1), config)
