"""Initial values of a video VAE's linear path: the principal components of its clips.

Of all linear codecs of a size, the principal components of blocks have the least error
(Eckart and Young 1936). Gradient descent takes hundreds of steps to find them; here they
are computed from a sample of blocks, and the network learns a correction.

Letters: n blocks, m values of a block, k components, t time, h height, w width,
c channels.
"""

import math
from collections.abc import Iterable

import numpy as np

from sora_jax.models import video_vae

_VALUES = 2**25  # of all sampled blocks of a kind: 128 MB
_ROUNDS, _SPARE = 12, 8  # of the subspace iteration: steps, vectors beyond k


def components(blocks_nm: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """The k principal components of blocks, by subspace iteration.

    Returns:
      mean_m, basis_mk with orthonormal columns, the strongest first, and std_k along
      them; float32. Components beyond the size of a block are 0.
    """
    mean_m = blocks_nm.mean(0)
    centred_nm = blocks_nm - mean_m
    m = blocks_nm.shape[1]
    spare = min(m, k + _SPARE)
    basis = np.random.default_rng(0).standard_normal((m, spare), np.float32)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(centred_nm.T @ (centred_nm @ basis))
    _, std, rotation = np.linalg.svd(centred_nm @ basis, full_matrices=False)
    basis, std = basis @ rotation.T, std / math.sqrt(len(centred_nm))
    lacking = max(0, k - min(basis.shape))
    basis_mk = np.pad(basis[:, :k], ((0, 0), (0, lacking))).astype(np.float32)
    return mean_m, basis_mk, np.pad(std[:k], (0, lacking)).astype(np.float32)


def blocks(video_thwc: np.ndarray, time: int, space: int) -> np.ndarray:
    """Cuts pixels into whole blocks: [n, c time space space], channels outermost."""
    t, h, w, c = video_thwc.shape
    t, h, w = t // time, h // space, w // space
    x = video_thwc[: t * time, : h * space, : w * space]
    x = x.reshape(t, time, h, space, w, space, c)
    return x.transpose(0, 2, 4, 6, 1, 3, 5).reshape(t * h * w, -1)


def linear_codec(videos: Iterable[np.ndarray], config: video_vae.Config) -> dict:
    """Parameters of the VAE's linear path: the principal components of videos' blocks.

    They set the `config.linear_channels`; the network alone sets the other channels.
    Distances between latents are those between pixels times one factor, which makes the
    latents' variance 1, so an error of a denoiser counts as much as it is visible. A
    rotation mixes the components, so that all channels have the same variance; for first
    frames it is chosen so that the latents of a still video are as constant in time as
    possible.

    Args:
      videos: uint8 [t, h, w, c] each, of any size; some of their blocks are sampled.
      config: of the VAE.

    Raises:
      ValueError: there are fewer blocks than linear channels.
    """
    videos, random = list(videos), np.random.default_rng(0)
    k, space, time = (
        config.linear_channels,
        config.spatial_stride,
        config.temporal_stride,
    )
    firsts_nm, rests_nm = (_sample(videos, t, space, k, random) for t in (1, time))
    mean_first_m, first_mk, _ = components(firsts_nm, k)
    mean_rest_m, rest_mk, std_k = components(rests_nm, k)
    rest_mk = rest_mk @ equalize_variance(np.square(std_k), random)
    # A still block repeats its first frame `time` times.
    still = (firsts_nm - mean_first_m).reshape(len(firsts_nm), -1, 1, space**2)
    still_nm = np.broadcast_to(still, (*still.shape[:2], time, space**2))
    first_mk = first_mk * math.sqrt(time)
    seen_kk = ((firsts_nm - mean_first_m) @ first_mk).T @ (
        still_nm.reshape(len(still), -1) @ rest_mk
    )
    u_kk, _, v_kk = np.linalg.svd(seen_kk)
    first_mk = first_mk @ (u_kk @ v_kk)
    scale = math.sqrt(np.mean(np.square(std_k)))

    def maps(mean_m, basis_mk, gain):
        encode_mk = (basis_mk / scale).astype(np.float32)
        decode_km = (basis_mk.T * (scale / gain)).astype(np.float32)
        return (
            {"kernel": encode_mk, "bias": -mean_m @ encode_mk},
            {"kernel": decode_km, "bias": mean_m},
        )

    encode_first, decode_first = maps(mean_first_m, first_mk, time)
    encode_rest, decode_rest = maps(mean_rest_m, rest_mk, 1)
    return {
        "encode_first": encode_first,
        "decode_first": decode_first,
        "encode_rest": encode_rest,
        "decode_rest": decode_rest,
    }


def equalize_variance(
    variance_k: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """A rotation [k, k] of uncorrelated values that gives all of them the same variance.

    A random rotation, followed by rotations of pairs, each of which gives one value the
    mean variance (Bendel and Mickey 1978).
    """
    k = len(variance_k)
    rotation_kk = np.linalg.qr(random.standard_normal((k, k)))[0]
    for _ in range(k - 1):
        covariance = rotation_kk.T @ (variance_k[:, None] * rotation_kk)
        over = np.diag(covariance) - variance_k.mean()
        i, j = np.argmax(over), np.argmin(over)
        # tan of the angle at which i has the mean: over_i - 2 c t + over_j t^2 = 0.
        c = covariance[i, j]
        root = math.sqrt(max(0.0, c * c - over[i] * over[j]))
        t = (c + math.copysign(root, c)) / min(over[j], -1e-12)
        cos, sin = 1 / math.hypot(1, t), t / math.hypot(1, t)
        pair = rotation_kk[:, [i, j]] @ np.array([[cos, sin], [-sin, cos]])
        rotation_kk[:, [i, j]] = pair
    return rotation_kk


def _sample(videos, time: int, space: int, least: int, random) -> np.ndarray:
    """A sample of videos' blocks, at random phases in time: float32 [n, m] in [-1, 1]."""
    channels = videos[0].shape[-1] if videos else 3
    numbers = channels * time * space**2
    share = max(1, _VALUES // numbers // max(1, len(videos)))
    sample = [np.zeros((0, numbers), np.float32)]
    for video in videos:
        phases = max(1, min(time, len(video) - time + 1))
        found_nm = blocks(video[random.integers(phases) :], time, space)
        chosen = random.permutation(len(found_nm))[:share]
        sample.append(found_nm[chosen].astype(np.float32) / 127.5 - 1)
    blocks_nm = np.concatenate(sample)
    if len(blocks_nm) < least:
        raise ValueError(
            f"the linear path needs {least} blocks of {time} x {space} x {space} for "
            f"as many principal components, but the clips have {len(blocks_nm)}"
        )
    return blocks_nm
