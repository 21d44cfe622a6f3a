"""Noise levels: their distribution in training, schedules of samplers, logging bands.

tau in [0, 1] is the noise level (1 is pure noise); u in [0, 1] is a level before the
shift. The shift s moves levels towards noise (Esser et al. 2024, arXiv:2403.03206,
section 5.3.2), with the same s in training and in sampling:

    tau = s u / (1 + (s - 1) u)
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs

# Finer at the levels where the noisy input stops showing what only the caption says.
BAND_EDGES = (0.0, 0.25, 0.5, 0.7, 0.85, 0.93, 0.97, 1.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """The distribution of training noise levels.

    A share `logit_normal` of the samples is shift(sigmoid(mean + std z)), z normal;
    the rest is uniform in tau (not shifted), so that every level is trained. Both are
    truncated to `levels`, so that one of two experts sees only its own levels.
    """

    logit_normal: configs.Share = 0.9
    mean: Annotated[float, configs.Range("[-20, 20]")] = 0.0
    std: Annotated[float, configs.Range("(0, 20]")] = 1.0
    shift: Annotated[float, configs.Range("(0, 100]")] = 1.0  # 1: no shift
    levels: tuple[configs.Share, configs.Share] = (0.0, 1.0)
    band_edges: tuple[configs.Share, ...] = BAND_EDGES

    def __post_init__(self):
        if not 0 <= self.logit_normal <= 1:
            raise ValueError(
                f"logit_normal is a share of samples: {self.logit_normal} is not in [0, 1]"
            )
        if self.std <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive (1: no shift), not {self.shift}")
        low, high = self.levels
        if not 0 <= low < high <= 1:
            raise ValueError(f"levels must be low < high in [0, 1], not {self.levels}")
        edges = tuple(self.band_edges)
        object.__setattr__(self, "band_edges", edges)
        if edges[0] != 0 or edges[-1] != 1 or list(edges) != sorted(set(edges)):
            raise ValueError(f"band_edges must rise from 0 to 1, not {edges}")


def shift(u, s: float):
    """s u / (1 + (s - 1) u): maps [0, 1] onto itself, towards 1 where s > 1.

    Its inverse is the shift by 1 / s.
    """
    return s * u / (1 + (s - 1) * u)


def sample_tau(key: jax.Array, n: int, config: Config) -> jax.Array:
    """Draws n training noise levels, float32 [n]: one from each of n quantile bins.

    Stratified, so that every batch covers all levels in proportion (lower variance of
    the gradient). Bins are assigned to rows at random, so that a row's level does not
    depend on its position or host.
    """
    order_key, place_key = jax.random.split(key)
    bins = jax.random.permutation(order_key, n)
    quantile = (bins + jax.random.uniform(place_key, (n,))) / n
    quantile = jnp.minimum(quantile, 1 - 2**-24)
    share = config.logit_normal
    low, high = config.levels
    below, above = (
        band_share((0.0, tau), config.shift, config.mean, config.std)
        for tau in config.levels
    )
    inner = below + (above - below) * quantile / max(share, 1e-6)
    inner = jnp.clip(inner, 1e-6, 1 - 1e-6)
    normal = jax.scipy.special.ndtri(inner)
    bell = shift(jax.nn.sigmoid(config.mean + config.std * normal), config.shift)
    flat = jnp.clip((quantile - share) / max(1 - share, 1e-6), 0, 1)
    tau = jnp.where(quantile < share, bell, low + (high - low) * flat)
    return jnp.clip(tau, low, high).astype(jnp.float32)


def schedule(num_steps: int, s: float = 1.0, first: float = 1.0) -> np.ndarray:
    """Returns a sampler's levels: num_steps + 1 values, float32, from `first` to 0.

    Equal steps in u, shifted by s. From 1 on they are those of diffusers'
    FlowMatchEulerDiscreteScheduler for sigmas = linspace(1, 1 / num_steps, num_steps).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if not 0 < first <= 1:
        raise ValueError(f"a schedule starts at a level in (0, 1], not at {first}")
    levels = np.linspace(shift(first, 1 / s), 0.0, num_steps + 1)
    return shift(levels, s).astype(np.float32)


def diffusers_schedule(
    sampler: str, num_steps: int, s: float, num_train_timesteps: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the levels of diffusers' schedulers, for imported weights.

    "unipc" is UniPCMultistepScheduler with flow sigmas: the first level is 1e-6 below 1,
    where log(1 - tau) is finite, and the network gets timesteps rounded down to integers.
    Any other is FlowMatchEulerDiscreteScheduler, which shifts its smallest level twice.

    Returns:
      taus: num_steps + 1 levels, float32; levels: the num_steps inputs of the network.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    least = 1 / num_train_timesteps
    if sampler == "unipc":
        taus = shift(np.linspace(1.0, least, num_steps + 1)[:-1], s)
        taus[0] -= 1e-6
        levels = np.floor(taus * num_train_timesteps) / num_train_timesteps
    else:
        taus = shift(np.linspace(1.0, shift(least, s), num_steps), s)
        levels = taus
    return np.append(taus, 0.0).astype(np.float32), levels.astype(np.float32)


def band_index(tau: jax.Array, edges: Sequence[float] = BAND_EDGES) -> jax.Array:
    """Returns the logging band of each level, int32: edges[i] <= tau < edges[i + 1].

    tau = 1 belongs to the last band.
    """
    # Not searchsorted, which does not take a sharded array.
    inner = jnp.asarray(edges[1:-1], jnp.float32).reshape((1,) * tau.ndim + (-1,))
    return jnp.sum(tau[..., None] >= inner, axis=-1, dtype=jnp.int32)


def band_names(edges: Sequence[float] = BAND_EDGES) -> list[str]:
    """Returns the names of the bands in metrics, such as "0.85-0.93"."""
    pairs = zip(edges[:-1], edges[1:], strict=True)
    return [f"{low:g}-{high:g}" for low, high in pairs]


def band_share(
    band: tuple[float, float], s: float, mean: float = 0.0, std: float = 1.0
) -> float:
    """Returns the share of shifted logit-normal samples that fall in a band of tau.

    The shift multiplies the odds tau / (1 - tau) by s, so it moves the normal by log s:
    share = Phi((logit(high) - log s - mean) / std) - Phi((logit(low) - ...) / std).
    """

    def below(tau: float) -> float:
        if tau <= 0 or tau >= 1:
            return float(tau >= 1)
        z = (math.log(tau / (1 - tau)) - math.log(s) - mean) / std
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    low, high = band
    return below(high) - below(low)


def training_share(band: tuple[float, float], config: Config) -> float:
    """Returns the share of the training levels that fall in a band of tau."""

    def bell(low: float, high: float) -> float:
        return band_share((low, high), config.shift, config.mean, config.std)

    low, high = (min(max(edge, config.levels[0]), config.levels[1]) for edge in band)
    share, whole = config.logit_normal, config.levels[1] - config.levels[0]
    return share * bell(low, high) / bell(*config.levels) + (1 - share) * (
        (high - low) / whole
    )


def propose_shift(
    bands: Sequence[tuple[float, float]],
    mean: float = 0.0,
    std: float = 1.0,
    max_shift: float = 12.0,
) -> float:
    """Returns a shift that gives enough samples to the decision bands.

    A decision band has the levels at which the caption decides some property. Of several
    bands the one with the smallest share counts. The result is the smallest shift (in
    steps of a half, from 1) that reaches nine tenths of the best share: a larger one would
    take more samples from the levels below, where detail is learned.
    """
    if not bands or any(not 0 <= low < high <= 1 for low, high in bands):
        raise ValueError(
            f"bands must be pairs low < high in [0, 1], at least one, not {bands}"
        )
    shifts = np.arange(2, 2 * max_shift + 1) / 2
    shares = [min(band_share(band, s, mean, std) for band in bands) for s in shifts]
    enough = np.asarray(shares) >= 0.9 * max(shares)
    return float(shifts[np.argmax(enough)])
