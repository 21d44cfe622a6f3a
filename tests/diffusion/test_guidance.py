import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import mesh, sharding
from sora_jax.diffusion import guidance

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "guidance.py"


def _condition(rows=3):
    rng = np.random.default_rng(0)
    return {
        "states": jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32),
        "ids": jnp.arange(rows) + 10,
    }


NULL = {"states": jnp.full((1, 4), -1.0), "ids": jnp.zeros((1,), jnp.int32)}


def test_null_condition_replaces_only_the_dropped_rows_of_every_leaf():
    condition = _condition()
    dropped = guidance.null_condition(
        condition, NULL, jnp.asarray([False, True, False])
    )
    np.testing.assert_array_equal(dropped["ids"], [10, 0, 12])
    np.testing.assert_array_equal(dropped["states"][1], -np.ones(4))
    np.testing.assert_array_equal(dropped["states"][0], condition["states"][0])
    assert dropped["ids"].dtype == condition["ids"].dtype


def _branches(rows=3):
    """A condition and the null condition."""
    condition = _condition(rows)
    return condition, guidance.null_condition(condition, NULL, jnp.ones(rows, bool))


def _velocity(calls):
    def velocity(x, tau, condition):
        calls.append(x.shape[0])
        scale = condition["ids"].astype(jnp.float32)[:, None]
        return tau * x + scale * condition["states"]

    return velocity


def test_guidance_extrapolates_from_null_in_one_call_of_twice_the_rows():
    x, branches, calls = jnp.ones((3, 4)), _branches(), []
    velocity = _velocity(calls)
    got = guidance.guided(velocity, branches, [3.5])(x, 0.5)
    assert calls == [6]
    text, null = (velocity(x, 0.5, condition) for condition in branches)
    np.testing.assert_allclose(got, null + 3.5 * (text - null), rtol=1e-5)


def test_one_branch_is_computed_alone():
    x, condition, calls = jnp.ones((3, 4)), _condition(), []
    velocity = _velocity(calls)
    got = guidance.guided(velocity, [condition])(x, 0.5)
    assert calls == [3]
    np.testing.assert_array_equal(got, velocity(x, 0.5, condition))


def test_two_conditions_may_be_left_out_apart():
    """InstructPix2Pix, equation 3, with a scale of its own for each condition."""
    x, calls = jnp.ones((3, 4)), []
    both, null = _branches()
    other = both | {"ids": jnp.full((3,), 2)}
    velocity, of_text, of_other = _velocity(calls), 4.0, 1.5
    got = guidance.guided(velocity, (both, other, null), (of_text, of_other - of_text))(
        x, 0.5
    )
    assert calls == [9]
    v_both, v_other, v_null = (velocity(x, 0.5, c) for c in (both, other, null))
    want = v_null + of_other * (v_other - v_null) + of_text * (v_both - v_other)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="3 branches .* need 2 weights, not 1"):
        guidance.guided(velocity, (both, other, null), (of_text,))


def test_scale_may_be_traced():
    x, branches = jnp.ones((3, 4)), _branches()
    velocity = _velocity([])
    run = jax.jit(lambda s: guidance.guided(velocity, branches, [s])(x, 0.5))
    np.testing.assert_allclose(
        run(2.0), guidance.guided(velocity, branches, [2.0])(x, 0.5), rtol=1e-6
    )


@pytest.mark.peers
def test_rescaling_is_that_of_diffusers(peers_python):
    x, branches, calls = jnp.linspace(-1, 2, 12).reshape(3, 4), _branches(), []
    velocity = _velocity(calls)
    guided = guidance.guided(velocity, branches, [3.5])(x, 0.5)
    with_text = velocity(x, 0.5, branches[0])
    given = {"guided": guided.tolist(), "with_text": with_text.tolist(), "share": 0.7}
    run = subprocess.run(
        [peers_python, str(ORACLE)], input=json.dumps(given), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    got = guidance.guided(velocity, branches, [3.5], rescale=0.7)(x, 0.5)
    np.testing.assert_allclose(got, json.loads(run.stdout), rtol=1e-5)
    assert np.abs(np.asarray(got - guided)).max() > 1


def test_rescaling_gives_free_entries_the_deviation_of_the_text():
    rng = np.random.default_rng(0)
    guided, with_text = (jnp.asarray(rng.normal(size=(2, 3, 5)) * s) for s in (3, 1))
    held = jnp.asarray([[True, False, False]] * 2)
    full = guidance.rescaled(guided, with_text, 1.0, held)
    np.testing.assert_allclose(full[~held].std(), with_text[~held].std(), rtol=0.1)
    for row in range(2):
        free = ~held[row]
        np.testing.assert_allclose(
            full[row][free].std(), with_text[row][free].std(), rtol=1e-5
        )
    # What is held does not matter, and a velocity of zeros stays one.
    other = with_text.at[:, 0].set(1e6)
    np.testing.assert_array_equal(guidance.rescaled(guided, other, 1.0, held), full)
    zeros = jnp.zeros((2, 3))
    np.testing.assert_array_equal(guidance.rescaled(zeros, zeros, 0.7), zeros)
    np.testing.assert_array_equal(guidance.rescaled(guided, other, 0.0), guided)


@pytest.mark.parametrize("shape", [{"replica": 8}, {"replica": 2, "fsdp": 4}])
def test_pairs_stay_on_the_device_of_their_row(shape):
    x, branches = jnp.ones((8, 4)), _branches(8)
    velocity = _velocity([])
    want = guidance.guided(velocity, branches, [2.0])(x, 0.5)
    devices = mesh.make_mesh(shape)
    with jax.set_mesh(devices):
        rows = sharding.named_sharding(devices, "batch")
        put = jax.device_put((x, branches), rows)
        program = jax.jit(
            lambda x, branches: guidance.guided(velocity, branches, [2.0])(x, 0.5)
        )
        got = program(*put)
        assert got.sharding.is_equivalent_to(rows, 2)
        assert "all-" not in program.lower(*put).compile().as_text()
        np.testing.assert_allclose(got, want, rtol=1e-6)
