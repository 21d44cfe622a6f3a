"""The text encoder's own training: read one caption, write another of the same clip."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import rng
from sora_jax.models import text_encoder
from sora_jax.training import loop, objectives, optim
from sora_jax.training import state as states
from sora_jax.training import step as steps
from tests.training import test_loop

CONFIG = text_encoder.Config(
    vocab_size=16, dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32,
    absolute_positions=True,
)  # fmt: skip
# Nouns 3 to 8; 9 and 10 are "before" and "behind", 1 ends a caption.
NOUNS = range(3, 9)


def batch():
    """Every "x before y" and "y behind x", to be written "x y"."""
    rows, targets = [], []
    for x, y in itertools.permutations(NOUNS, 2):
        rows += [[x, 9, y, 1], [y, 10, x, 1]]
        targets += [[x, y, 1]] * 2
    rows += rows[:4]  # 64 rows, which every mesh can split
    targets += targets[:4]
    ids = np.array(rows, np.int32)
    return {
        "text_ids": ids,
        "text_mask": np.ones(ids.shape, bool),
        "target_ids": np.array(targets, np.int32),
    }


def train(mesh, num_steps):
    """Returns the metrics of each step and the last state."""
    objective = objectives.Rewriting(CONFIG)
    optimizer = optim.make(
        optim.Config(learning_rate=1e-2, muon_learning_rate=0.05, warmup_steps=5),
        num_steps,
    )
    with jax.set_mesh(mesh):
        state = jax.jit(
            lambda: states.init(objective.networks, optimizer, rng.key(0, "init"), {})
        )()
        step = jax.jit(
            steps.make_train_step(
                objective, optimizer, seed=0, num_steps=9, ema_decay=0.9
            )
        )
        rows, found = loop.to_device(batch(), mesh), []
        for _ in range(num_steps):
            state, metrics = step(state, rows)
            found.append(jax.device_get(metrics))
    return found, state


def ratio(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


@pytest.fixture(scope="module")
def one():
    return train(test_loop.make_mesh({"fsdp": 1}), 150)


def test_who_is_named_first_stays_in_the_mean_of_the_states(one):
    """A bag of words cannot be told from its mirror image: half of the nouns right."""
    metrics, _ = one
    assert ratio(metrics[0], "right") < 0.3
    assert ratio(metrics[-1], "right") == 1.0
    assert ratio(metrics[-1], "loss") < 0.1


@pytest.mark.parametrize(
    "name", [pytest.param("fsdp 8", marks=pytest.mark.slow), "2 x 2 x 2"]
)
def test_losses_do_not_depend_on_the_mesh(name, one):
    found, _ = train(test_loop.make_mesh(test_loop.MESHES[name]), 5)
    other, _ = train(test_loop.make_mesh({"fsdp": 1}), 5)
    np.testing.assert_allclose(
        [ratio(m, "loss") for m in found],
        [ratio(m, "loss") for m in other],
        rtol=1e-5,
    )


def test_a_token_depends_on_earlier_ones_only(one):
    _, state = one
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    modules = objectives.Rewriting(CONFIG).networks.bind(params)
    mean = jax.random.normal(jax.random.key(0), (1, 16))
    ids = jnp.array([[4, 5, 6, 7, 8]])
    logits = modules["caption_decoder"](mean, ids)
    changed = modules["caption_decoder"](mean, ids.at[0, 2].set(3))
    np.testing.assert_allclose(changed[:, :3], logits[:, :3], atol=1e-5)
    assert np.abs(changed[:, 3:] - logits[:, 3:]).max() > 1e-2
    other = modules["caption_decoder"](-mean, ids)
    assert np.abs(other - logits)[0].max(-1).min() > 1e-2  # all hear the mean


def test_positions_distinguish_texts_of_equal_words():
    ids = jnp.array([[3, 9, 4], [4, 9, 3]])
    means = {}
    for absolute in (True, False):
        config = text_encoder.Config(
            vocab_size=16, dim=16, num_layers=1, absolute_positions=absolute
        )
        networks = states.Networks(
            lambda rngs, config=config: {"e": text_encoder.TextEncoder(config, rngs)}
        )
        encoder = networks.bind(networks.init(jax.random.key(0)))["e"]
        mask = jnp.ones(ids.shape, bool)
        means[absolute] = text_encoder.mean_state(encoder(ids, mask), mask)
    assert np.abs(means[True][0] - means[True][1]).max() > 1e-2
    np.testing.assert_allclose(means[False][0], means[False][1], atol=1e-5)
