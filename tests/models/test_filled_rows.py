"""Rows whose tokens do not divide over a mesh are filled, which changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh as meshes
from sora_jax.core import sharding
from sora_jax.models import dit, rows

CONFIG = dit.Config(
    in_channels=3, out_channels=3, patch=(1, 1, 1), dim=32, num_heads=4, num_layers=2,
    mlp_dim=32, text_dim=8, freq_dim=16,
)  # fmt: skip
ROWS, GRID, LENGTH = 2, (3, 5, 1), 6  # 15 tokens
SHAPES = [
    {"ring": 8},
    {"ulysses": 4, "fsdp": 2},
    {"ring": 2, "ulysses": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def given():
    random = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(random.standard_normal(size), jnp.float32)  # noqa: E731
    known = np.zeros((ROWS, *GRID), np.float32)
    known[:, 0] = 1
    mask = np.arange(LENGTH) < [[4], [6]]
    return {
        "latents": draw(ROWS, *GRID, 3),
        "levels": jnp.asarray([[0.7, 0.1], [0.3, 0.0]]),
        "known": jnp.asarray(known),
        "text": draw(ROWS, LENGTH, 8),
        "mask": jnp.asarray(mask),
        "residual": draw(ROWS, 15, 32),
    }


@pytest.fixture(scope="module")
def make(build, spread):
    def network():
        made = build(lambda: dit.DiT(CONFIG, rngs=nnx.Rngs(0)), seed=1)
        return made if jax.sharding.get_abstract_mesh().empty else spread(made)

    return network


def run(network, given, known: bool, reuse: bool):
    """The velocity and, where they are reused, what the blocks added."""
    cached = None
    if reuse:
        n = sharding.padded_size(15, "tokens")
        residual = jnp.pad(given["residual"], ((0, 0), (0, n - 15), (0, 0)))
        residual = sharding.reshard(residual, "batch", "tokens", None)
        gain = sharding.reshard(jnp.asarray([0.5, 2.0]), "batch")
        cached = dit.Reuse(residual, jnp.asarray(True), gain)
    levels = given["levels"] if known else given["levels"][:, :1]
    is_known = rows.known_tokens(given["known"] > 0, CONFIG.patch) if known else None
    row = rows.of_video(
        CONFIG,
        given["latents"],
        levels,
        given["text"],
        given["mask"],
        known_bn=is_known,
    )
    found = network(row, cached)
    return found[0] if reuse else found


def both(make, given, **options):
    """The velocity, and the gradients of its squares by weights and latents."""
    graph, params = nnx.split(make())

    def loss(params, latents):
        given_here = given | {"latents": latents}
        velocity = run(nnx.merge(graph, params), given_here, **options)
        return jnp.sum(velocity**2), velocity

    graded = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return jax.device_get(graded(params, given["latents"]))


@pytest.mark.parametrize(
    "shape, known",
    [
        *zip(SHAPES, (True, False, True), strict=True),
        *(
            pytest.param(shape, known, marks=pytest.mark.slow)
            for shape, known in zip(SHAPES, (False, True, False), strict=True)
        ),
    ],
    ids=str,
)
def test_a_row_that_does_not_divide_is_the_same(make, given, shape, known):
    (wanted, wanted_x), wanted_y = both(make, given, known=known, reuse=False)
    assert np.abs(wanted_y).max() > 0.1
    with jax.set_mesh(meshes.make_mesh(shape)):
        (found, found_x), found_y = both(make, given, known=known, reuse=False)
    np.testing.assert_allclose(found_y, wanted_y, rtol=1e-5, atol=1e-5)
    scale = np.abs(wanted_x).max()
    np.testing.assert_allclose(found_x, wanted_x, rtol=1e-4, atol=1e-5 * scale)
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(
            one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max()
        )


def test_what_is_reused_is_filled_too(make, given):
    wanted = both(make, given, known=True, reuse=True)[1]
    with jax.set_mesh(meshes.make_mesh({"ring": 8})):
        found = both(make, given, known=True, reuse=True)[1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
