"""Schedules by hand, and the solvers with what they are told to reuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import samplers, step_cache, timesteps

# |1 - r|, then |1 - r r'| ...: 0.02, then 0.02 + 0.0496, then 0.0696 + 0.0876
RATIO = np.array([[9.0], [9.0], [0.98], [0.97], [0.96], [0.5], [1.0], [1.0], [1.0]])


def test_a_schedule_follows_the_errors_by_hand():
    def reused(threshold, max_skips=9, retention=0.2):
        reuse, gain = step_cache.schedule(RATIO, threshold, max_skips, retention)
        return np.flatnonzero(reuse).tolist(), gain[:, 0]

    assert reused(0.0)[0] == []
    kept, gain = reused(0.06)  # evaluation 3 adds 0.0494 to 0.02
    assert kept == [2, 4, 6, 7, 8]
    np.testing.assert_allclose(gain, [1, 1, 0.98, 1, 0.96, 1, 1, 1, 1], rtol=1e-6)
    kept, gain = reused(0.1)
    assert kept == [2, 3, 6, 7, 8]
    np.testing.assert_allclose(gain[2:4], [0.98, 0.98 * 0.97], rtol=1e-6)
    assert reused(0.2)[0] == [2, 3, 4, 6, 7, 8]
    assert reused(0.2, max_skips=2)[0] == [2, 3, 6, 7]
    assert reused(0.2, retention=0.4)[0] == [4, 6, 7, 8]
    # The first evaluation has nothing to reuse, whatever is retained.
    assert 0 not in reused(1e9, retention=0.0)[0]
    assert reused(1e9, retention=1.0)[0] == []


def test_the_worse_branch_decides():
    ratio = np.ones((6, 2))
    ratio[3, 1] = 0.5
    reuse, gain = step_cache.schedule(ratio, 0.1, 9, 0.0)
    assert np.flatnonzero(reuse).tolist() == [1, 2, 4, 5]
    assert gain.shape == (6, 2) and gain.dtype == np.float32
    ratio[3, 1] = 0.96
    reuse, gain = step_cache.schedule(ratio, 0.1, 9, 0.0)
    assert np.flatnonzero(reuse).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(gain[4], [1, 0.96], rtol=1e-6)


@pytest.mark.parametrize("sampler", [*samplers.Sampler])
def test_rows_are_those_of_the_evaluations_that_are_asked_for(sampler):
    steps = samplers.plan(sampler, np.array([1, 0.75, 0.5, 0.0, 0.0]))
    asked = samplers.evaluation_mask(sampler, steps)
    heun = sampler == "heun"
    assert asked[:, 0].tolist() == [True, True, True, False]
    assert not heun or asked[:, 1].tolist() == [True, True, False, False]
    numbers = step_cache.measurement_rows(sampler, steps, 2)["slot"][asked]
    assert numbers.tolist() == list(range(5 if heun else 3))


def test_where_x_was_changed_the_next_evaluation_is_computed():
    steps = samplers.plan("euler", np.linspace(1, 0, 8))
    schedule = step_cache.schedule(np.array([[1.0], [0.5], *[[0.9]] * 5]), 1e9, 4, 0.2)
    assert schedule[0].tolist() == [False, False, True, True, True, True, False]
    steps |= step_cache.plan_rows("euler", steps, *schedule)
    fresh = step_cache.restart(
        "euler", {name: rows[3:] for name, rows in steps.items()}
    )
    assert fresh["reuse"][:, 0].tolist() == [0, 1, 1, 0]
    # The ratios since the one that is computed now.
    np.testing.assert_allclose(fresh["gain"][:, 0, 0], [1, 0.9, 0.81, 1], rtol=1e-6)
    same = {name: rows[6:] for name, rows in steps.items()}
    assert step_cache.restart("euler", same) is same


def _network(x, level):
    """Blocks with a residual between an embedding and a head, as a denoiser has."""
    start = 1.5 * x
    return start, jnp.sin(3 * start) + level * start


@pytest.mark.parametrize("sampler", [*samplers.Sampler])
def test_reuse_is_that_of_a_loop_without_any_machinery(sampler):
    taus = timesteps.schedule(7, 3.0)
    steps = samplers.plan(sampler, taus)
    count = int(samplers.evaluation_mask(sampler, steps).sum())
    rng = np.random.default_rng(0)
    ratio = rng.uniform(0.9, 1.1, (count, 1))
    schedule = step_cache.schedule(ratio, 0.2, 2, 0.2)
    assert 2 < schedule[0].sum() < count - 2
    steps |= step_cache.plan_rows(sampler, steps, *schedule)
    noise = jax.random.normal(jax.random.key(0), (3, 5))
    computed = []

    def velocity(x, level, residual, step):
        def compute(start):
            jax.debug.callback(lambda t: computed.append(float(t)), level)
            return _network(x, level)[1]

        start = 1.5 * x
        spared = step["reuse"] > 0
        used = jax.lax.cond(
            spared, lambda _: step["gain"][0] * residual, compute, start
        )
        return 0.7 * (start + used), jnp.where(spared, residual, used)

    @jax.jit
    def whole(noise, steps):
        memory, residual = samplers.init_memory(noise, sampler), jnp.zeros_like(noise)
        return samplers.sample_chunk(
            velocity, noise, memory, steps, sampler=sampler, cache=residual
        )

    x, _, kept = whole(noise, steps)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(computed) == count - schedule[0].sum()

    asked = iter(zip(*schedule, strict=True))
    last = None

    def plain(x, level):
        nonlocal last
        reuse, gain = next(asked)
        start, residual = _network(x, level)
        if reuse:
            residual = gain[0] * last
        else:
            last = residual
        return 0.7 * (start + residual)

    with jax.disable_jit():
        want = samplers.sample(plain, noise, taus, sampler=sampler)
    np.testing.assert_allclose(x, want, atol=2e-5)
    np.testing.assert_allclose(kept, last, atol=2e-5)
    none = step_cache.schedule(ratio, 0.0)
    dense, *_ = whole(noise, steps | step_cache.plan_rows(sampler, steps, *none))
    want = samplers.sample(
        lambda x, t: 0.7 * sum(_network(x, t)), noise, taus, sampler=sampler
    )
    np.testing.assert_allclose(dense, want, atol=2e-5)
    assert np.abs(np.asarray(dense - x)).max() > 1e-3


def test_a_change_is_that_of_norms_and_angles():
    before = jnp.asarray([[[3.0, 0.0], [0.0, 2.0]]])
    now = jnp.asarray([[[6.0, 0.0], [1.0, 0.0]]])
    # ratios 2 and 1/2; the first keeps its direction, the second turns by 90 degrees
    np.testing.assert_allclose(
        step_cache.change(before, now), [[1.25, 0.75, 0.5]], rtol=1e-6
    )
