"""Distances between two sets of feature vectors.

The Frechet distance of two Gaussians (Dowson and Landau 1982; FID, arXiv 1706.08500;
FVD, arXiv 1812.01717) is

    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

With S = R^T R the last trace is the nuclear norm of R1 R2^T, so no matrix square root is
needed. The covariance part is the distance of two square roots after the best rotation,
min_U |R1 - U R2|^2 (Bhatia, Jain and Lim 2019). This is a sum of squares, so it is real
and never negative, also with fewer samples than features.

Letters: n samples, d features, r rows of a square root (at most min(n, d)), or
resamples.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sora_jax.evals import statistics

LEAST = 8  # samples per set, for an extrapolation
_SIZES, _DRAWS = 8, 4  # of an extrapolation: sample sizes, and subsets for each


def frechet(features1_nd: np.ndarray, features2_nd: np.ndarray) -> float:
    """Returns the Frechet distance of two sets of features [n, d], exactly.

    The covariances are unbiased (n - 1). The sets may differ in size. The distance of a
    set to itself is exactly zero.

    Raises:
      ValueError: unequal d, fewer than two samples, or values that are not finite.
    """
    (mean1_d, root1_rd), (mean2_d, root2_rd) = map(_root, (features1_nd, features2_nd))
    return _distance(mean1_d, root1_rd, mean2_d, root2_rd)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """The limit of a Frechet distance for infinitely many samples, and its fit.

    Attributes:
      limit: intercept of the line through (1 / n, distance), which has no c / n bias;
        0 where the intercept is negative.
      intercept: the intercept itself. A negative one says that the sets are too small to
        be told apart: the distance is not linear at these sizes, or the sets are equal.
      sizes: the sample sizes of the fit, the same for both sets.
      values: mean distance at each size.
    """

    limit: float
    intercept: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def frechet_extrapolated(
    features1_nd: np.ndarray, features2_nd: np.ndarray
) -> Extrapolation:
    """Extrapolates the Frechet distance to infinitely many samples (arXiv 1911.07023).

    Both sets are subsampled without replacement to the same sizes, between half of the
    smaller set and all of it, and a line in 1 / n is fitted. The bias is linear in
    1 / n only where n exceeds the number of features; with fewer samples some bias
    remains in the limit.

    Raises:
      ValueError: a set holds fewer than `LEAST` samples, or as `frechet`.
    """
    features1_nd = statistics.checked_features(features1_nd, least=LEAST)
    features2_nd = statistics.checked_features(features2_nd, least=LEAST)
    largest = min(len(features1_nd), len(features2_nd))
    # Even steps in 1 / n, so that large sizes do not dominate the fit.
    inverse = np.linspace(2 / largest, 1 / largest, _SIZES)
    sizes = sorted({round(1 / value) for value in inverse})
    rng = np.random.default_rng(0)

    def subset_distance(size: int) -> float:
        subsets = (
            features_nd[rng.permutation(len(features_nd))[:size]]
            for features_nd in (features1_nd, features2_nd)
        )
        return frechet(*subsets)

    values = [np.mean([subset_distance(size) for _ in range(_DRAWS)]) for size in sizes]
    _, intercept = np.polyfit(1 / np.array(sizes), values, 1)
    return Extrapolation(
        max(0.0, float(intercept)),
        float(intercept),
        tuple(sizes),
        tuple(map(float, values)),
    )


def frechet_estimate(
    features1_nd: np.ndarray,
    features2_nd: np.ndarray,
    *,
    num_resamples: int = 100,
    done: Callable[[], None] = lambda: None,
) -> statistics.Estimate:
    """Returns `frechet` with its bootstrap interval, both sets resampled.

    `done` is called after each resample, since a large one takes seconds.
    """
    sets = [*map(np.asarray, (features1_nd, features2_nd))]

    def once(rng: np.random.Generator) -> float:
        value = frechet(
            *(statistics.resample(features_nd, rng) for features_nd in sets)
        )
        done()
        return value

    return statistics.bootstrap(
        once,
        frechet(*sets),
        num_resamples=num_resamples,
    )


def frechet_of_draws(
    features_nd: np.ndarray, reference_nd: np.ndarray, draws_rn: np.ndarray
) -> np.ndarray:
    """Returns the distance of each resample of one set to a fixed set: [r].

    Args:
      features_nd: the set that is resampled.
      reference_nd: the fixed set.
      draws_rn: the rows of the set that each resample holds.
    """
    mean_d, root_rd = _root(reference_nd)
    features_nd = statistics.checked_features(features_nd, least=2)
    total = np.square(root_rd).sum()
    values = []
    for drawn_n in draws_rn:
        own_d = features_nd[drawn_n].mean(axis=0)
        centred_nd = (features_nd[drawn_n] - own_d) / np.sqrt(len(drawn_n) - 1)
        # Singular values alone take a fraction of the time of the rotation in
        # `_distance`, whose sum of squares stays exact near zero.
        nuclear = np.linalg.norm(centred_nd @ root_rd.T, "nuc")
        spread = np.square(centred_nd).sum() + total - 2 * nuclear
        values.append(np.square(own_d - mean_d).sum() + max(spread, 0.0))
    return np.array(values)


def _root(features_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and R with R^T R the unbiased covariance, without forming it."""
    features_nd = statistics.checked_features(features_nd, least=2)
    mean_d = features_nd.mean(axis=0)
    scale = np.sqrt(len(features_nd) - 1)
    return mean_d, np.linalg.qr((features_nd - mean_d) / scale, mode="r")


def _distance(mean1_d, root1_rd, mean2_d, root2_rd) -> float:
    if mean1_d.shape != mean2_d.shape:
        raise ValueError(
            f"the sets have {mean1_d.size} and {mean2_d.size} features: they come "
            "from different networks"
        )
    rows = max(len(root1_rd), len(root2_rd))
    root1_rd, root2_rd = (
        np.pad(root, ((0, rows - len(root)), (0, 0))) for root in (root1_rd, root2_rd)
    )
    left_rr, _, right_rr = np.linalg.svd(root1_rd @ root2_rd.T)
    spread = np.square(root1_rd - left_rr @ right_rr @ root2_rd).sum()
    # Below the rounding of the traces it is zero, as for a set and itself.
    traces = np.square(root1_rd).sum() + np.square(root2_rd).sum()
    if spread <= 4 * rows * np.finfo(np.float64).eps * traces:
        spread = 0.0
    return float(np.square(mean1_d - mean2_d).sum() + spread)
