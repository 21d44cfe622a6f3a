"""Noise levels of what is known, and of latent frames that have levels of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.data import conditions
from sora_jax.diffusion import timesteps
from sora_jax.training import loop, objectives
from tests.training import tiny

ROWS = 4000


def objective(**known):
    return objectives.Denoiser(
        tiny.DIT, tiny.TEXT, timesteps.Config(shift=3.0), conditions.Config(**known),
        text_dropout=0.2, null_ids=[1] + [0] * 5, fps=8.0,
    )  # fmt: skip


def batch(pattern="first_frame", rows=ROWS):
    place = conditions.PATTERNS.index(conditions.Pattern(pattern))
    return tiny.batch(0, rows) | {"pattern": np.full(rows, place, np.int32)}


def drawn(made, given):
    return jax.device_get(jax.jit(made.draw)(jax.random.key(3), given, jnp.zeros(())))


def test_known_levels_have_their_shares_and_stay_below_the_generated():
    found = drawn(objective(levels=((0.005, 0.5), (0.5, 0.3)), dropout=0.1), batch())
    known, tau = found["known_tau"][:, 0], found["tau"][:, 0]
    dropped = known == 1
    assert dropped.mean() == pytest.approx(0.1, abs=0.02)
    assert np.all(known[~dropped & (known != np.float32(0.02))] <= tau[~dropped & (known != np.float32(0.02))])  # fmt: skip
    rest = known[~dropped]
    assert (rest == np.float32(0.02)).mean() == pytest.approx(0.2, abs=0.03)
    assert (rest <= 0.005).mean() == pytest.approx(0.5, abs=0.03)
    high = tau[~dropped] > 0.9  # where the level of generated tokens is no bound
    assert ((rest > 0.05) & high).sum() / high.sum() == pytest.approx(0.27, abs=0.04)
    assert 0.4 < rest.max() <= 0.5


def test_a_fixed_level_draws_the_same_steps_as_before():
    """Levels of what is known take nothing from the other draws."""
    fixed, others = (
        drawn(objective(), batch()),
        drawn(objective(levels=((0.1, 1.0),)), batch()),
    )
    assert np.all(fixed["known_tau"] == np.float32(0.02))
    for name in ("tau", "noise", "drop"):
        np.testing.assert_array_equal(fixed[name], others[name])
    assert "extra_tau" not in fixed


def test_levels_of_frames_are_sorted():
    shares = {"none": 0.5, "levels": 0.5}
    made = objective(probabilities=shares)
    found = drawn(made, batch("levels"))
    levels = np.concatenate([found["tau"][..., None], found["extra_tau"]], -1)
    assert levels.shape == (ROWS, 1, 1 + conditions.EXTRA_LEVELS)
    assert np.all(np.diff(levels) >= 0) and np.diff(levels).max() > 0.5
    # Other clips keep the level that they have without such clips.
    plain = drawn(made, batch("none"))
    np.testing.assert_array_equal(plain["tau"], drawn(objective(), batch())["tau"])


def test_each_frame_is_noised_at_its_own_level():
    made = objective(probabilities={"none": 0.5, "levels": 0.5})
    given = batch("levels", 4)
    slots = np.zeros((4, 2, 16), np.int8)
    slots[:, 0], slots[:, 1] = conditions.Slot.EXTRA + 1, conditions.Slot.GENERATED
    found = drawn(made, given | {"slots": slots.reshape(4, 32)})
    modules = made.networks.bind(jax.jit(made.networks.init)(jax.random.key(0)))
    rows, _ = made.clean_rows(modules, found)
    tau = np.asarray(rows.tau).reshape(4, 2, 16)
    np.testing.assert_array_equal(
        tau[:, 0], np.repeat(found["extra_tau"][:, 0, 1:2], 16, 1)
    )
    np.testing.assert_array_equal(tau[:, 1], np.repeat(found["tau"], 16, 1))
    assert not np.asarray(rows.given_bn).any()


def test_a_mesh_draws_the_same():
    made = objective(probabilities={"none": 0.5, "levels": 0.5}, levels=((0.1, 0.5),))
    given = batch("levels", 8)
    wanted = drawn(made, given)
    mesh = meshes.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        found = drawn(made, loop.to_device(given, mesh))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
