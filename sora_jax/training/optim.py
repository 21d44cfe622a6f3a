"""From a config to an optimizer: AdamW with warm-up and cosine decay.

AdamW is arXiv 1711.05101; the global gradient norm is clipped before it.
"""

import dataclasses
import re

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """The optimizer of a run."""

    learning_rate: float = 1e-3
    # Pattern of parameter names -> factor on the learning rate; the first match counts.
    learning_rate_factors: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 50
    final_fraction: float = 0.05  # of the learning rate, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0
    ema_decay: float = 0.995


def schedule(config: Config, num_steps: int) -> optax.Schedule:
    """The learning rate by step: linear from 0, then half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, num_steps),
        max(num_steps, config.warmup_steps + 1),
        config.learning_rate * config.final_fraction,
    )


def path_name(path) -> str:
    """The dotted name of a leaf, such as `dit.blocks.attn1.to_q.kernel`."""
    return ".".join(str(getattr(key, "key", key)) for key in path)


def make(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Builds the optimizer; its state is in the layout of the parameters."""

    def is_matrix(params):
        # Stacked biases have two axes too, so the name decides as well.
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf.ndim >= 2 and not path_name(path).endswith(("bias", "scale"))
            ),
            params,
        )

    def factor(path) -> float:
        for pattern, value in config.learning_rate_factors:
            if re.search(pattern, path_name(path)):
                return value
        return 1.0

    def scale_by_name(updates, state, params=None):
        del params
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, update: update * factor(path), updates
        )
        return scaled, state

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_by_name),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
    )


def ema(average, params, decay: float, step: jax.Array):
    """Moves the average towards the parameters; faster in the first steps.

    The decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run's average
    is not made of its initial values.
    """
    step = step.astype("float32")
    rate = 1 - jax.numpy.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
