"""What the backward pass recomputes changes no gradient, and the memory as it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.models import attention, chunked_attention, dit, rows

CONFIG = dit.Config(
    in_channels=4, out_channels=4, patch=(1, 1, 1), dim=32, num_layers=6, num_heads=2,
    mlp_dim=64, text_dim=8, freq_dim=16, mask_text=False,
)  # fmt: skip


def programs(monkeypatch, remat, chunked):
    """The gradients of a video's loss, and the program that gives them."""
    monkeypatch.setattr(attention, "_AT_ONCE_BYTES", 0 if chunked else 2**30)
    monkeypatch.setattr(chunked_attention, "BYTES", 0)
    monkeypatch.setattr(attention, "_MIN_QUERIES", 1)
    config = dataclasses.replace(CONFIG, remat=remat)
    model = dit.DiT(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    leaves = [x + 0.1 * random.standard_normal(x.shape, np.float32) for x in leaves]
    params = jax.tree.unflatten(tree, leaves)
    x = jnp.asarray(random.standard_normal((1, 2, 8, 8, 4)), jnp.float32)
    text = jnp.asarray(random.standard_normal((1, 5, 8)), jnp.float32)

    def loss(params):
        module = nnx.merge(graph, params)
        tau = jnp.full((1, 1), 0.7)
        mask = jnp.ones((1, 5), bool)
        return jnp.sum(module(rows.of_video(config, x, tau, text, mask)) ** 2)

    run = jax.jit(jax.grad(loss)).lower(params).compile()
    return jax.tree.leaves(run(params)), run


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_what_is_recomputed_changes_no_gradient(monkeypatch, chunked):
    expected, whole = programs(monkeypatch, "none", chunked)
    memory = {"none": whole.memory_analysis().temp_size_in_bytes}
    flops = {"none": whole.cost_analysis()["flops"]}
    for remat in ("full", "attention", "dots"):
        found, run = programs(monkeypatch, remat, chunked)
        memory[remat] = run.memory_analysis().temp_size_in_bytes
        flops[remat] = run.cost_analysis()["flops"]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    print(memory, flops)
    assert memory["full"] < memory["attention"] < memory["none"]
    assert flops["none"] < flops["attention"] < flops["full"]


def test_a_size_or_policy_that_is_none_is_named():
    for name, value in (("num_kv_heads", -2), ("num_heads", 0), ("num_layers", -1)):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            dit.Config(**{name: value})
    with pytest.raises(ValueError, match="'some'; it must be one of .*'offload'"):
        dit.Config(remat="some")


def test_attention_to_text_is_not_kept():
    model = dit.DiT(CONFIG, rngs=nnx.Rngs(0))
    x, text = jnp.zeros((1, 2, 8, 8, 4)), jnp.zeros((1, 5, 8))
    mask = jnp.ones((1, 5), bool)
    given = rows.of_video(CONFIG, x, jnp.full((1, 1), 0.7), text, mask)
    program = str(jax.make_jaxpr(model)(given))
    assert program.count(f"name[name={attention.SAVED}]") == 1
    assert program.count("name[name=text_attention]") == 1
