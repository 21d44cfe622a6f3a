"""Moves networks and rows between the host and the current mesh.

Without a mesh everything is on the default device.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from sora_jax.core import sharding


def split(module: nnx.Module):
    """Splits a network into its static definition and arrays sharded over the mesh.

    Raises:
      ValueError: one of its sizes does not divide over the mesh.
    """
    mesh = jax.sharding.get_mesh()
    if not mesh.empty and (sizes := getattr(module.config, "sharded_sizes", None)):
        what = type(module).__name__
        named = {f"{name} of the {what}": size for name, size in sizes.items()}
        sharding.check_divisible(mesh, named)
    graph, state = nnx.split(module)

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if mesh.empty:
            return variable.replace(jnp.asarray(value))
        layout = sharding.parameter_spec(variable.get_metadata("axes"), value.shape)
        return variable.replace(to_device(value, NamedSharding(mesh, layout)))

    placed = jax.tree.map(
        place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return graph, placed


def to_device(value, layout: NamedSharding) -> jax.Array:
    """Shards a whole array, which every process holds or which is on the mesh already."""
    if isinstance(value, jax.Array):
        if jax.process_count() == 1 or not value.is_fully_addressable:
            return jax.device_put(value, layout)
        value = np.asarray(value)
    # Every process copies the shards of its own devices from the whole value.
    return jax.make_array_from_callback(value.shape, layout, lambda part: value[part])


def rows_to_device(x: np.ndarray) -> jax.Array:
    """Shards the first axis of a host array, the clips, over the mesh.

    Rows that do not divide over it are replicated.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(x)
    divides = len(x) % sharding.logical_axis_size(mesh, "batch") == 0
    names = ("batch" if divides else None, *(None,) * (x.ndim - 1))
    return to_device(np.asarray(x), sharding.named_sharding(mesh, *names))


@functools.partial(jax.jit, static_argnames="count")
def first_rows(tree, count: int):
    """Replicates the first rows of sharded arrays."""
    return jax.tree.map(lambda x: sharding.replicate(x)[:count], tree)


@functools.partial(jax.jit, static_argnames="count")
def fill_rows(x: jax.Array, count: int) -> jax.Array:
    """Shards replicated rows, padded to `count` with the last one."""
    filled = x[np.minimum(np.arange(count), len(x) - 1)]
    return sharding.reshard(filled, "batch", *(None,) * (x.ndim - 1))


def check_finite(x: np.ndarray) -> None:
    """Raises FloatingPointError if a result has numbers that are not finite."""
    if not np.isfinite(x).all():
        raise FloatingPointError("the model's weights give numbers that are not finite")


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Gathers the whole array on every process."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def edited(
    callback: Callable[[dict], Mapping | None], x: jax.Array, real: int
) -> jax.Array | None:
    """Passes latents to a user's callback; returns them if it changed them, else None.

    Args:
      callback: takes {"latents": ...}; changes them in place, or returns such a mapping.
      x: the latents.
      real: number of clips that it gets, without the padding of the batch.

    Raises:
      ValueError: it returns latents of another shape.
    """
    shown = to_host(x)
    tensors = {"latents": shown[:real].copy()}
    changed = (callback(tensors) or tensors).get("latents")
    if changed is None:
        return None
    changed = np.asarray(changed, np.float32)
    if changed.shape != shown[:real].shape:
        raise ValueError(
            f"callback_on_step_end returned latents of shape {changed.shape}, "
            f"not {shown[:real].shape}"
        )
    if np.array_equal(changed, shown[:real]):
        return None
    return rows_to_device(np.concatenate([changed, shown[real:]]))
