"""One optimization step as a pure function: (state, batch) -> (state, metrics).

The loss and its weight are summed separately and divided at the end, so that neither
gradient accumulation nor the mesh changes the objective. The randomness of a step is
drawn for the whole global batch before it is split into micro-batches.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from sora_jax.core import rng, sharding
from sora_jax.training import state as states

Batch = Mapping[str, jax.Array]
# name -> (sum, weight); each entry of a vector is a metric, named by the objective.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    """What is learned: networks, the randomness of a step, and the loss."""

    networks: states.Networks
    metric_names: Mapping[str, list[str]]  # names of a vector metric's entries

    def draw(self, key: jax.Array, batch: Batch, share: jax.Array) -> Batch:
        """Adds the step's random arrays, each with the batch as its first axis.

        share: of the run's steps that are done, in [0, 1).
        """

    def loss(
        self, modules: states.Modules, batch: Batch
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns the summed loss, the weight it is a sum over, and more metrics."""


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    num_steps: int,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[states.TrainState, Batch], tuple[states.TrainState, Metrics]]:
    """Builds the train step; the caller jits it with the state donated.

    A step whose loss or gradient is not finite leaves parameters, EMA and optimizer
    unchanged, and is counted in the state.
    """

    def loss_sum(params, fixed, batch):
        modules = objective.networks.bind(params | fixed)
        total, weight, metrics = objective.loss(modules, batch)
        return total, (weight, metrics)

    gradient_of = jax.value_and_grad(loss_sum, has_aux=True)

    def accumulated(params, fixed, batch):
        if accumulation == 1:
            return gradient_of(params, fixed, batch)
        micro = {name: _split(leaf, accumulation) for name, leaf in batch.items()}
        first = jax.tree.map(lambda leaf: leaf[0], micro)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient_of, params, fixed, first),
        )
        zeros = (zeros[0], _laid_out_like(zeros[1], params))

        def body(carry, one):
            return jax.tree.map(jnp.add, carry, gradient_of(params, fixed, one)), None

        return jax.lax.scan(body, zeros, micro)[0]

    def train_step(state, batch):
        key = rng.key(seed, "train", state.step)
        batch = objective.draw(key, batch, state.step / num_steps)
        (total, (weight, metrics)), gradient = accumulated(
            state.params, state.fixed, batch
        )
        gradient = jax.tree.map(lambda leaf: leaf / weight, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = states.update_ema(state.ema, params, ema_decay, state.step)
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        bad = 1 - finite.astype(jnp.int32)
        state = states.TrainState(
            params=params,
            ema=ema,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
            fixed=state.fixed,
        )
        one = jnp.ones(())
        metrics = dict(metrics) | {
            "loss": (total, weight),
            "grad_norm": (norm, one),
            "skipped_steps": (state.skipped.astype(jnp.float32), one),
            "skipped_in_a_row": (state.skipped_in_a_row.astype(jnp.float32), one),
        }
        return state, metrics

    return train_step


def _split(leaf: jax.Array, ways: int) -> jax.Array:
    """[b, ...] -> [ways, b / ways, ...]; each part has rows of every shard."""
    b = leaf.shape[0]
    shape = (b // ways, ways, *leaf.shape[1:])
    layout = sharding.out_sharding("batch", *(None,) * leaf.ndim)
    return jnp.swapaxes(jnp.reshape(leaf, shape, out_sharding=layout), 0, 1)


def _laid_out_like(zeros, params):
    if jax.sharding.get_abstract_mesh().empty:
        return zeros
    return jax.tree.map(
        lambda zero, leaf: jax.reshard(zero, jax.typeof(leaf).sharding.spec),
        zeros,
        params,
    )
