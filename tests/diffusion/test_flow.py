import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import flow


def _pair():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, 3, 4, 4, 5)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4, 4)])
def test_interpolate_broadcasts_level_over_trailing_axes(shape):
    x0, noise = _pair()
    tau = np.random.default_rng(1).uniform(size=shape).astype(np.float32)
    got = flow.interpolate(x0, noise, tau)
    for index in np.ndindex(2, 3, 4, 4, 5):
        level = float(tau[index[: len(shape)]])
        want = (1 - level) * x0[index] + level * noise[index]
        assert abs(float(got[index]) - want) < 1e-5
        if index[1] > 0:  # one frame in full is enough
            break


def test_ends_of_the_path():
    x0, noise = _pair()
    np.testing.assert_array_equal(flow.interpolate(x0, noise, 0.0), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = _pair()
    _, slope = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (0.3,), (1.0,))
    np.testing.assert_allclose(flow.velocity(x0, noise), slope, atol=1e-6)


def test_level_of_a_wrong_shape_is_refused():
    x0, noise = _pair()
    with pytest.raises(ValueError, match=r"shape \(3,\).*not a prefix"):
        flow.interpolate(x0, noise, jnp.zeros((3,)))
