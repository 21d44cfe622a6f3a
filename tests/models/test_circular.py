"""Time that goes round in a circle: the last latent is beside the first."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import encodings


def places(times):
    pos = jnp.zeros((1, len(times), 3))
    return pos.at[0, :, 0].set(jnp.asarray(times, jnp.float32)).at[..., 1].set(2.0)


@pytest.mark.parametrize("period", [2.0, 3.0, 4.0, 10.0])
def test_a_period_later_is_the_same_time(period):
    times = np.array([0.0, 1.0, 1.5])
    period_bn = jnp.full((1, 3), period)
    for make in (
        lambda pos, p: jnp.stack(encodings.rope_tables(pos, 32, 100.0, p)),
        lambda pos, p: encodings.additive_positions(pos, 48, p),
    ):
        now, later = (make(places(times + k * period), period_bn) for k in (0, 3))
        np.testing.assert_allclose(now, later, atol=1e-4)
        assert np.abs(now[..., 0, :] - now[..., 1, :]).max() > 0.1  # times differ
        plain = make(places(times), None)
        none = make(places(times), jnp.zeros((1, 3)))
        np.testing.assert_array_equal(plain, none)


def test_frequencies_are_the_nearest_multiples():
    usual = jnp.asarray([1.0, 0.5, 0.1])
    found = encodings.circular(usual, jnp.asarray([10.0, 2.0, 0.0]))
    base = 2 * np.pi / 10
    np.testing.assert_allclose(found[0], [2 * base, base, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found[1], [np.pi, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(found[2], usual)
