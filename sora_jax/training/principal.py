"""Where a video VAE with a linear path begins: at the principal components of its clips.

Of all linear codecs of a size, the principal components of blocks lose least (Eckart and
Young 1936). A network takes hundreds of steps to find them by gradients; here they are
computed from a sample of blocks, and the network learns what to add.

Letters: n blocks, m numbers of a block, k components, t time, h height, w width,
c channels.
"""

import math
from collections.abc import Iterable

import numpy as np

from sora_jax.models import video_vae

_NUMBERS = 2**25  # of all sampled blocks of a kind: 128 MB
_ROUNDS, _SPARE = 12, 8  # of the subspace iteration: steps, vectors beyond k


def components(blocks_nm: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """The k principal components of blocks, by subspace iteration.

    Returns:
      mean_m, basis_mk with orthonormal columns, the strongest first, and std_k along
      them; float32. Components beyond the numbers of a block are 0.
    """
    mean_m = blocks_nm.mean(0)
    centred_nm = blocks_nm - mean_m
    m = blocks_nm.shape[1]
    spare = min(m, k + _SPARE)
    basis = np.random.default_rng(0).standard_normal((m, spare), np.float32)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(centred_nm.T @ (centred_nm @ basis))
    _, std, turn = np.linalg.svd(centred_nm @ basis, full_matrices=False)
    basis, std = basis @ turn.T, std / math.sqrt(len(centred_nm))
    none = max(0, k - min(basis.shape))
    basis_mk = np.pad(basis[:, :k], ((0, 0), (0, none))).astype(np.float32)
    return mean_m, basis_mk, np.pad(std[:k], (0, none)).astype(np.float32)


def blocks(video_thwc: np.ndarray, time: int, space: int) -> np.ndarray:
    """Cuts pixels into whole blocks: [n, c time space space], channels outermost."""
    t, h, w, c = video_thwc.shape
    t, h, w = t // time, h // space, w // space
    x = video_thwc[: t * time, : h * space, : w * space]
    x = x.reshape(t, time, h, space, w, space, c)
    return x.transpose(0, 2, 4, 6, 1, 3, 5).reshape(t * h * w, -1)


def linear_codec(videos: Iterable[np.ndarray], config: video_vae.Config) -> dict:
    """Parameters of the VAE's linear path that make it the components of videos' blocks.

    All of this is about `config.linear_channels`; the network has the others to itself.
    Distances between latents are those between pixels, but for one factor, which makes
    their variance 1: what a denoiser gets wrong counts as much as it will be seen.
    Components are mixed by a rotation, so that channels vary alike; that of first
    frames is the one with which a video that stands still has the same latents all
    along, as nearly as it can.

    Args:
      videos: uint8 [t, h, w, c] each, of any sizes; a part of their blocks is sampled.
      config: of the VAE.

    Raises:
      ValueError: there are fewer blocks than linear channels.
    """
    videos, random = list(videos), np.random.default_rng(0)
    k, space, time = (
        config.linear_channels, config.spatial_stride, config.temporal_stride,
    )  # fmt: skip
    firsts_nm, rests_nm = (_sample(videos, t, space, k, random) for t in (1, time))
    mean_first_m, first_mk, _ = components(firsts_nm, k)
    mean_rest_m, rest_mk, std_k = components(rests_nm, k)
    rest_mk = rest_mk @ evened(np.square(std_k), random)
    # A still block is its first frame again and again, so `time` times as strong.
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


def evened(variance_k: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A rotation of uncorrelated numbers to ones that all have their mean variance.

    Random at first, then turned pair by pair until one of each has the mean (Bendel and
    Mickey 1978): [k, k].
    """
    k = len(variance_k)
    turn_kk = np.linalg.qr(random.standard_normal((k, k)))[0]
    for _ in range(k - 1):
        covariance = turn_kk.T @ (variance_k[:, None] * turn_kk)
        over = np.diag(covariance) - variance_k.mean()
        i, j = np.argmax(over), np.argmin(over)
        # tan of the angle at which i has the mean: over_i - 2 c t + over_j t^2 = 0.
        c = covariance[i, j]
        root = math.sqrt(max(0.0, c * c - over[i] * over[j]))
        t = (c + math.copysign(root, c)) / min(over[j], -1e-12)
        cos, sin = 1 / math.hypot(1, t), t / math.hypot(1, t)
        pair = turn_kk[:, [i, j]] @ np.array([[cos, sin], [-sin, cos]])
        turn_kk[:, [i, j]] = pair
    return turn_kk


def _sample(videos, time: int, space: int, least: int, random) -> np.ndarray:
    """Blocks of videos from all phases in time: float32 [n, m] in [-1, 1]."""
    channels = videos[0].shape[-1] if videos else 3
    numbers = channels * time * space**2
    share = max(1, _NUMBERS // numbers // max(1, len(videos)))
    sample = [np.zeros((0, numbers), np.float32)]
    for video in videos:
        phases = max(1, min(time, len(video) - time + 1))
        found_nm = blocks(video[random.integers(phases) :], time, space)
        chosen = random.permutation(len(found_nm))[:share]
        sample.append(found_nm[chosen].astype(np.float32) / 127.5 - 1)
    blocks_nm = np.concatenate(sample)
    if len(blocks_nm) < least:
        raise ValueError(
            f"the linear path begins with {least} principal components, and the clips "
            f"have {len(blocks_nm)} blocks of {time} x {space} x {space}"
        )
    return blocks_nm
