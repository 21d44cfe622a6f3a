"""Logical axis names, and the one mapping from them to mesh axes.

What used to be called pjit is `jax.jit` with shardings in today's JAX. The mesh axes are
of explicit type: the sharding of every array is known while a program is traced, and an
operation whose output sharding is ambiguous must state it. The models state it with the
names below, which this file turns into mesh axes.

  batch    rows of the global batch                (replica, fsdp)
  tokens   spacetime patches of a row              (ring, ulysses)
  heads    attention heads, or their channels      tensor
  mlp      hidden units of the feed-forward part   tensor
  embed    model width, of weights only            (fsdp, ring, ulysses)
  layers   stacked blocks                          not sharded
"""

import math
from collections.abc import Iterable, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "tokens": ("ring", "ulysses"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "ring", "ulysses"),
    "layers": (),
}


def _has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def partition_spec(*names: str | None) -> PartitionSpec:
    """Returns the spec of logical axes, whether or not a mesh is set.

    Raises:
      ValueError: a name is unknown, or a mesh axis would be used twice.
    """
    entries, used = [], set()
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(
                f"logical axis {name!r} is unknown; choose from {[*RULES]}"
            )
        axes = RULES[name] if name else ()
        if used & set(axes):
            raise ValueError(
                f"axes {names} would use mesh axes {used & set(axes)} twice"
            )
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def parameter_spec(axes: tuple[str | None, ...], shape: Sequence[int]) -> PartitionSpec:
    """Returns the spec of a parameter; dimensions in front of its `axes` are stacked layers.

    A dimension that does not divide over the current mesh is not sharded (the small ones
    of a video VAE); training checks those that matter (`check_divisible`).
    """
    spec = partition_spec(*("layers",) * (len(shape) - len(axes)), *axes)
    if not _has_mesh():
        return spec
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(
        *(
            entry if size % num_shards(mesh, entry) == 0 else None
            for entry, size in zip(spec, shape, strict=True)
        )
    )


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def num_shards(mesh, entry: str | tuple[str, ...] | None) -> int:
    """Returns how many shards a dimension with this entry of a PartitionSpec has."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(entry))


def logical_axis_size(mesh: jax.sharding.Mesh, name: str) -> int:
    """Returns how many shards a logical axis has on the mesh."""
    return num_shards(mesh, RULES[name])


def padded_size(size: int, name: str) -> int:
    """Rounds `size` up to a multiple of the shards of a logical axis on the current mesh."""
    if not _has_mesh():
        return size
    count = logical_axis_size(jax.sharding.get_abstract_mesh(), name)
    return -(-size // count) * count


def out_sharding(*names: str | None) -> PartitionSpec | None:
    """Returns the spec for `out_sharding=`; None where no mesh is set."""
    return partition_spec(*names) if _has_mesh() else None


def spec_like(x: jax.Array, *last: str | None) -> PartitionSpec | None:
    """Returns the spec of `x` with its last axes replaced; None where no mesh is set."""
    if not _has_mesh():
        return None
    kept = list(jax.typeof(x).sharding.spec)[: x.ndim - len(last)]
    return PartitionSpec(*kept, *partition_spec(*last))


def flattened_spec(x: jax.Array | PartitionSpec | None) -> PartitionSpec | None:
    """Returns the spec of `x` reshaped to [-1, last], where only its ends are sharded."""
    if x is None or not _has_mesh():
        return None
    spec = x if isinstance(x, PartitionSpec) else jax.typeof(x).sharding.spec
    return PartitionSpec(spec[0], spec[-1])


def array_shards(x: jax.Array, dimensions: Iterable[int]) -> int:
    """Returns into how many shards these dimensions of `x` are split together."""
    if not _has_mesh():
        return 1
    mesh, spec = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.spec
    return math.prod(num_shards(mesh, spec[dimension]) for dimension in dimensions)


def is_sharded(x: jax.Array, dimensions: Iterable[int]) -> bool:
    """Returns whether any of these dimensions of `x` is split over devices."""
    return array_shards(x, dimensions) > 1


def reshard(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshards `x` to logical axes; does nothing where no mesh is set."""
    return jax.reshard(x, partition_spec(*names)) if _has_mesh() else x


def reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Reshards `x` as an array of the same shape is sharded."""
    return jax.reshard(x, jax.typeof(other).sharding.spec) if _has_mesh() else x


def gather_axis(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Reshards `x` like another array, except for one axis that is gathered."""
    if not _has_mesh():
        return x
    spec = list(jax.typeof(like).sharding.spec)
    spec[axis] = None
    return jax.reshard(x, PartitionSpec(*spec))


def replicate(x: jax.Array) -> jax.Array:
    """Copies all of `x` to every device."""
    return reshard(x, *(None,) * x.ndim)


def shard_axis(x: jax.Array, axis: int) -> jax.Array:
    """Shards one axis of a replicated array over as many mesh axes as divide it."""
    if not _has_mesh():
        return x
    taken, left = [], x.shape[axis]
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        if size > 1 and left % size == 0:
            taken.append(name)
            left //= size
    spec = [None] * x.ndim
    spec[axis] = tuple(taken) or None
    return jax.reshard(x, PartitionSpec(*spec))


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """All-gathers the width of a weight just before it is used, as FSDP does.

    The gradient of this is a reduce-scatter.
    """
    return reshard(weight, *(None if axis == "embed" else axis for axis in axes))


def process_rows(
    mesh: jax.sharding.Mesh, process: int | None = None
) -> tuple[int, int]:
    """Returns which of how many equal parts of the batch a process holds: (index, count).

    Processes that share rows, because only tokens or widths are split between them, have
    the same part.

    Raises:
      ValueError: the rows of a process are not one such part.
    """
    process = jax.process_index() if process is None else process
    count = logical_axis_size(mesh, "batch")
    indices = named_sharding(mesh, "batch").devices_indices_map((count,))
    shards = {
        rows.start or 0
        for device, (rows,) in indices.items()
        if device.process_index == process
    }
    first, size = min(shards), len(shards)
    if max(shards) - first + 1 != size or first % size or count % size:
        raise ValueError(
            f"process {process} holds the batch shards {sorted(shards)} of {count}, which "
            "are not adjacent; choose another mesh"
        )
    return first // size, count // size


def named_sharding(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """Returns the NamedSharding of logical axes, for `device_put` and `jit`."""
    return NamedSharding(mesh, partition_spec(*names))


def check_divisible(mesh: jax.sharding.Mesh, sizes: dict[str, tuple[str, int]]) -> None:
    """Checks that every dimension divides over its mesh axes.

    Args:
      mesh: the mesh.
      sizes: the user's name of the dimension -> (logical axis, size).

    Raises:
      ValueError: naming the dimension, its size and the mesh axes.
    """
    for label, (name, size) in sizes.items():
        count = logical_axis_size(mesh, name)
        if size % count:
            raise ValueError(
                f"{label} is {size}, which does not divide over the {count} shards of "
                f"mesh axes {RULES[name]}"
            )
