"""The text encoder against UMT5EncoderModel, and what holds beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh, sharding
from sora_jax.models import exchange, text_encoder


def make(config):
    return lambda: text_encoder.TextEncoder(config, nnx.Rngs(0))


@jax.jit
def apply(encoder, ids, mask):
    return encoder(ids, mask)


@pytest.mark.peers
def test_states_are_those_of_umt5(goldens, build, close):
    golden = goldens["text_encoder"]
    case = golden.case["config"]
    config = text_encoder.Config(
        vocab_size=case["vocab_size"],
        dim=case["d_model"],
        num_layers=case["num_layers"],
        num_heads=case["num_heads"],
        head_dim=case["d_kv"],
        mlp_dim=case["d_ff"],
    )
    params = exchange.TEXT_ENCODER.restore(golden.weights, config)
    encoder = build(make(config), params)
    for i in range(len(golden.case["texts"])):
        ids = jnp.asarray(golden.inputs[f"ids{i}"], jnp.int32)
        mask = jnp.asarray(golden.inputs[f"mask{i}"])
        # Wan's pipeline puts zeros where there is no token; so does the encoder.
        expected = golden.outputs[f"states{i}"] * np.asarray(mask)[..., None]
        close(f"states of {ids.shape}", apply(encoder, ids, mask), expected, 1e-5)


@pytest.fixture(scope="module")
def toy(build):
    return build(make(text_encoder.Config()))


def test_padding_changes_nothing(toy):
    ids = jnp.arange(2, 12, dtype=jnp.int32)[None]
    short = apply(toy, ids, jnp.ones((1, 10), bool))
    padded = jnp.pad(ids, ((0, 0), (0, 6)), constant_values=7)
    long = apply(toy, padded, jnp.arange(16)[None] < 10)
    np.testing.assert_allclose(long[:, :10], short, atol=2e-5)
    assert not np.any(long[:, 10:])


def test_every_layer_tells_order_by_its_own_bias(toy):
    """Without the bias, states would only depend on which tokens there are."""
    ids = jnp.asarray([[5, 9, 5, 9, 7], [5, 5, 9, 9, 7]], jnp.int32)
    mask = jnp.ones(ids.shape, bool)
    graph, state = nnx.split(toy)
    bias = state["blocks"]["attention"]["distance_bias"]
    assert bias[...].shape == (2, 32, 3)
    last = [apply(toy, ids, mask)[:, -1]]
    for layer in range(2):
        bias[...] = bias[...].at[layer].set(0)
        last.append(apply(nnx.merge(graph, state), ids, mask)[:, -1])
    assert np.abs(last[0] - last[1]).max() > 1e-3  # layer 0 had a part in it
    assert np.abs(last[1] - last[2]).max() > 1e-3  # and so had layer 1
    np.testing.assert_allclose(last[2][0], last[2][1], atol=1e-5)


def test_distances_are_exact_then_logarithmic():
    bucket = text_encoder.distance_buckets(300, 32, 128)
    assert bucket[50, 50] == 0
    assert [*bucket[50, 43:50]] == [7, 6, 5, 4, 3, 2, 1]  # before the query
    assert [*bucket[50, 51:58]] == [17, 18, 19, 20, 21, 22, 23]  # behind it
    assert bucket[0, 8] == 16 + 8 and bucket[0, 127] == bucket[0, 299] == 31
    assert bucket[299, 0] == 15
    assert np.all(np.diff(bucket[0]) >= 0)


def test_a_text_without_tokens_stays_finite(toy):
    states = apply(toy, jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool))
    assert np.all(np.isfinite(states))


def test_a_mesh_changes_nothing(build, spread):
    encoder = build(make(text_encoder.Config(num_heads=4)))
    ids = jnp.arange(80, dtype=jnp.int32).reshape(8, 10)
    mask = jnp.arange(10)[None] < jnp.arange(3, 11)[:, None]

    def loss(encoder, ids, mask):
        return jnp.sum(jnp.square(encoder(ids, mask)))

    expected = jax.jit(jax.value_and_grad(loss))(encoder, ids, mask)
    with jax.set_mesh(mesh.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})):
        ids = sharding.reshard(ids, "batch", None)
        mask = sharding.reshard(mask, "batch", None)
        value = jax.jit(jax.value_and_grad(loss))(spread(encoder), ids, mask)
    for ours, single in zip(
        jax.tree.leaves(value), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, single, rtol=1e-4, atol=1e-4)
