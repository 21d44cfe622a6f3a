"""Moments of features, and estimates with their 95 % intervals.

Letters: n samples, d features, r resamples.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
      value: the point estimate.
      low, high: ends of the interval; None where there is none.
      count: samples behind the value, where that is reported.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Returns the estimate of an increasing function of the value."""
        ends = (end if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), *ends, self.count)

    def to_json(self) -> dict[str, float | None]:
        """Returns value, low and high as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter sum (x - mean)(x - mean)^T of feature vectors, in float64."""

    count: int
    mean_d: np.ndarray
    scatter_dd: np.ndarray

    @classmethod
    def of(cls, features_nd: np.ndarray) -> "Moments":
        """Computes the moments of features [n, d].

        Raises:
          ValueError: the array is not [n, d] or holds a value that is not finite.
        """
        features_nd = checked_features(features_nd, least=1)
        mean_d = features_nd.mean(axis=0)
        centred_nd = features_nd - mean_d
        return cls(len(features_nd), mean_d, centred_nd.T @ centred_nd)


def checked_features(features_nd: np.ndarray, *, least: int) -> np.ndarray:
    """Returns the features as float64 after checking their shape, number and values.

    Args:
      features_nd: features [n, d] of any real type.
      least: the fewest samples that the caller can use.

    Raises:
      ValueError: not [n, d], fewer than `least` samples, or values that are not finite.
    """
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim != 2:
        raise ValueError(f"features must be [n, d], got shape {features_nd.shape}")
    if len(features_nd) < least:
        raise ValueError(f"{least} samples or more are needed, got {len(features_nd)}")
    broken = int((~np.isfinite(features_nd)).any(axis=1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(features_nd)} feature vectors hold NaN or infinity: "
            "the videos or the network's weights are broken"
        )
    return features_nd


def proportion(successes: int, count: int) -> Estimate:
    """Returns a proportion with Wilson's score interval (Wilson 1927).

    Unlike the normal approximation, the interval stays inside [0, 1] and keeps its width
    at 0 and 1, where many of our scores are.

    Raises:
      ValueError: there are no samples, or more successes than samples.
    """
    from scipy import stats  # here, since importing it takes a second

    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"not a proportion: {successes} of {count}")
    ends = stats.binomtest(successes, count).proportion_ci(_CONFIDENCE, "wilson")
    return Estimate(successes / count, float(ends.low), float(ends.high), count)


def newcombe(first: tuple[int, int], second: tuple[int, int]) -> Estimate:
    """Returns a difference of two proportions p - q with Newcombe's interval (1998).

    With Wilson's intervals (l, u) of each (his method 10):

        p - q - sqrt((p - l_p)^2 + (u_q - q)^2), p - q + sqrt((u_p - p)^2 + (q - l_q)^2)

    SciPy has no such interval. A bootstrap would have no width where both are 0 or 1.

    Args:
      first, second: successes and count.

    Raises:
      ValueError: as `proportion`.
    """
    p, q = proportion(*first), proportion(*second)
    gap = p.value - q.value
    below = math.hypot(p.value - p.low, q.high - q.value)
    above = math.hypot(p.high - p.value, q.value - q.low)
    return Estimate(gap, gap - below, gap + above, min(p.count, q.count))


def bootstrap(
    statistic: Callable[[np.random.Generator], float],
    value: float,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """Returns a value with its bootstrap interval (Efron 1979).

    `scipy.stats.bootstrap` cannot shift its percentiles (see `from_resamples`), and it
    resamples arrays only: here a statistic draws its own resample, of one set or of two.

    Args:
      statistic: maps a generator to the statistic of one resample.
      value: the statistic of the samples themselves.
      num_resamples: how many resamples are drawn.
      seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    values_r = np.array([statistic(rng) for _ in range(num_resamples)])
    return from_resamples(values_r, value)


def from_resamples(values_r: np.ndarray, value: float) -> Estimate:
    """Returns a value with the interval of the statistic's values on resamples.

    The percentiles are shifted so that the resamples' mean is the value itself. A
    resample repeats samples, which raises a Frechet distance by about as much again as
    its bias at that sample size; plain percentiles would then lie above the value.
    """
    values_r = np.asarray(values_r, np.float64)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values_r + (value - values_r.mean()), [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def resample(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws as many rows as there are, with replacement."""
    return array[rng.integers(0, len(array), len(array))]


def bootstrap_mean(values_n: np.ndarray) -> Estimate:
    """Returns the mean of samples with its bootstrap interval.

    Raises:
      ValueError: not [n], or no samples.
    """
    values_n = np.asarray(values_n, np.float64)
    if values_n.ndim != 1 or not len(values_n):
        raise ValueError(f"a mean needs samples [n], got shape {values_n.shape}")
    mean = float(values_n.mean())
    return bootstrap(
        lambda rng: resample(values_n, rng).mean(), mean, num_resamples=1000
    )
