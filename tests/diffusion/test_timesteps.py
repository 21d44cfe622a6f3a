import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sora_jax.diffusion import timesteps


def test_every_quantile_bin_has_one_sample():
    n = 64
    config = timesteps.Config(logit_normal=1.0, mean=0.3, std=1.2, shift=5.0)
    tau = np.asarray(timesteps.sample_tau(jax.random.key(0), n, config), np.float64)
    u = timesteps.shift(tau, 1 / 5.0)
    quantile = stats.norm.cdf((np.log(u) - np.log1p(-u) - 0.3) / 1.2)
    np.testing.assert_array_equal(np.sort(np.floor(quantile * n)), np.arange(n))
    assert tau.dtype == np.float64 and 0 < tau.min() and tau.max() < 1


def test_uniform_share_is_stratified_and_unshifted():
    config = timesteps.Config(logit_normal=0.0, shift=7.0)
    tau = np.asarray(timesteps.sample_tau(jax.random.key(1), 32, config))
    np.testing.assert_array_equal(np.sort(np.floor(tau * 32)), np.arange(32))


def test_mixture_has_the_distribution_that_it_claims():
    config = timesteps.Config(logit_normal=0.8, shift=4.0)
    keys = jax.random.split(jax.random.key(2), 64)
    tau = np.ravel(jax.vmap(lambda k: timesteps.sample_tau(k, 64, config))(keys))

    def cdf(t):
        u = timesteps.shift(t, 1 / 4.0)
        return 0.8 * stats.norm.cdf(np.log(u / (1 - u))) + 0.2 * t

    for level in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        assert abs((tau < level).mean() - cdf(level)) < 0.01


def test_an_expert_sees_its_own_levels_in_their_proportion():
    """Cut to some levels, the distribution inside of them is what it was."""
    whole = timesteps.Config(logit_normal=0.8, shift=4.0)
    part = dataclasses.replace(whole, levels=(0.875, 1.0))
    keys = jax.random.split(jax.random.key(2), 64)
    draw = jax.vmap(timesteps.sample_tau, (0, None, None))
    tau = np.ravel(draw(keys, 64, part))
    assert 0.875 <= tau.min() and tau.max() <= 1

    def cdf(t):
        u = timesteps.shift(np.array([0.875, t, 1 - 1e-12]), 1 / 4.0)
        low, here, high = stats.norm.cdf(np.log(u / (1 - u)))
        bell = (here - low) / (high - low)
        return 0.8 * bell + 0.2 * (t - 0.875) / 0.125

    for level in (0.9, 0.93, 0.96, 0.99):
        assert abs((tau < level).mean() - cdf(level)) < 0.01
    with pytest.raises(ValueError, match="levels must be low < high"):
        timesteps.Config(levels=(0.9, 0.2))


def test_row_says_nothing_about_its_level():
    config = timesteps.Config()
    keys = jax.random.split(jax.random.key(3), 400)
    tau = np.asarray(jax.vmap(lambda k: timesteps.sample_tau(k, 16, config))(keys))
    # means over 400 draws of a deviation of .22: four standard errors are .044
    assert np.abs(tau.mean(0) - tau.mean()).max() < 0.05


def test_levels_are_pure_in_the_key_and_differ_between_keys():
    config = timesteps.Config()
    draw = jax.jit(lambda k: timesteps.sample_tau(k, 16, config))
    first, again = draw(jax.random.key(4)), draw(jax.random.key(4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, draw(jax.random.key(5)))


def test_shift_keeps_ends_and_has_its_inverse():
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(timesteps.shift(u, 5.0)[[0, -1]], [0, 1])
    np.testing.assert_allclose(timesteps.shift(0.5, 5.0), 5 / 6)
    np.testing.assert_allclose(timesteps.shift(timesteps.shift(u, 5.0), 1 / 5.0), u)
    np.testing.assert_array_equal(timesteps.shift(u, 1.0), u)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_schedule_falls_from_one_to_zero(shift):
    taus = timesteps.schedule(7, shift)
    assert taus.shape == (8,) and taus.dtype == np.float32
    assert taus[0] == 1 and taus[-1] == 0 and np.all(np.diff(taus) < 0)


def test_schedule_refuses_no_steps():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        timesteps.schedule(0)


def test_band_index_is_closed_below_and_holds_both_ends():
    edges = (0.0, 0.5, 0.85, 1.0)
    tau = jnp.asarray([0.0, 0.49, 0.5, 0.84, 0.85, 0.99, 1.0])
    np.testing.assert_array_equal(
        timesteps.band_index(tau, edges), [0, 0, 1, 1, 2, 2, 2]
    )
    assert timesteps.band_names(edges) == ["0-0.5", "0.5-0.85", "0.85-1"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"logit_normal": 1.2}, "not in"),
        ({"std": 0.0}, "std must be positive"),
        ({"shift": -1.0}, "shift must be positive"),
        ({"band_edges": (0.0, 0.5, 0.4, 1.0)}, "must rise"),
        ({"band_edges": (0.1, 0.5, 1.0)}, "must rise from 0 to 1"),
    ],
)
def test_wrong_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        timesteps.Config(**wrong)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_band_share_is_that_of_the_training_levels(shift):
    config = timesteps.Config(logit_normal=1.0, mean=0.2, std=0.9, shift=shift)
    tau = np.asarray(timesteps.sample_tau(jax.random.key(0), 4096, config))
    for low, high in ((0.85, 0.98), (0.0, 0.5), (0.5, 1.0)):
        share = timesteps.band_share((low, high), shift, 0.2, 0.9)
        assert abs(((tau >= low) & (tau < high)).mean() - share) < 2e-3


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.9)])
def test_training_share_is_that_of_the_mixture(levels):
    config = timesteps.Config(
        logit_normal=0.7, mean=0.2, std=0.9, shift=4.0, levels=levels
    )
    tau = np.asarray(timesteps.sample_tau(jax.random.key(0), 20_000, config))
    for low, high in itertools.pairwise((0.0, 0.3, 0.8, 0.9, 0.97, 1.0)):
        share = timesteps.training_share((low, high), config)
        assert share == pytest.approx(np.mean((tau >= low) & (tau < high)), abs=2e-3)


def test_the_known_shares_of_the_motion_band():
    shares = [timesteps.band_share((0.85, 0.98), s) for s in (1, 3, 5, 8)]
    np.testing.assert_allclose(shares, [0.041, 0.26, 0.44, 0.60], atol=0.006)


def test_the_proposed_shift_serves_the_worst_band_and_no_more():
    high, middle = (0.85, 0.98), (0.4, 0.6)
    assert timesteps.propose_shift([middle]) <= 1.5
    proposed = timesteps.propose_shift([high])
    best = max(timesteps.band_share(high, s) for s in range(1, 13))
    assert timesteps.band_share(high, proposed) >= 0.9 * best
    assert timesteps.band_share(high, proposed - 0.5) < 0.9 * best
    both = timesteps.propose_shift([high, middle])
    assert timesteps.propose_shift([middle]) < both < proposed
    with pytest.raises(ValueError, match="low < high"):
        timesteps.propose_shift([(0.9, 0.8)])
