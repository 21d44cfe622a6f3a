"""Moments that can be merged, and intervals around a score.

Letters: n samples, d features, r resamples.
"""

import dataclasses
import math
import statistics as normal_statistics
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of a set of feature vectors, in float64.

    The second moment is kept centred, sum (x - mean)(x - mean)^T, and merged by the
    formula of Chan, Golub and LeVeque (1979); a raw sum of x x^T would lose the
    covariance of features whose mean is large.
    """

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

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of the union of the two sets."""
        if self.mean_d.shape != other.mean_d.shape:
            raise ValueError(
                f"moments of {self.mean_d.size} features cannot be merged with "
                f"moments of {other.mean_d.size}"
            )
        count = self.count + other.count
        gap_d = other.mean_d - self.mean_d
        return Moments(
            count,
            self.mean_d + gap_d * (other.count / count),
            self.scatter_dd
            + other.scatter_dd
            + np.outer(gap_d, gap_d) * (self.count * other.count / count),
        )

    def covariance(self) -> np.ndarray:
        """Returns the unbiased covariance [d, d] (divided by n - 1).

        Raises:
          ValueError: there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
        return self.scatter_dd / (self.count - 1)


def checked_features(features_nd: np.ndarray, *, least: int) -> np.ndarray:
    """Returns the features as float64 after checking what would spoil a statistic.

    Args:
      features_nd: features [n, d] of any real type.
      least: the fewest samples that the caller can use.

    Raises:
      ValueError: a wrong number of axes, too few samples, or values not finite.
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
            "the videos or the weights that made them are broken"
        )
    return features_nd


def wilson(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion (Wilson 1927).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a
    point at 0 or 1, where our scores live.

    Raises:
      ValueError: there are no samples, or more successes than samples.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"not a proportion: {successes} of {count}")
    z = normal_statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    scale = 1 + z * z / count
    # At 0 and at `count` one end is exactly 0 or 1; rounding would miss it.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == count else (centre + spread) / scale
    return low, high


def newcombe(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Returns Newcombe's interval of a difference of two proportions p - q (1998).

    With Wilson's intervals (l, u) of each (his method 10):

        p - q - sqrt((p - l_p)^2 + (u_q - q)^2), p - q + sqrt((u_p - p)^2 + (q - l_q)^2)

    A bootstrap would have no width where both are 0 or 1.

    Args:
      first, second: successes and count.
      confidence: of the interval.

    Raises:
      ValueError: as `wilson`.
    """
    (low_p, high_p), (low_q, high_q) = (
        wilson(*one, confidence) for one in (first, second)
    )
    p, q = (successes / count for successes, count in (first, second))
    below, above = math.hypot(p - low_p, high_q - q), math.hypot(high_p - p, q - low_q)
    return p - q - below, p - q + above


def bootstrap(
    statistic: Callable[[np.random.Generator], float],
    point: float,
    *,
    num_resamples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Returns a bootstrap interval around a point estimate (Efron 1979).

    `statistic` draws its own resample, so that statistics of one set or of two share
    this function; `resample` draws indices, and `interval_of` takes the percentiles.

    Args:
      statistic: maps a generator to the statistic of one resample.
      point: the statistic of the samples themselves.
      num_resamples: how many resamples are drawn.
      seed: seed of the resamples.
      confidence: the share of resamples inside the interval.
    """
    rng = np.random.default_rng(seed)
    values_r = np.array([statistic(rng) for _ in range(num_resamples)])
    return interval_of(values_r, point, confidence=confidence)


def interval_of(
    values_r: np.ndarray, point: float, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the interval of a statistic's values on resamples.

    The percentiles are shifted so that the resamples' mean is the point estimate: a
    resample repeats samples, which moves a Frechet distance up by about as much again
    as its bias at that sample size, and plain percentiles would then lie above the
    estimate.
    """
    values_r = np.asarray(values_r, np.float64)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_r + (point - values_r.mean()), [tail, 1 - tail])
    return float(low), float(high)


def resample(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws as many rows as there are, with replacement."""
    return array[rng.integers(0, len(array), len(array))]


def mean_interval(
    values_n: np.ndarray, *, seed: int = 0, num_resamples: int = 1000
) -> tuple[float, float, float]:
    """Returns (mean, low, high) with a 95 % bootstrap interval."""
    values_n = np.asarray(values_n, np.float64)
    if values_n.ndim != 1 or not len(values_n):
        raise ValueError(f"a mean needs samples [n], got shape {values_n.shape}")
    point = float(values_n.mean())
    low, high = bootstrap(
        lambda rng: resample(values_n, rng).mean(),
        point,
        num_resamples=num_resamples,
        seed=seed,
    )
    return point, low, high
