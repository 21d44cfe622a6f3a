"""From a config to an optimizer: Muon and AdamW with warm-up and cosine decay.

Muon (arXiv 2502.16982) updates a weight matrix by its momentum with all singular values
made equal, so that directions with small gradients are learned as fast as those with
large ones. Small networks learn several times as much from each clip this way. AdamW
(arXiv 1711.05101) updates all other parameters, and everything if `muon_learning_rate` is
0. The global gradient norm is clipped before either.

Letters: l stacked layers, i and o input and output width.
"""

import dataclasses
import math
import re
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from sora_jax.core import config as configs
from sora_jax.core import sharding, trees

# The spacing of bfloat16 is 1/128 to 1/256 of a value. An average whose update rate is
# below this would lose most updates to rounding.
_BFLOAT16_RATE = 0.05


_Rate = Annotated[float, configs.Range("[0, 100]")]
_Decay = Annotated[float, configs.Range("[0, 1)")]  # of a moving average


@dataclasses.dataclass(frozen=True)
class Config:
    """The optimizer of a run."""

    learning_rate: _Rate = 1e-3  # of AdamW
    muon_learning_rate: _Rate = 0.0  # of kernels; 0: they use AdamW too
    # Patterns of the names of kernels that use AdamW all the same.
    not_muon: tuple[str, ...] = ()
    # Pattern of parameter names -> factor on both rates; the first match counts.
    learning_rate_factors: tuple[tuple[str, configs.Factor], ...] = ()
    # At most all steps of the run; 0: the first step has the full learning rate.
    warmup_steps: Annotated[int, configs.Range("[0, 2147483647]")] = 50
    final_fraction: configs.Share = 0.05  # of the learning rate, at the last step
    b1: _Decay = 0.9
    b2: _Decay = 0.95
    momentum: _Decay = 0.95  # of Muon
    eps: Annotated[float, configs.Range("(0, 1]")] = 1e-8
    moments: str = "float32"  # type in which moments are stored, or "bfloat16"
    weight_decay: _Rate = 0.0  # of kernels, not of biases, scales and tables
    clip_norm: Annotated[float, configs.Range("(0, 1e12]", 0, "no clipping")] = 1.0
    ema_decay: configs.Share = 0.995  # 0: no averaging

    def __post_init__(self):
        if self.moments not in ("float32", "bfloat16"):
            raise ValueError(f"moments is {self.moments!r}: 'float32' or 'bfloat16'")
        rates = [1 - x for x in (self.b1, self.b2, self.momentum)]
        if self.moments == "bfloat16" and min(rates) < _BFLOAT16_RATE:
            raise ValueError(
                "bfloat16 moments lose changes below one part in 256 to rounding: b1, "
                f"b2 and momentum must be at most {1 - _BFLOAT16_RATE}"
            )
        for entry in self.learning_rate_factors:
            pair = isinstance(entry, tuple) and len(entry) == 2
            if not pair or not isinstance(entry[0], str) or not entry[1] >= 0:
                raise ValueError(
                    "learning_rate_factors must be pairs of a pattern and a factor, "
                    f"such as (('^text_encoder', 0.1),), or (), not {entry!r}"
                )

    def factor(self, name: str) -> float:
        """The factor on the learning rate of a parameter, by its dotted name."""
        for pattern, value in self.learning_rate_factors:
            if re.search(pattern, name):
                return value
        return 1.0


def schedule(config: Config, num_steps: int) -> optax.Schedule:
    """The share of the learning rate by step: linear from 0 to 1, then half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        1.0,
        min(config.warmup_steps, num_steps),
        max(num_steps, config.warmup_steps + 1),
        config.final_fraction,
    )


# The quintic of arXiv 2502.16982; five iterations bring singular values near 1.
_NEWTON_SCHULZ, _NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized: U V^T in place of U S V^T.

    A kernel of two axes is a matrix [i, o], of three a stack of them [l, i, o], of four
    or five a convolution, whose taps count as inputs. Updates are scaled by
    sqrt(max(1, o / i)), so that one learning rate suits all shapes.
    """

    def orthogonal(updates, params):
        del params
        return jax.tree.map(_orthogonal_update, updates)

    return optax.chain(
        optax.trace(momentum, nesterov=True), optax.stateless(orthogonal)
    )


def _orthogonal_update(kernel: jax.Array) -> jax.Array:
    shape, o = kernel.shape, kernel.shape[-1]
    layers = shape[0] if kernel.ndim == 3 else 1
    whole = sharding.replicate(kernel)
    x_lio = whole.reshape(layers, math.prod(shape[:-1]) // layers, o)
    x_lio = sharding.shard_axis(
        x_lio, 0
    )  # every device orthogonalizes some of the layers
    scale = max(1.0, o / x_lio.shape[1]) ** 0.5
    update = sharding.replicate(scale * orthogonalize(x_lio)).reshape(shape)
    return sharding.reshard_like(update, kernel)


def orthogonalize(x_lio: jax.Array) -> jax.Array:
    """Brings all singular values of each matrix near 1 (within about 0.3)."""
    tall = x_lio.shape[1] > x_lio.shape[2]
    x = x_lio.swapaxes(1, 2) if tall else x_lio
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), (1, 2), keepdims=True)) + 1e-8)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(1, 2) if tall else x


def kept_as(
    dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`inner`, computed in float32, with its state stored in another type."""

    def cast(state, to):
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(
        lambda params: cast(inner.init(params), dtype), update
    )


def make(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Builds the optimizer; its state is sharded like the parameters."""

    def is_kernel(params):
        # Not tables: decay would erase rare words and close gates.
        return trees.map_paths(lambda name, _: name.endswith("kernel"), params)

    def algorithm(name, _):
        excluded = any(re.search(pattern, name) for pattern in config.not_muon)
        muon = config.muon_learning_rate and name.endswith("kernel") and not excluded
        return "muon" if muon else "adamw"

    def scale_by_name(updates, state, params=None):
        del params
        scaled = trees.map_paths(
            lambda name, update: update * config.factor(name), updates
        )
        return scaled, state

    muon = optax.chain(
        scale_by_muon(config.momentum), optax.scale(config.muon_learning_rate)
    )
    adam = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.scale(config.learning_rate),
    )
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip if config.clip_norm else optax.identity(),
        kept_as(
            config.moments,
            optax.partition(
                {"muon": muon, "adamw": adam},
                lambda params: trees.map_paths(algorithm, params),
            ),
        ),
        optax.add_decayed_weights(
            config.weight_decay * config.learning_rate, is_kernel
        ),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_by_name),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
    )
