"""Kernel distance, precision and recall, and inception score, beside the Frechet distance.

The kernel distance (MMD^2; KID, arXiv 1801.01401; KVD on features of videos) of sets X and
Y under a kernel k is mean k(x, x') + mean k(y, y') - 2 mean k(x, y). With the pairs of a
sample and itself it is biased upwards by about c / n; without them it is unbiased and may
be negative. Published code uses either, so both are computed under separate names.

Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) test whether
samples lie in balls around those of the other set, with the distance to the k-th
neighbour as radius.

Letters: n, m samples, d features, k classes, r subsets.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.special

from sora_jax.evals import statistics

NEIGHBOURS = 5  # k of the radii, as in the public code of density and coverage
SUBSETS, LARGEST_SUBSET = 100, 1000
_ROWS = 1024  # rows of a matrix of pairs in memory at a time


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The polynomial kernel (x . y / d + offset)^degree."""

    degree: int
    offset: float


KID = Kernel(3, 1.0)
JEDI = Kernel(2, 0.0)  # arXiv 2410.05203, whose score is 100 times the biased form


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """A kernel distance in both forms."""

    biased: statistics.Estimate
    unbiased: statistics.Estimate


def kernel_distance(
    features1_nd: np.ndarray, features2_md: np.ndarray, kernel: Kernel = KID
) -> KernelDistance:
    """Returns the kernel distance of two sets of features, without intervals.

    Args:
      features1_nd, features2_md: the sets, which may differ in size.
      kernel: the kernel.

    Raises:
      ValueError: unequal d, fewer than two samples, or values that are not finite.
    """
    set1_nd, set2_md = _checked(features1_nd, features2_md, least=2)
    n, m = len(set1_nd), len(set2_md)
    sum1, diagonal1 = _sums(set1_nd, set1_nd, kernel), _diagonal(set1_nd, kernel)
    sum2, diagonal2 = _sums(set2_md, set2_md, kernel), _diagonal(set2_md, kernel)
    between = 2 * _sums(set1_nd, set2_md, kernel) / (n * m)
    apart1 = (sum1 - diagonal1) / (n * (n - 1))
    apart2 = (sum2 - diagonal2) / (m * (m - 1))
    return KernelDistance(
        biased=statistics.Estimate(float(sum1 / n**2 + sum2 / m**2 - between)),
        unbiased=statistics.Estimate(float(apart1 + apart2 - between)),
    )


def kernel_distance_with_intervals(
    features1_nd: np.ndarray,
    features2_md: np.ndarray,
    kernel: Kernel = KID,
) -> KernelDistance:
    """Returns the kernel distance with 95 % intervals from `SUBSETS` pairs of subsets.

    Subsets are drawn without replacement, the same share s of each set: half, or less if
    `LARGEST_SUBSET` requires it. Their distances vary around that of all samples with
    (1 - s) / s times its variance (Politis, Romano and Wolf 1999), so their deviations
    from the mean are scaled by sqrt(s / (1 - s)). For equal distributions the interval
    is too wide rather than too narrow.

    Args:
      features1_nd, features2_md: the sets.
      kernel: the kernel.

    Raises:
      ValueError: fewer than four samples, or as `kernel_distance`.
    """
    set1_nd, set2_md = _checked(features1_nd, features2_md, least=4)
    share = min(0.5, LARGEST_SUBSET / max(len(set1_nd), len(set2_md)))
    rng = np.random.default_rng(0)

    def subset(set_nd: np.ndarray) -> np.ndarray:
        size = max(2, round(share * len(set_nd)))
        return set_nd[np.sort(rng.permutation(len(set_nd))[:size])]

    found = [
        kernel_distance(subset(set1_nd), subset(set2_md), kernel)
        for _ in range(SUBSETS)
    ]
    point = kernel_distance(set1_nd, set2_md, kernel)
    scale = np.sqrt(share / (1 - share))

    def estimate(form: str) -> statistics.Estimate:
        values_r = np.array([getattr(distance, form).value for distance in found])
        value = getattr(point, form).value
        return statistics.from_resamples(scale * values_r, value)

    return KernelDistance(estimate("biased"), estimate("unbiased"))


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Overlap of two sets by nearest neighbours.

    The intervals are over the samples that are counted; the other set is fixed.

    Attributes:
      precision: share of samples in at least one ball around the reference.
      recall: share of the reference in at least one ball around the samples.
      density: mean number of balls of the reference that hold a sample, divided by k.
      coverage: share of the reference's balls that hold at least one sample.
    """

    precision: statistics.Estimate
    recall: statistics.Estimate
    density: statistics.Estimate
    coverage: statistics.Estimate


def neighbours(
    samples_nd: np.ndarray, reference_md: np.ndarray, k: int = NEIGHBOURS
) -> Neighbours:
    """Returns precision, recall, density and coverage of samples.

    Balls are closed, so that copies of a sample are in its ball of radius 0.

    Args:
      samples_nd: features of the generated clips.
      reference_md: features of the reference.
      k: the neighbour within its own set that gives a ball its radius.

    Raises:
      ValueError: k samples or fewer, unequal d, or values that are not finite.
    """
    samples_nd, reference_md = _checked(samples_nd, reference_md, least=k + 1)
    # Centred, since rounding of the squares grows with the distance from the origin.
    centre_d = reference_md.mean(axis=0)
    samples_nd, reference_md = samples_nd - centre_d, reference_md - centre_d
    radius_n, radius_m = _radii(samples_nd, k), _radii(reference_md, k)
    balls_n = np.zeros(len(samples_nd), int)  # of the reference that hold the sample
    covered_m = np.zeros(len(reference_md), bool)
    recalled_m = np.zeros(len(reference_md), bool)
    for rows, squares_rm in _squares(samples_nd, reference_md):
        inside_rm = squares_rm <= radius_m
        balls_n[rows] = inside_rm.sum(axis=1)
        covered_m |= inside_rm.any(axis=0)
        recalled_m |= (squares_rm <= radius_n[rows, None]).any(axis=0)
    return Neighbours(
        _share(balls_n > 0),
        _share(recalled_m),
        statistics.bootstrap_mean(balls_n / k),
        _share(covered_m),
    )


def inception_score(logits_nk: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Returns exp mean KL(p(y|x) || p(y)) and its standard deviation over splits.

    The score of arXiv 1606.03498: p(y) is the mean of p(y|x) over a split, splits are
    consecutive samples, and the score is the mean over splits. It needs no reference and
    measures only how confident and how diverse the classes are; its range is 1 to k.

    Args:
      logits_nk: of a classifier, before its softmax.
      splits: number of splits.

    Raises:
      ValueError: fewer than two samples per split, or values that are not finite.
    """
    logits_nk = statistics.checked_features(logits_nk, least=2 * splits)
    log_nk = scipy.special.log_softmax(logits_nk, axis=1)
    scores = []
    for part_nk in np.array_split(log_nk, splits):
        mean_k = np.log(np.maximum(np.exp(part_nk).mean(axis=0), np.finfo(float).tiny))
        divergence_n = (np.exp(part_nk) * (part_nk - mean_k)).sum(axis=1)
        scores.append(np.exp(divergence_n.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _checked(first_nd, second_md, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    first_nd = statistics.checked_features(first_nd, least=least)
    second_md = statistics.checked_features(second_md, least=least)
    if first_nd.shape[1] != second_md.shape[1]:
        raise ValueError(
            f"the sets have {first_nd.shape[1]} and {second_md.shape[1]} features: they "
            "come from different networks"
        )
    return first_nd, second_md


def _sums(first_nd, second_md, kernel: Kernel) -> float:
    """The sum of the kernel over all pairs."""
    d = first_nd.shape[1]
    return sum(
        float(
            ((first_nd[rows] @ second_md.T / d + kernel.offset) ** kernel.degree).sum()
        )
        for rows in _slices(len(first_nd))
    )


def _diagonal(set_nd: np.ndarray, kernel: Kernel) -> float:
    squares_n = np.einsum("nd,nd->n", set_nd, set_nd) / set_nd.shape[1]
    return float(((squares_n + kernel.offset) ** kernel.degree).sum())


def _slices(count: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def _squares(first_nd, second_md) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances [r, m], some rows at a time; 0 where below rounding."""
    length_m = np.einsum("md,md->m", second_md, second_md)
    for rows in _slices(len(first_nd)):
        part_rd = first_nd[rows]
        sums_rm = np.einsum("rd,rd->r", part_rd, part_rd)[:, None] + length_m
        squares_rm = sums_rm - 2 * part_rd @ second_md.T
        rounding_rm = 4 * first_nd.shape[1] * np.finfo(np.float64).eps * sums_rm
        yield rows, np.where(squares_rm <= rounding_rm, 0.0, squares_rm)


def _radii(set_nd: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each sample to the k-th other one."""
    radii_n = np.empty(len(set_nd))
    for rows, squares_rn in _squares(set_nd, set_nd):
        own = np.arange(len(set_nd))[rows]
        squares_rn[np.arange(len(own)), own] = np.inf
        radii_n[rows] = np.partition(squares_rn, k - 1, axis=1)[:, k - 1]
    return radii_n


def _share(inside_n: np.ndarray) -> statistics.Estimate:
    return statistics.proportion(int(inside_n.sum()), len(inside_n))
