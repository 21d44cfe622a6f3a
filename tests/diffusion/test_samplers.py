import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import samplers, timesteps

MEAN, DEVIATION = 0.7, 0.4


def gaussian_velocity(x, tau):
    """E[noise - x0 | x_tau = x] for x0 ~ N(MEAN, DEVIATION^2), in closed form."""
    variance = ((1 - tau) * DEVIATION) ** 2 + tau**2
    gain = (tau - (1 - tau) * DEVIATION**2) / variance
    return -MEAN + gain * (x - (1 - tau) * MEAN)


def exact(noise):
    """The end of the probability flow from tau 1: the monotone map of Gaussians."""
    return MEAN + DEVIATION * noise


def _sample(noise, steps, sampler, shift=1.0):
    taus = timesteps.schedule(steps, shift)
    return samplers.sample(gaussian_velocity, noise, taus, sampler=sampler)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_samples_have_the_distribution_of_the_data(sampler):
    noise = jax.random.normal(jax.random.key(0), (20000,))
    got = _sample(noise, 100, sampler, shift=2.0)
    assert abs(float(got.mean()) - MEAN) < 0.02
    assert abs(float(got.std()) - DEVIATION) < 0.02


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2), ("unipc", 2)])
def test_order_of_convergence(sampler, order):
    # Heun's closing Euler step is of first order: the order is that up to tau = .25.
    noise = jnp.linspace(-2, 2, 9)
    fine = np.linspace(1, 0.25, 2049)
    truth = samplers.sample(gaussian_velocity, noise, fine, sampler="heun")
    errors = []
    for steps in (8, 16, 32):
        taus = np.linspace(1, 0.25, steps + 1)
        got = samplers.sample(gaussian_velocity, noise, taus, sampler=sampler)
        errors.append(float(jnp.abs(got - truth).max()))
    rates = np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))
    np.testing.assert_allclose(rates, order, atol=0.3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_the_solution_is_the_closed_form_flow(sampler):
    noise = jnp.linspace(-2, 2, 9)
    got = _sample(noise, 800, sampler)
    np.testing.assert_allclose(got, exact(noise), atol=5e-3)


@pytest.mark.parametrize("sampler", [*samplers.Sampler])
def test_evaluations_are_as_many_as_are_counted(sampler):
    asked = []

    def velocity(x, tau):
        asked.append(float(tau))
        return x

    with jax.disable_jit():
        samplers.sample(velocity, jnp.ones(2), np.linspace(1, 0, 6), sampler=sampler)
    assert len(asked) == samplers.evaluations(sampler, 5)


def test_heun_never_asks_about_clean_data():
    asked = []

    def spying(x, tau):
        jax.debug.callback(lambda t: asked.append(float(t)), tau)
        return gaussian_velocity(x, tau)

    taus = timesteps.schedule(4)
    samplers.sample(spying, jnp.ones(3), taus, sampler="heun").block_until_ready()
    jax.effects_barrier()
    assert len(asked) == 7 and min(asked) > 0


def test_heun_never_asks_a_network_about_levels_of_another():
    """Two networks share the levels; where the second takes over, a step is Euler's."""
    asked = {"first": [], "second": []}

    def spying(name):
        def velocity(x, tau):
            jax.debug.callback(lambda t: asked[name].append(float(t)), tau)
            return gaussian_velocity(x, tau)

        return velocity

    def run(taus):
        x = jnp.linspace(-2, 2, 9)
        parts = samplers.split(
            samplers.plan("heun", taus), int((taus[:-1] >= 0.6).sum())
        )
        for name, steps in zip(asked, parts, strict=True):
            x, *_ = samplers.sample_chunk(spying(name), x, (), steps, sampler="heun")
        jax.block_until_ready(x)
        return x

    fine = np.linspace(1, 0.25, 2049)
    truth = samplers.sample(
        gaussian_velocity, jnp.linspace(-2, 2, 9), fine, sampler="heun"
    )
    errors = [
        float(jnp.abs(run(np.linspace(1, 0.25, steps + 1)) - truth).max())
        for steps in (16, 32, 64)
    ]
    jax.effects_barrier()
    assert min(asked["first"]) >= 0.6 > max(asked["second"])
    assert sum(map(len, asked.values())) == sum(2 * n - 1 for n in (16, 32, 64))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # still of second order
    assert samplers.evaluations("heun", 8, networks=2) == 14


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_a_changed_x_is_where_the_solution_goes_on(sampler):
    """As if it had begun there: nothing is left of what the solver remembered."""
    taus = timesteps.schedule(9, 3.0)
    plan = samplers.plan(sampler, taus)
    noise, changed = jnp.linspace(-2, 2, 9), jnp.full(9, 1.7)
    x, memory, _ = samplers.sample_chunk(
        gaussian_velocity, noise, samplers.init_memory(noise, sampler),
        samplers.chunk(plan, 0, 4), sampler=sampler,
    )  # fmt: skip
    rest = samplers.restart(sampler, {name: rows[4:] for name, rows in plan.items()})
    got, *_ = samplers.sample_chunk(
        gaussian_velocity, changed, samplers.init_memory(changed, sampler), rest,
        sampler=sampler,
    )  # fmt: skip
    want = samplers.sample(gaussian_velocity, changed, taus[4:], sampler=sampler)
    np.testing.assert_array_equal(got, want)
    assert float(jnp.abs(x - changed).max()) > 0.1


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_chunks_join_exactly_and_padding_is_free(sampler):
    noise = jax.random.normal(jax.random.key(1), (4, 8))
    calls = []

    def counting(x, tau):
        jax.debug.callback(lambda t: calls.append(float(t)), tau)
        return gaussian_velocity(x, tau)

    chunk = jax.jit(
        lambda x, memory, steps: samplers.sample_chunk(
            counting, x, memory, steps, sampler=sampler
        )
    )
    taus = timesteps.schedule(7, 3.0)
    whole = samplers.sample(gaussian_velocity, noise, taus, sampler=sampler)
    x, memory = noise, samplers.init_memory(noise, sampler)
    for steps in samplers.chunks(samplers.plan(sampler, taus), 3):
        x, memory, _ = chunk(x, memory, steps)
    jax.block_until_ready(x)
    jax.effects_barrier()
    np.testing.assert_allclose(x, whole, rtol=1e-5)
    assert len(calls) == (13 if sampler == "heun" else 7)
    assert chunk._cache_size() == 1


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_each_entry_may_follow_a_schedule_of_its_own(sampler):
    """As if it had been solved alone: another shift, a late start and an early end."""
    full = timesteps.schedule(12, 3.0)
    late = np.concatenate([np.full(4, 0.8, np.float32), np.linspace(0.8, 0, 9)])
    early = np.concatenate([timesteps.schedule(7), np.zeros(5, np.float32)])
    taus = np.stack([full, late, early], axis=1)
    x = jax.random.normal(jax.random.key(2), (4, 6, 2))
    index = jnp.asarray(np.arange(24).reshape(4, 6) % 3)

    def velocity(x, level_k):
        return gaussian_velocity(x, level_k[index][..., None])

    got = samplers.sample(velocity, x, taus, sampler, index)
    for number, alone in enumerate((full, late[3:], early[:8])):
        want = samplers.sample(gaussian_velocity, x, alone, sampler)
        mine = np.asarray(index) == number
        np.testing.assert_allclose(got[mine], want[mine], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_a_velocity_of_zero_keeps_what_it_is_of(sampler):
    """That is how known tokens are kept; they may have any value."""
    x = jax.random.normal(jax.random.key(2), (2, 3, 4))
    held = jnp.asarray([[True, False, False], [False, False, True]])[..., None]

    def velocity(x, tau):
        return jnp.where(held, 0, gaussian_velocity(x, tau))

    got = samplers.sample(velocity, x, timesteps.schedule(20, 3.0), sampler)
    kept = np.broadcast_to(held, x.shape)
    np.testing.assert_allclose(got[kept], x[kept], rtol=1e-5)
    assert not np.isclose(got[~kept], x[~kept]).any()


def test_evaluations_are_asked_for_where_any_schedule_moves():
    taus = np.stack([np.linspace(1, 0, 5), [0.5, 0.5, 0.5, 0.25, 0.0]], axis=1)
    plan = samplers.plan("heun", taus)
    wanted = [[True, True]] * 3 + [[True, False]]
    np.testing.assert_array_equal(samplers.evaluation_mask("heun", plan), wanted)
    idle = samplers.plan("heun", np.stack([taus[:, 0] * 0, taus[:, 1] * 0], axis=1))
    assert not samplers.evaluation_mask("heun", idle).any()
    first, rest = samplers.split(plan, 2)
    assert first["second"].tolist() == [[1, 1], [0, 0]] and len(rest["tau"]) == 2
