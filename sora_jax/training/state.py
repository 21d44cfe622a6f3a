"""What a training run carries from step to step, and how networks become plain trees.

Networks are nnx modules; they are split once into a definition without arrays and a
plain nested dict of parameters. Everything after that is pure functions of dicts.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sora_jax.core import rng, sharding, trees
from sora_jax.models import layers, lora

Params = dict
Modules = dict[str, nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries; positions and randomness follow from `step`.

    params, ema: nested dicts by network, float32. opt_state: the optimizer's. step: how
    many steps were taken, int32. skipped: how many of them were not finite and left
    the parameters unchanged; skipped_in_a_row: the latest run of such steps. fixed: the
    parameters of networks that are used but not trained; not part of checkpoints.
    """

    params: Params
    ema: Params
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    fixed: Params = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Networks:
    """Networks without arrays: `bind` puts parameters in, `init` makes them.

    Parameters are nested dicts by network. Those of adapters (models/lora.py) are apart
    from those of their network, as {"lora": {network: ...}}, since they are trained and
    saved without it.

    Args:
      make: builds the modules from `nnx.Rngs`; run only under tracing.
    """

    make: Callable[[nnx.Rngs], Modules]

    def _split(self, modules: Modules):
        """Of each network: its definition, its adapters, its other parameters."""
        kinds = layers.AdapterParam, nnx.Param
        return {name: nnx.split(module, *kinds) for name, module in modules.items()}

    def _abstract(self):
        # Built without arrays; the definitions hold names, shapes and metadata.
        return self._split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))

    def bind(self, params: Params) -> Modules:
        """Returns modules that compute with `params` (arrays or tracers)."""
        modules = {}
        for name, (graph, adapters, state) in self._abstract().items():
            nnx.replace_by_pure_dict(state, params[name])
            if adapters:
                nnx.replace_by_pure_dict(adapters, params[lora.PART][name])
            modules[name] = nnx.merge(graph, adapters, state)
        return modules

    def abstract(self) -> Params:
        """Shapes and dtypes of all parameters, as `jax.ShapeDtypeStruct`."""
        return _by_network(self._abstract())

    def partitions(self) -> Params:
        """The layout of every parameter, from the logical names of its axes."""

        def one(variable) -> PartitionSpec:
            shape = variable.get_value().shape
            return sharding.parameter_spec(variable.get_metadata("axes"), shape)

        def of_all(state):
            is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
            return jax.tree.map(one, state, is_leaf=is_variable)

        return _by_network(
            {
                name: (graph, of_all(adapters), of_all(state))
                for name, (graph, adapters, state) in self._abstract().items()
            }
        )

    def layouts(self) -> Params:
        """The sharding of every parameter on the current mesh, or on one device."""
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            one = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda _: one, self.partitions())
        return jax.tree.map(lambda p: NamedSharding(mesh, p), self.partitions())

    def init(self, key: jax.Array) -> Params:
        """Makes parameters in their layout; call it under `jax.jit`."""
        modules = self.make(nnx.Rngs(params=key))
        return _place(_by_network(self._split(modules)), self.partitions())


def _by_network(split: Mapping) -> Params:
    params = {name: nnx.to_pure_dict(state) for name, (_, _, state) in split.items()}
    adapters = {name: nnx.to_pure_dict(a) for name, (_, a, _) in split.items() if a}
    return params | {lora.PART: adapters} if adapters else params


def _place(params: Params, layouts: Params) -> Params:
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(jax.reshard, params, layouts)


def gather(params: Params) -> Params:
    """Unsharded numpy arrays of parameters on a mesh; every process calls it."""
    whole = jax.jit(functools.partial(jax.tree.map, sharding.replicate))(params)
    return jax.device_get(whole)


def init(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    initial: Mapping[str, Params],
    fixed: Collection[str] = (),
) -> TrainState:
    """Makes the state of step 0; call it under `jax.jit`.

    Args:
      networks: all of them, trained and fixed.
      optimizer: its state covers the trained networks.
      key: of random parameters.
      initial: parameters by network that replace random ones, in any type; parts that
        it lacks are random.
      fixed: names of the networks that are not trained; the caller puts their
        parameters into the state.
    """
    random_params = networks.init(key)  # XLA drops what is not used of it
    initial = trees.flatten(initial)
    layouts = trees.flatten(networks.partitions())

    def one(name, random):
        if name not in initial:
            return random
        return _place(initial[name].astype(jnp.float32), layouts[name])

    trained = {name: p for name, p in random_params.items() if name not in fixed}
    params = trees.map_paths(one, trained)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        step=zero,
        skipped=zero,
        skipped_in_a_row=zero,
    )


def make_init(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    seed: int,
    fixed: Collection[str] = (),
) -> Callable[[Mapping[str, Params]], TrainState]:
    """Builds `init` as a function of the initial parameters; the caller jits it."""

    def make_state(initial):
        return init(networks, optimizer, rng.key(seed, "init"), initial, fixed)

    return make_state


def update_ema(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """Moves the exponential moving average one step towards the parameters.

    ema + (1 - d) (params - ema), where d = min(decay, (1 + step) / (10 + step)), so that
    the average of a short run is not dominated by its initial values.
    """
    step = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + rate * (p - a), ema, params)


def count(params: Mapping) -> int:
    """The number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
