"""Products in 8 bits: what they are, that they are, and what they leave as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh as meshes
from sora_jax.core import sharding
from sora_jax.forecast import flops
from sora_jax.models import dit, layers, rows

CONFIG = dit.Config(
    in_channels=4, out_channels=4, patch=(1, 1, 1), dim=64, num_layers=2, num_heads=4,
    mlp_dim=128, text_dim=8, freq_dim=16,
)  # fmt: skip
TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
PRODUCTS = 10  # of a block: q, k, v, out, twice; up, down
SHAPES = [{"fsdp": 2, "tensor": 2, "ulysses": 2}, {"tensor": 4, "ring": 2}]


def drawn(*size, seed=0):
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def operations(jaxpr):
    """All operations of a traced program, and of those inside of them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in flops._inner(equation):
            yield from operations(inner)


def products(function, *given) -> list:
    """The types of the two factors of each matrix product of a program."""
    traced = jax.make_jaxpr(function)(*given).jaxpr
    return [
        tuple(v.aval.dtype for v in one.invars)
        for one in operations(traced)
        if one.primitive.name == "dot_general"
    ]


def rounded(v, axis, kind):
    """v by hand in 8 bits, as numbers of the type and a scale."""
    largest = {"int8": 127.0, "fp8": 448.0, "fp8 gradient": 57344.0}[kind]
    scale = np.abs(v).max(axis, keepdims=True) / np.float32(largest)
    if kind == "int8":
        return np.round(v / scale).astype(np.int64), scale
    few = {448.0: jnp.float8_e4m3fn, 57344.0: jnp.float8_e5m2}[largest]
    return (v / scale).astype(few.dtype).astype(np.float64), scale


@pytest.fixture(scope="module")
def given():
    mask = np.arange(6) < np.array([[4], [6], [1], [5]])
    return drawn(4, 2, 4, 4, 4), np.full((4, 1), 0.7, np.float32), drawn(4, 6, 8), mask


@pytest.fixture(scope="module")
def make(build, spread):
    def network(**settings):
        config = dataclasses.replace(CONFIG, **settings)
        made = build(lambda: dit.DiT(config, rngs=nnx.Rngs(0)), seed=1)
        return made if jax.sharding.get_abstract_mesh().empty else spread(made)

    return network


def loss_of(network, given):
    """A function of the parameters, and those."""
    graph, params = nnx.split(network)
    x, tau, text, mask = given

    def loss(params):
        velocity = nnx.merge(graph, params)(
            rows.of_video(network.config, x, tau, text, mask)
        )
        return jnp.mean(velocity**2), velocity

    return loss, params


def both(network, given):
    """The velocity, and the gradients of the mean of its squares."""
    loss, params = loss_of(network, given)
    grads, velocity = jax.jit(jax.grad(loss, has_aux=True))(params)
    # No token is known here, so what says so has no gradient.
    grads = [np.asarray(g) for g in jax.tree.leaves(grads)]
    return np.asarray(velocity), [g for g in grads if np.any(g)]


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def cosine(ours, theirs):
    return np.vdot(ours, theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", TYPES)
def test_a_layer_is_what_numpy_computes(kind):
    """The value, and both gradients: that of x in 8 bits, that of W not."""
    x, g = drawn(3, 5, 48), drawn(3, 5, 32, seed=1)
    linear = layers.Linear(48, 32, kind=kind, bias=False, rngs=nnx.Rngs(0))
    w = np.asarray(linear.kernel[...])

    def value(x, w):
        return layers.matmul(x, w, None, kind)

    (qx, sx), (qw, sw) = rounded(x, -1, kind), rounded(w, 0, kind)
    found, pull = jax.vjp(value, x, w)
    np.testing.assert_array_equal(linear(jnp.asarray(x)), found)
    np.testing.assert_allclose(found, qx @ qw * sx * sw, rtol=1e-5, atol=1e-6)
    of_g = "int8" if kind == "int8" else "fp8 gradient"
    (qg, sg), (qw, sw) = rounded(g, -1, of_g), rounded(w, 1, kind)
    of_x, of_w = pull(jnp.asarray(g))
    np.testing.assert_allclose(of_x, qg @ qw.T * sg * sw.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_w, np.einsum("bni,bno->io", x, g), rtol=1e-4)


def test_rows_of_zeros_and_large_rows_stand_alone():
    x, w = drawn(4, 16), drawn(16, 8)
    x[1], x[2] = 0, 1e6 * x[2]
    found = np.asarray(layers.matmul(jnp.asarray(x), jnp.asarray(w), None, "int8"))
    assert np.all(found[1] == 0)
    for row in (0, 2, 3):
        assert error(found[row], x[row] @ w) < 0.02


def test_off_is_the_program_that_it_was(make, given):
    x, w = drawn(3, 5, 8), drawn(8, 4)

    def before(x, w):
        y = jnp.einsum("...i,io->...o", jnp.reshape(x, (15, 8)), w)
        return jnp.reshape(y, (3, 5, 4))

    def now(x, w):
        return layers.matmul(x, w, None)

    assert str(jax.make_jaxpr(now)(x, w)) == str(jax.make_jaxpr(before)(x, w))
    loss, params = loss_of(make(), given)
    assert {*products(loss, params)} == {(np.dtype("float32"),) * 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
def test_the_blocks_products_with_weights_are_in_8_bits(make, given, kind, dtype):
    loss, params = loss_of(make(quantization=kind, dtype=dtype), given)
    found = products(lambda p: loss(p)[0], params)
    assert found.count((TYPES[kind],) * 2) == PRODUCTS
    plain, params = loss_of(make(dtype=dtype), given)
    assert len(found) == len(products(lambda p: plain(p)[0], params))


# Products of values, and of gradients of activations: each once, but where they are
# computed again. "dots" keeps what they gave.
@pytest.mark.parametrize("remat, times", [("none", 2), ("dots", 2), ("full", 3)])
def test_what_is_kept_is_not_computed_again(make, given, remat, times):
    loss, params = loss_of(make(quantization="int8", remat=remat), given)
    found = products(jax.grad(lambda p: loss(p)[0]), params)
    few = [pair for pair in found if pair == (jnp.int8, jnp.int8)]
    assert PRODUCTS * (times - 1) < len(few) <= PRODUCTS * times


BOUNDS = {"int8": (0.003, 0.03, 0.999), "fp8": (0.01, 0.1, 0.99)}


@pytest.mark.parametrize("kind", TYPES)
def test_values_and_gradients_are_near_those_of_float32(make, given, kind):
    low, high, alike = BOUNDS[kind]
    wanted, wanted_grads = both(make(), given)
    found, grads = both(make(quantization=kind), given)
    print("value", error(found, wanted))
    assert low < error(found, wanted) < high
    cosines = [cosine(a, b) for a, b in zip(grads, wanted_grads, strict=True)]
    every = [np.concatenate([g.ravel() for g in gs]) for gs in (grads, wanted_grads)]
    print("cosines", cosine(*every), min(cosines))
    assert cosine(*every) > alike
    assert min(cosines) > 1 - 10 * (1 - alike)


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_what_is_recomputed_changes_no_gradient(make, given, remat):
    wanted, wanted_grads = both(make(quantization="int8"), given)
    found, grads = both(make(quantization="int8", remat=remat), given)
    print(remat, error(found, wanted), max(map(error, grads, wanted_grads)))
    assert error(found, wanted) < 1e-5
    assert max(map(error, grads, wanted_grads)) < 1e-3


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("kind", TYPES)
def test_eight_devices_give_the_values_of_one(make, given, kind, shape):
    wanted, wanted_grads = both(make(quantization=kind), given)
    with jax.set_mesh(meshes.make_mesh(shape)):
        found, grads = both(make(quantization=kind), given)
    print(shape, error(found, wanted), max(map(error, grads, wanted_grads)))
    assert error(found, wanted) < 1e-5
    assert max(map(error, grads, wanted_grads)) < 1e-5


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=str)
def test_a_layer_on_eight_devices_rounds_as_on_one(kind, axes):
    """To the last bit of what is rounded, with either width split."""
    x, g = drawn(4, 16, 64), drawn(4, 16, 32, seed=1)
    kernel = drawn(64, 32, seed=2)
    into, out = (None if axis == "embed" else axis for axis in axes)

    def run():
        split = [sharding.reshard(v, "batch", "tokens", axis)
                 for v, axis in ((x, into), (g, out))]  # fmt: skip
        w = sharding.reshard(jnp.asarray(kernel), into, out)

        @jax.jit
        def value(x, w, g):
            y, pull = jax.vjp(lambda x, w: layers.matmul(x, w, out, kind), x, w)
            return y, *pull(g)

        return jax.device_get(value(split[0], w, split[1]))

    wanted = run()
    with jax.set_mesh(meshes.make_mesh(SHAPES[0])):
        found = run()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_unknown_kind_is_named():
    said = r"quantization is 'int4'; it must be one of \['', 'int8', 'fp8'\]"
    with pytest.raises(ValueError, match=said):
        dit.Config(quantization="int4")
