"""Operations of traced programs: loops, what is computed twice, kernels, convolutions."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.core import mesh
from sora_jax.forecast import flops
from sora_jax.models import attention, dit, rows
from sora_jax.training import cost


def count(function, *shapes, devices=1):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.flops_of(jax.make_jaxpr(function)(*given).jaxpr, devices)


def test_a_loops_products_count_as_often_as_it_runs():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert count(layers, (5, 8), (3, 8, 8)) == 3 * 2 * 5 * 8 * 8
    gradient = jax.grad(lambda x, w: jnp.sum(layers(x, w)), (0, 1))
    assert count(gradient, (5, 8), (3, 8, 8)) == 3 * 3 * 2 * 5 * 8 * 8
    again = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(x @ w)))
    once = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))
    twice = count(jax.grad(again, (0, 1)), (5, 8), (8, 8))
    assert twice / count(once, (5, 8), (8, 8)) == pytest.approx(4 / 3)


def test_a_kernel_counts_by_formula_and_a_devices_part_for_all():
    shape = 1, 4096, 2, 128  # scores beyond a chunk, so the kernel has a say
    value = 4 * 4096 * 4096 * 2 * 128
    assert count(attention.attention, *[shape] * 3) == value

    def loss(*qkv):
        return jnp.sum(attention.attention(*qkv))

    assert count(jax.grad(loss, (0, 1, 2)), *[shape] * 3) == pytest.approx(
        3 * value, rel=1e-3
    )
    for axis in ("ulysses", "ring"):
        with jax.set_mesh(mesh.make_mesh({axis: 2}, jax.devices()[:2])):
            layout = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, axis))
            qkv = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)] * 3
            traced = jax.jit(attention.attention).trace(*qkv)
            assert flops.flops_of(traced.jaxpr.jaxpr, 2) == value
            traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv)
            found = flops.flops_of(traced.jaxpr.jaxpr, 2)
            assert found == pytest.approx(3 * value, rel=1e-3)


def test_a_convolution_counts_its_window():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count(convolve, (2, 5, 6, 3), (3, 3, 3, 7)) == 2 * 2 * 5 * 6 * 7 * 9 * 3


@pytest.mark.parametrize("kv_heads", [0, 1])
def test_a_denoisers_formula_counts_its_program(kv_heads):
    config = dit.Config(
        dim=256, num_layers=3, num_heads=4, num_kv_heads=kv_heads, mlp_dim=512,
        text_dim=64, freq_dim=16,
    )  # fmt: skip
    graph, state = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, rngs=nnx.Rngs(0))))
    tokens, length = 512, 128

    def run(state, x, level, positions, text):
        model, mask = nnx.merge(graph, state), jnp.ones((1, length), bool)
        return model(rows.Rows(x, positions, level, text, mask))

    sizes = (1, tokens, config.token_dim), (1, 1), (1, tokens, 3), (1, length, 64)
    given = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    found = flops.flops_of(jax.make_jaxpr(run)(state, *given).jaxpr, 1)
    # Embedders and modulation are left out.
    formula = cost.dit_forward_flops(config, tokens, length)
    assert 1 <= found / formula < 1.02
