"""The optimizer against optax's own Muon and AdamW, and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from sora_jax.core import mesh as meshes
from sora_jax.core import trees
from sora_jax.training import optim

SHAPES = {
    "wide": {"kernel": (6, 20), "bias": (20,)},
    "tall": {"kernel": (20, 6), "bias": (6,)},
    "stacked": {"kernel": (4, 8, 16), "bias": (4, 16)},
    "conv": {"kernel": (3, 3, 3, 4, 8), "bias": (8,)},
    "embedding": {"table": (30, 8)},
}


def random_tree(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 32))
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def five_steps(optimizer, seeds):
    params = random_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for seed in seeds:
        updates, state = update(random_tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_kernels_take_optax_muon_and_the_rest_adam():
    config = optim.Config(
        learning_rate=3e-3, muon_learning_rate=2e-2, warmup_steps=2,
        learning_rate_factors=(("^wide", 2.0),), clip_norm=1e9,
    )  # fmt: skip
    share = optim.schedule(config, 10)

    def dimensions(params):
        def one(path, leaf):
            if not path.endswith("kernel"):
                return None
            inputs = range(leaf.ndim == 3, leaf.ndim - 1)
            return contrib.MuonDimensionNumbers(tuple(inputs), (leaf.ndim - 1,))

        return trees.map_paths(one, params)

    muon = contrib.muon(
        lambda step: 2e-2 * share(step),
        beta=0.95,
        muon_weight_dimension_numbers=dimensions,
    )
    adam = optax.adam(lambda step: 3e-3 * share(step), b2=0.95)
    start = random_tree(0)
    # With one gradient throughout, optax's correction of the momentum's bias, which we
    # leave out, is a factor, and orthogonalizing takes any factor away.
    for kinds, seeds, peer in (("kernel", [1] * 5, muon), ("", range(1, 6), adam)):
        found, wanted = (
            five_steps(optim.make(config, 10), seeds),
            five_steps(peer, seeds),
        )
        for group in SHAPES:
            for name in SHAPES[group]:
                if (name == "kernel") != (kinds == "kernel"):
                    continue
                moved, theirs = (
                    tree[group][name] - start[group][name] for tree in (found, wanted)
                )
                theirs = theirs * (2 if group == "wide" else 1)
                error = jnp.linalg.norm(moved - theirs) / jnp.linalg.norm(theirs)
                assert error < 1e-4, (group, name, float(error))


def test_singular_values_come_near_one():
    x_lio = jax.random.normal(jax.random.key(0), (3, 12, 40))
    x_lio = x_lio * jnp.geomspace(1, 0.02, 12)[:, None]
    before = jnp.linalg.svd(x_lio, compute_uv=False)
    after = jnp.linalg.svd(optim.orthogonalize(x_lio), compute_uv=False)
    assert before.max() / before.min() > 30
    assert after.min() > 0.6 and after.max() < 1.3
    flipped = optim.orthogonalize(x_lio.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(flipped, optim.orthogonalize(x_lio), atol=1e-5)


def test_weight_decay_moves_kernels_and_nothing_else():
    config = optim.Config(weight_decay=0.5, learning_rate=0.1, warmup_steps=0)
    optimizer = optim.make(config, 10)
    params = {name: random_tree(0)[name] for name in ("wide", "embedding")}
    params["block"] = {"scale_shift_table": jnp.ones((4, 6, 8)), "known": jnp.ones(8)}
    params["block"] |= {"distance_bias": jnp.ones((4, 8)), "scale": jnp.ones((4, 8))}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(still, optimizer.init(params), params)
    moved = {
        name: float(jnp.abs(leaf).max())
        for name, leaf in trees.flatten(updates).items()
    }
    assert {name for name, by in moved.items() if by} == {
        name for name in moved if name.endswith("kernel")
    }
    np.testing.assert_allclose(
        updates["wide"]["kernel"], -0.05 * params["wide"]["kernel"], rtol=1e-6
    )


def test_clip_norm_0_clips_nothing():
    """Clipping shows in Adam where the gradient's size changes from step to step."""
    config = optim.Config(warmup_steps=2, clip_norm=0.0)

    def moved(clip_norm):
        changed = dataclasses.replace(config, clip_norm=clip_norm)
        return five_steps(optim.make(changed, 10), range(1, 6))

    free, wide, clipped = moved(0.0), moved(1e9), moved(0.5)
    jax.tree.map(np.testing.assert_array_equal, free, wide)
    assert not np.array_equal(free["wide"]["kernel"], clipped["wide"]["kernel"])


@pytest.mark.parametrize("layers", [4, 3])
def test_updates_do_not_depend_on_the_mesh(layers):
    """Layers that divide over the devices are spread, others are not."""
    gradient = jax.random.normal(jax.random.key(0), (layers, 16, 32))
    optimizer = optim.scale_by_muon(0.9)

    def update(gradient):
        return optimizer.update(gradient, optimizer.init(gradient))[0]

    wanted = jax.jit(update)(gradient)
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    layout = jax.P(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        found = jax.jit(update)(
            jax.device_put(gradient, jax.NamedSharding(mesh, layout))
        )
        assert found.sharding.spec == layout
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_moments_in_bfloat16_halve_the_state_and_move_alike(muon):
    config = optim.Config(muon_learning_rate=muon, warmup_steps=2)
    half = dataclasses.replace(config, moments="bfloat16")
    start, moved, sizes = random_tree(0), [], []
    for one in (config, half):
        optimizer = optim.make(one, 60)
        state = optimizer.init(start)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        assert jax.tree.structure(state) == jax.tree.structure(
            jax.jit(optimizer.update)(start, state, start)[1]
        )
        ends = five_steps(optimizer, range(1, 60))
        moved.append(jax.tree.map(jnp.subtract, ends, start))
    assert sizes[1] < 0.52 * sizes[0]
    for a, b in zip(*map(jax.tree.leaves, moved), strict=True):
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(a)


def test_moments_that_bfloat16_would_round_away_are_refused():
    with pytest.raises(ValueError, match=r"b1, b2 and momentum must be at most 0\.95"):
        optim.Config(moments="bfloat16", b2=0.999)
    with pytest.raises(ValueError, match="moments is 'float8': 'float32' or"):
        optim.Config(moments="float8")
