"""The Frechet distance against scipy, closed forms and known Gaussians."""

import numpy as np
import pytest
import scipy.linalg

from sora_jax.evals.metrics import distances


def reference(features1_nd, features2_nd):
    """The textbook formula with a matrix square root."""
    cov1, cov2 = (np.cov(f.T) for f in (features1_nd, features2_nd))
    gap = features1_nd.mean(0) - features2_nd.mean(0)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root)


def features(count, d, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d))
    return scale * rng.normal(size=(count, d)) @ mixing + rng.normal(size=d)


@pytest.mark.parametrize("count1,count2", [(200, 200), (300, 120)])
def test_frechet_agrees_with_sqrtm(count1, count2):
    first, second = features(count1, 40, 1), features(count2, 40, 2, scale=1.3)
    expected = reference(first, second)
    assert distances.frechet(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 30, 64, 500])
def test_frechet_of_a_set_and_itself_is_zero(count):
    set_nd = features(count, 64, 3)
    assert distances.frechet(set_nd, set_nd) == 0.0
    ill = set_nd * np.logspace(0, -8, 64)
    assert distances.frechet(ill, ill) == 0.0


def test_frechet_with_fewer_samples_than_features():
    first, second = features(20, 100, 4), features(33, 100, 5)
    value = distances.frechet(first, second)
    # The rank-deficient covariances still have a well-defined distance.
    cov1, cov2 = (np.cov(f.T) for f in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root1 = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root1 @ cov2 @ root1).clip(0)
    gap = first.mean(0) - second.mean(0)
    expected = gap @ gap + np.trace(cov1 + cov2) - 2 * np.sqrt(inner).sum()
    assert value == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(value) and value > 0


def test_frechet_properties():
    first, second = features(50, 12, 6), features(80, 12, 7)
    value = distances.frechet(first, second)
    assert distances.frechet(second, first) == pytest.approx(value, rel=1e-12)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
    turned = distances.frechet(first @ turn, second @ turn)
    assert turned == pytest.approx(value, rel=1e-10)
    shift = np.arange(12.0)
    moved = distances.frechet(first, first + shift)
    assert moved == pytest.approx(shift @ shift, rel=1e-10)


def test_frechet_is_never_negative_where_sqrtm_is():
    """Nearly equal sets of tiny spread: the difference of traces would cancel."""
    first = features(300, 32, 8) * np.logspace(0, -7, 32)
    second = first * (1 + 1e-9)
    value = distances.frechet(first, second)
    assert 0 <= value < 1e-6 * np.square(first).mean()


def test_extrapolation_on_known_gaussians():
    """True distance of N(0, I) and N(c, 4 I) in d dimensions: |c|^2 + d."""
    d, count = 24, 1200
    rng = np.random.default_rng(0)
    first = rng.normal(size=(count, d))
    second = 2 * rng.normal(size=(count, d)) + 0.5
    truth = d * 0.25 + d
    result = distances.frechet_extrapolated(first, second)
    assert result.limit == pytest.approx(truth, rel=0.1)
    # Equal distributions: the bias at n is most of the value, the limit has lost it.
    third = rng.normal(size=(count, d))
    same = distances.frechet_extrapolated(first, third)
    assert abs(same.intercept) < 0.35 * distances.frechet(first, third)
    assert same.limit == max(0, same.intercept)
    # A set and itself: what falls with n is below zero at the limit, which 0 bounds.
    itself = distances.frechet_extrapolated(first[:32], first[:32])
    assert itself.intercept < 0 == itself.limit
    assert result.sizes[0] == count // 2 and result.sizes[-1] == count


def test_interval_holds_the_point():
    first, second = features(60, 8, 10), features(60, 8, 11)
    found = distances.frechet_estimate(first, second, num_resamples=40)
    assert found.value == distances.frechet(first, second)
    assert 0 < found.low < found.value < found.high


def test_resamples_have_the_distance_of_what_was_drawn():
    one, other = features(40, 12, 0), features(30, 12, 1, 1.5)
    draws_rn = np.random.default_rng(2).integers(0, 40, (5, 40))
    found = distances.frechet_of_draws(one, other, draws_rn)
    expected = [distances.frechet(one[drawn], other) for drawn in draws_rn]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_errors_name_the_fault():
    good = features(10, 4, 0)
    with pytest.raises(ValueError, match="4 and 5 features"):
        distances.frechet(good, features(10, 5, 0))
    broken = good.copy()
    broken[3, 2] = np.inf
    with pytest.raises(ValueError, match="1 of 10 feature vectors"):
        distances.frechet(good, broken)
    with pytest.raises(ValueError, match="2 samples or more"):
        distances.frechet(good, good[:1])
