"""Reconstruction error of a video VAE, and statistics of its latents.

Letters: n clips, t frames, h height, w width, c channels.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.evals.features import networks
from sora_jax.evals.metrics import distances
from sora_jax.models import video_vae
from sora_jax.training import perceptual, trained_vae

# Of structural similarity (Wang et al. 2004): window, and stabilizing constants.
_TAPS, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
# A channel is dead if its deviation is below this share of the median channel's.
_DEAD = 0.05


def psnr(first_nthwc: np.ndarray, second_nthwc: np.ndarray) -> np.ndarray:
    """Returns the PSNR of each clip in dB, for values in [0, 1]: float64 [n].

    It is at most 100 dB, that of equal clips.
    """
    difference = np.asarray(first_nthwc, np.float64) - second_nthwc
    error_n = np.mean(np.square(difference), axis=(1, 2, 3, 4))
    return -10 * np.log10(np.maximum(error_n, 1e-10))


@jax.jit
def ssim(first_nthwc: jax.Array, second_nthwc: jax.Array) -> jax.Array:
    """Returns the SSIM of each clip (Wang et al. 2004), for values in [0, 1]: [n].

    The mean over frames, channels and all positions where a Gaussian window of 11 x 11
    pixels lies inside the frame; in smaller frames the window is smaller.
    """
    taps = min(_TAPS, *(s - 1 + s % 2 for s in first_nthwc.shape[2:4]))
    offset = np.arange(taps) - taps // 2
    weight = np.exp(-(offset**2) / (2 * _SIGMA**2))
    weight = (weight / weight.sum()).astype(np.float32)

    def blur(x):
        for axis in (2, 3):
            size = x.shape[axis] - taps + 1
            x = sum(
                w * jax.lax.slice_in_dim(x, i, i + size, axis=axis)
                for i, w in enumerate(weight)
            )
        return x

    a, b = (x.astype(jnp.float32) for x in (first_nthwc, second_nthwc))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    quotient = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    quotient /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return jnp.mean(quotient, axis=(1, 2, 3, 4))


def flicker(first_nthwc: np.ndarray, second_nthwc: np.ndarray) -> np.ndarray:
    """Returns the mean absolute change over time of the error: [n].

    It is zero for an error that is constant in time, and for clips of one frame.
    """
    error = np.asarray(second_nthwc, np.float64) - first_nthwc
    if error.shape[1] == 1:
        return np.zeros(len(error))
    return np.mean(np.abs(np.diff(error, axis=1)), axis=(1, 2, 3, 4))


class Lpips:
    """Perceptual distance of each clip (arXiv 1801.03924), the mean over its frames.

    Attributes:
      weights: of the network, with the SHA-256 for the protocol.
    """

    def __init__(self, weights: perceptual.Weights):
        self.weights = weights
        networks = perceptual.networks_of(weights.config)

        @jax.jit
        def of_frames(params, first_nthwc, second_nthwc):
            network = networks.bind({perceptual.NAME: params})[perceptual.NAME]
            return network(2 * first_nthwc - 1, 2 * second_nthwc - 1)

        self._of_frames, self._params = of_frames, None

    def __call__(self, first_nthwc: np.ndarray, second_nthwc: np.ndarray) -> np.ndarray:
        """Returns the distance of clips in [0, 1]: float64 [n]; 0 for equal clips.

        Frames are computed in chunks, so that memory does not grow with their number.

        Raises:
          ValueError: the frames are too small for the network.
        """
        if self._params is None:
            self._params = self.weights.load()
        n, t, h, w, _ = first_nthwc.shape
        size = max(1, min(n * t, trained_vae.VOXELS_AT_ONCE // (h * w)))
        pairs = [
            np.reshape(x, (n * t, 1, h, w, 3)) for x in (first_nthwc, second_nthwc)
        ]
        found = []
        for start in range(0, n * t, size):
            chunk = [np.float32(x[start : start + size]) for x in pairs]
            fill = size - len(chunk[0])
            chunk = [np.concatenate([x, np.repeat(x[-1:], fill, 0)]) for x in chunk]
            found.append(
                np.asarray(self._of_frames(self._params, *chunk))[: size - fill]
            )
        return np.concatenate(found).astype(np.float64).reshape(n, t).mean(1)


def describe_latents(latents_nthwc: np.ndarray) -> dict[str, float]:
    """Returns scale, tails and dead channels of latent means, as a denoiser gets them.

    Returns:
      std_least, std_most: of the channels. kurtosis: mean excess kurtosis of the
      channels. dead_channels: number of channels that hardly vary.
    """
    flat_mc = np.asarray(latents_nthwc, np.float64).reshape(-1, latents_nthwc.shape[-1])
    std_c = flat_mc.std(0)
    normal_mc = (flat_mc - flat_mc.mean(0)) / np.maximum(std_c, 1e-12)
    return {
        "std_least": float(std_c.min()),
        "std_most": float(std_c.max()),
        "kurtosis": float(np.mean(normal_mc**4) - 3),
        "dead_channels": float(np.sum(std_c < _DEAD * np.median(std_c))),
    }


def round_trip(config: video_vae.Config, batch_size: int):
    """Returns (params, uint8 clips [n, t, h, w, c]) -> (reconstructions, latent means).

    Reconstructions are float32 in [0, 1]. Fewer clips than `batch_size` are padded, so
    that one program is compiled per clip size; clips of more than `trained_vae.VOXELS_AT_ONCE` are passed one by one, in chunks.
    """
    networks = trained_vae.networks_of(config)

    @jax.jit
    def one_batch(params, video_bthwc):
        vae = networks.bind({"vae": params})["vae"]
        mean_bthwc, _ = vae.encode(video_bthwc.astype(jnp.float32) / 127.5 - 1)
        decoded = vae.decode(mean_bthwc).astype(jnp.float32)
        return jnp.clip(decoded / 2 + 0.5, 0, 1), mean_bthwc

    def in_chunks(params, video_thwc):
        vae = networks.bind({"vae": params})["vae"]
        frames = np.array_split(video_thwc[None], len(video_thwc), axis=1)
        parts = vae.encode_stream(np.float32(frame) / 127.5 - 1 for frame in frames)
        means = [np.asarray(mean) for mean, _ in parts]
        decoded = np.concatenate([*map(np.asarray, vae.decode_stream(means))], axis=1)
        return np.clip(decoded / 2 + 0.5, 0, 1), np.concatenate(means, axis=1)

    def all_batches(params, video_nthwc):
        if video_nthwc[0, ..., 0].size > trained_vae.VOXELS_AT_ONCE:
            pairs = [in_chunks(params, video_thwc) for video_thwc in video_nthwc]
            return tuple(map(np.concatenate, zip(*pairs, strict=True)))
        frames, means = [], []
        for start in range(0, len(video_nthwc), batch_size):
            chunk = video_nthwc[start : start + batch_size]
            fill = np.repeat(chunk[-1:], batch_size - len(chunk), axis=0)
            decoded, mean = one_batch(params, np.concatenate([chunk, fill]))
            frames.append(np.asarray(decoded)[: len(chunk)])
            means.append(np.asarray(mean)[: len(chunk)])
        return np.concatenate(frames), np.concatenate(means)

    return all_batches


class Reconstruction:
    """Measures a video VAE on held-out clips; the evaluator of its training.

    Args:
      config: of the VAE.
      video_nthwc: the clips, uint8.
      network: features for the Frechet distance between clips and reconstructions
        (rFVD-toy); None leaves it out.
      lpips: the perceptual distance; None leaves it out.
      batch_size: clips at a time.

    Raises:
      ValueError: the frames are too small for LPIPS.
    """

    def __init__(
        self,
        config: video_vae.Config,
        video_nthwc: np.ndarray,
        network: networks.ToyFeatures | None = None,
        lpips: Lpips | None = None,
        batch_size: int = 16,
    ):
        if lpips is not None:
            lpips.weights.config.check(*video_nthwc.shape[2:4])
        self.video_nthwc, self.network, self.lpips = video_nthwc, network, lpips
        self.batch_size = batch_size
        self._round_trip = round_trip(config, batch_size)

    def reconstruct(self, params: dict) -> tuple[np.ndarray, np.ndarray]:
        """Returns reconstructions in [0, 1], and latent means."""
        return self._round_trip(params, self.video_nthwc)

    def run(self, params: dict, step: int = 0) -> Iterator[tuple[str, float]]:
        """Yields psnr, ssim, flicker, lpips and rfvd_toy if set, and latent statistics."""
        frames, means = self.reconstruct(params["vae"])
        truth = self.video_nthwc.astype(np.float32) / 255
        yield "psnr", float(np.mean(psnr(truth, frames)))
        yield "ssim", float(np.mean(self._by_batch(ssim, truth, frames)))
        yield "flicker", float(np.mean(flicker(truth, frames)))
        if self.lpips is not None:
            yield "lpips", float(np.mean(self.lpips(truth, frames)))
        if self.network is not None and len(truth) >= distances.LEAST:
            reconstructed = np.round(frames * 255).astype(np.uint8)
            yield (
                "rfvd_toy",
                distances.frechet(
                    self.network(reconstructed), self.network(self.video_nthwc)
                ),
            )
        for name, value in describe_latents(means).items():
            yield f"latent_{name}", value

    def _by_batch(self, measure, *arrays: Sequence[np.ndarray]) -> np.ndarray:
        starts = range(0, len(arrays[0]), self.batch_size)
        parts = [[a[i : i + self.batch_size] for a in arrays] for i in starts]
        return np.concatenate([np.asarray(measure(*part)) for part in parts])
