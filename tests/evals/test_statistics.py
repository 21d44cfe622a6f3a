"""Moments against NumPy, intervals against their definitions."""

import collections
import math

import numpy as np
import pytest

from sora_jax.evals import statistics


def test_moments_are_centred():
    # A mean of 1e6 beside a spread of 1: raw second moments would lose seven digits.
    features = np.random.default_rng(0).normal(size=(40, 5)) + 1e6
    moments = statistics.Moments.of(features)
    assert moments.count == 40
    np.testing.assert_allclose(moments.mean_d, features.mean(0), rtol=1e-14)
    expected = np.cov((features - features.mean(0)).T)
    np.testing.assert_allclose(moments.scatter_dd / 39, expected, rtol=0, atol=1e-9)


def test_moments_refuse_what_is_not_finite():
    with pytest.raises(ValueError, match="1 of 3 feature vectors hold NaN"):
        statistics.Moments.of(np.array([[0.0], [math.nan], [1.0]]))


def test_wilson_against_the_defining_equation():
    """The ends solve |p - share| = z sqrt(p (1 - p) / n)."""
    z = 1.959963984540054
    for successes, count in [(1, 10), (95, 100), (243, 256), (13, 15)]:
        share = successes / count
        found = statistics.proportion(successes, count)
        assert (found.value, found.count) == (share, count)
        for end in (found.low, found.high):
            gap = z * math.sqrt(end * (1 - end) / count)
            assert abs(share - end) == pytest.approx(gap, rel=1e-9)
    assert statistics.proportion(0, 20).low == 0.0
    assert statistics.proportion(20, 20).high == 1.0
    assert statistics.proportion(20, 20).low < 0.9  # 20 of 20 does not prove .9
    with pytest.raises(ValueError, match="5 of 4"):
        statistics.proportion(5, 4)


def test_wilson_covers():
    """95 % intervals hold the true share in about 95 % of experiments."""
    rng = np.random.default_rng(0)
    hits = 0
    drawn = collections.Counter(rng.binomial(128, 0.93, size=2000).tolist())
    for successes, times in drawn.items():
        found = statistics.proportion(successes, 128)
        hits += times * (found.low <= 0.93 <= found.high)
    assert 0.93 < hits / 2000 < 0.975


def test_interval_of_a_mean_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = statistics.bootstrap_mean(rng.exponential(size=60))
        hits += found.low <= 1 <= found.high
    assert 0.86 < hits / 200 < 0.99


def test_bootstrap_is_centred_on_the_point_and_repeatable():
    values = np.arange(50.0)

    def biased(rng):
        return statistics.resample(values, rng).mean() + 100

    found = statistics.bootstrap(biased, 24.5, seed=3)
    assert found.value == 24.5 and found.low < 24.5 < found.high < 40
    assert found == statistics.bootstrap(biased, 24.5, seed=3)


def test_newcombe_has_his_table():
    """Newcombe (1998), table II, method 10."""
    for first, second, ends in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ):
        found = statistics.newcombe(first, second)
        np.testing.assert_allclose((found.low, found.high), ends, atol=5e-5)
