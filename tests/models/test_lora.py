"""Adapters of layers: what they compute, how they merge, which layers have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh as meshes
from sora_jax.core import rng, trees
from sora_jax.models import layers, lora
from sora_jax.training import loop
from sora_jax.training import state as states
from tests.training import tiny

ATTENTION = lora.Config(rank=3, alpha=6.0)
ALL = lora.Config(rank=2, alpha=5.0, layers=("^dit",))


def random_like(tree, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32), tree
    )


def loss(networks: states.Networks, params) -> float:
    """The tiny objective's loss on its first batch, with other networks."""
    objective = tiny.objective()

    @jax.jit
    def of(params, batch):
        batch = objective.draw(rng.key(0, "train", 0), batch, 0.0)
        total, weight, _ = objective.loss(networks.bind(params), batch)
        return total / weight

    mesh = jax.sharding.get_mesh()
    batch = tiny.batch(0) if mesh.empty else loop.to_device(tiny.batch(0), mesh)
    return float(of(params, batch))


@pytest.fixture(scope="module")
def params():
    """Random parameters of the tiny networks and of adapters of all layers."""
    return random_like(tiny.objective(lora_config=ALL).networks.abstract())


def test_a_layer_adds_its_adapter():
    layer = layers.Linear(5, 7, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    without = layer(x)
    layer.add_adapter(2, 0.5, nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), without)  # B is zero
    assert np.all(np.asarray(layer.adapter.a[...]))
    layer.adapter.b[...] = jax.random.normal(jax.random.key(2), (2, 7))
    wanted = without + 0.5 * (x @ layer.adapter.a[...]) @ layer.adapter.b[...]
    np.testing.assert_allclose(layer(x), wanted, atol=1e-5)


def test_rank_0_adds_nothing_and_rank_r_changes_nothing_at_first():
    without = tiny.objective().networks
    assert (
        trees.flatten(without.abstract()).keys()
        == (
            trees.flatten(tiny.objective(lora_config=lora.Config()).networks.abstract())
        ).keys()
    )
    adapted = tiny.objective(lora_config=ATTENTION).networks
    params = jax.jit(adapted.init)(jax.random.key(0))
    base = {name: params[name] for name in ("dit", "text_encoder")}
    base = random_like(base)  # at random weights everything matters
    assert loss(adapted, base | {"lora": params["lora"]}) == loss(without, base)
    found = trees.flatten(params["lora"])
    assert len(found) == 16 and {path.split(".")[0] for path in found} == {"dit"}
    for path, value in found.items():
        assert value.shape[0] == tiny.DIT.num_layers and np.any(value) == (
            path[-1] == "a"
        )


def test_a_merged_network_computes_the_same(params):
    adapted, without = (
        tiny.objective(lora_config=ALL).networks,
        tiny.objective().networks,
    )
    wanted = loss(adapted, params)
    merged = lora.merge(params["dit"], params["lora"]["dit"], ALL.scale)
    plain = {"dit": merged, "text_encoder": params["text_encoder"]}
    assert loss(without, plain) == pytest.approx(wanted, rel=1e-5)
    assert abs(loss(without, params) - wanted) > 1e-3 * wanted  # adapters matter


def test_a_mesh_changes_nothing(params):
    networks, without = (
        tiny.objective(lora_config=ALL).networks,
        tiny.objective().networks,
    )
    wanted = loss(networks, params)
    with jax.set_mesh(meshes.make_mesh({"fsdp": 2, "tensor": 2, "ulysses": 2})):
        layouts = networks.layouts()
        spread = jax.tree.map(jax.device_put, params, layouts)
        assert loss(networks, spread) == pytest.approx(wanted, rel=1e-5)
        text = {"text_encoder": spread["text_encoder"]}
        merged = lora.merge(spread["dit"], spread["lora"]["dit"], ALL.scale)
        assert loss(without, {"dit": merged} | text) == pytest.approx(wanted, rel=1e-5)
        for path, value in trees.flatten(merged).items():
            assert value.sharding == trees.flatten(layouts["dit"])[path], path


def test_merging_keeps_the_type_of_the_weights(params):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params["dit"])
    kernel = np.float32(half["proj_out"]["kernel"])
    merged = lora.merge(half, params["lora"]["dit"], 1.0)["proj_out"]["kernel"]
    adapter = params["lora"]["dit"]["proj_out"]["adapter"]
    wanted = kernel + adapter["a"] @ adapter["b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(merged), wanted, rtol=2**-8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": ("attn1.to_q$", "attn3")}, "'attn3', which fits none of the layers: .*"
         "dit.blocks.attn1.to_q"),
        ({"layers": ("(",)}, "is not a regular expression"),
        ({"layers": ()}, "layers names no layer"),
    ],
)  # fmt: skip
def test_layers_that_are_not_there_are_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny.objective(lora_config=lora.Config(rank=2, **change))
    assert "\n" not in str(error.value)
