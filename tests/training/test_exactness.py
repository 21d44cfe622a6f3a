"""Which float32 products may be rounded: read from the program, as a CPU rounds none.

TPUs round float32 operands to bfloat16, and GPUs to TF32, where a product does not name
its precision. In a denoiser of half precision all float32 products are meant as such.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.diffusion import samplers, timesteps
from sora_jax.generation import compiled
from sora_jax.generation import given as givens
from sora_jax.models import dit
from sora_jax.training import objectives, optim, step
from sora_jax.training import state as states
from tests.training import test_packed, tiny

DIT = dataclasses.replace(tiny.DIT, dtype="bfloat16")
TEXT = dataclasses.replace(tiny.TEXT, dtype="bfloat16")
# The product that gives the velocity, of which the input was of half precision before.
HEAD = {DIT.dim, DIT.out_channels}


def products(jaxpr):
    """All matrix products of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def check(program, *given):
    """Float32 products are exact, but for the head's; there are some of them."""
    exact = 0
    for equation in products(jax.make_jaxpr(program)(*given).jaxpr):
        if any(x.aval.dtype != jnp.float32 for x in equation.invars):
            continue
        if equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2:
            exact += 1
            continue
        shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
        assert any(set(shape) == HEAD for shape in shapes if len(shape) == 2), equation
    assert exact


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_rounds_no_level_time_loss_or_modulation(packed):
    sizes, batch = {"fps": 8.0}, tiny.batch(0)
    if packed:
        sizes, (batch, _) = {}, test_packed.packed_batch()
    objective = objectives.Denoiser(
        DIT, TEXT, timesteps.Config(shift=3.0), test_packed.KNOWN, **sizes,
        **test_packed.COMMON,
    )  # fmt: skip
    # Muon's directions are made of products, and need no more than half precision.
    optimizer = optim.make(dataclasses.replace(tiny.OPTIM, muon_learning_rate=0.0), 9)
    run = step.make_train_step(objective, optimizer, seed=0, num_steps=9, ema_decay=0.9)
    state = jax.eval_shape(
        lambda: states.init(objective.networks, optimizer, jax.random.key(0), {})
    )
    check(run, state, batch)


@pytest.mark.parametrize("sampler", [*samplers.Sampler])
def test_sampling_rounds_no_level_or_modulation(sampler):
    network = nnx.split(nnx.eval_shape(lambda: dit.DiT(DIT, rngs=nnx.Rngs(0))))
    b, t, h, w = grid = (2, 3, 2, 2)
    x = jnp.zeros((*grid, 4))
    text = {"states": jnp.zeros((b, 6, 16)), "mask": jnp.ones((b, 6), bool)}
    given = givens.Given(jnp.zeros((b, t, h, w), bool).at[:, 0].set(True), x)
    plan = samplers.plan(sampler, timesteps.schedule(3, 3.0))
    start = compiled.start_rows(DIT, x, text, 8.0, 0.02, given)
    tokens = start.tokens_bnc

    def run(state):
        return compiled.denoise_chunk.__wrapped__(
            network[0], state, tokens, samplers.init_memory(tokens, sampler), plan,
            (start, start), (2.0,), sampler=sampler, rescale=0.7,
        )  # fmt: skip

    check(run, network[1])
