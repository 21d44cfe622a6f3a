"""Logical axis names, and the one mapping from them to mesh axes.

What used to be called pjit is `jax.jit` with shardings in today's JAX. The mesh is of
explicit type: every array knows its layout while the program is traced, and an
operation whose layout is not obvious must say what it wants. The model does so with
the names below; this file turns them into mesh axes.

  batch    rows of the global batch                (replica, fsdp)
  tokens   spacetime patches of a row              (ring, ulysses)
  heads    attention heads, or their channels      tensor
  mlp      hidden units of the feed-forward part   tensor
  embed    model width, of weights only            (fsdp, ring, ulysses)
  layers   stacked blocks                          not split
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


def partition(*names: str | None) -> PartitionSpec:
    """Returns the mesh axes of logical axes, whether or not a mesh is set.

    Raises:
      ValueError: a name is unknown, or a mesh axis would be used twice.
    """
    entries, used = [], set()
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} is unknown; there are {[*RULES]}")
        axes = RULES[name] if name else ()
        if used & set(axes):
            raise ValueError(
                f"axes {names} would use mesh axes {used & set(axes)} twice"
            )
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def of_parameter(axes: tuple[str | None, ...], shape: Sequence[int]) -> PartitionSpec:
    """Returns the mesh axes of a parameter; in front of its own axes it is stacked.

    A dimension that does not divide over the mesh that is set stays whole (the small
    ones of a video VAE); training checks those that matter (`check_divisible`).
    """
    layout = partition(*("layers",) * (len(shape) - len(axes)), *axes)
    if not _has_mesh():
        return layout
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(
        *(
            entry if size % shards(mesh, entry) == 0 else None
            for entry, size in zip(layout, shape, strict=True)
        )
    )


def names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a layout."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def shards(mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many shards a dimension is split by its entry of a layout."""
    return math.prod(mesh.shape[axis] for axis in names(axes))


def ways(mesh: jax.sharding.Mesh, name: str) -> int:
    """Into how many shards the mesh splits a logical axis."""
    return shards(mesh, RULES[name])


def filled(size: int, name: str) -> int:
    """The next size that divides over a logical axis of the mesh that is set, if any."""
    if not _has_mesh():
        return size
    count = ways(jax.sharding.get_abstract_mesh(), name)
    return -(-size // count) * count


def spec(*names: str | None) -> PartitionSpec | None:
    """Returns the layout to hand to `out_sharding=`; None where no mesh is set."""
    return partition(*names) if _has_mesh() else None


def follow(x: jax.Array, *last: str | None) -> PartitionSpec | None:
    """Returns the layout of `x` with its last axes replaced by the named ones."""
    if not _has_mesh():
        return None
    kept = list(jax.typeof(x).sharding.spec)[: x.ndim - len(last)]
    return PartitionSpec(*kept, *partition(*last))


def pieces(x: jax.Array, dimensions: Iterable[int]) -> int:
    """Into how many pieces the layout of `x` splits these dimensions together."""
    if not _has_mesh():
        return 1
    mesh, layout = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.spec
    return math.prod(shards(mesh, layout[dimension]) for dimension in dimensions)


def is_split(x: jax.Array, dimensions: Iterable[int]) -> bool:
    """Whether any of these dimensions of `x` lies on more than one device."""
    return pieces(x, dimensions) > 1


def ends(x: jax.Array | PartitionSpec | None) -> PartitionSpec | None:
    """The layout of two axes: the first and the last of an array or a layout."""
    if x is None or not _has_mesh():
        return None
    layout = x if isinstance(x, PartitionSpec) else jax.typeof(x).sharding.spec
    return PartitionSpec(layout[0], layout[-1])


def reshard(x: jax.Array, *names: str | None) -> jax.Array:
    """Moves `x` to the named layout; nothing where no mesh is set."""
    return jax.reshard(x, partition(*names)) if _has_mesh() else x


def gather_axis(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Gives `x` the layout of `like`, but for one axis that becomes whole."""
    if not _has_mesh():
        return x
    layout = list(jax.typeof(like).sharding.spec)
    layout[axis] = None
    return jax.reshard(x, PartitionSpec(*layout))


def replicate(x: jax.Array) -> jax.Array:
    """Copies `x` whole to every device."""
    return reshard(x, *(None,) * x.ndim)


def spread(x: jax.Array, axis: int) -> jax.Array:
    """Splits one axis of a whole array over as many mesh axes as divide it."""
    if not _has_mesh():
        return x
    taken, left = [], x.shape[axis]
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        if size > 1 and left % size == 0:
            taken.append(name)
            left //= size
    layout = [None] * x.ndim
    layout[axis] = tuple(taken) or None
    return jax.reshard(x, PartitionSpec(*layout))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Moves `x` to the layout of an array of the same shape."""
    return jax.reshard(x, jax.typeof(other).sharding.spec) if _has_mesh() else x


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Undoes the split of a weight's width just before it is used.

    The gradient of this move is the reduce-scatter that returns it to its owners.
    """
    return reshard(weight, *(None if axis == "embed" else axis for axis in axes))


def process_rows(
    mesh: jax.sharding.Mesh, process: int | None = None
) -> tuple[int, int]:
    """Which part of a batch a process holds, of how many equal ones: (index, count).

    Processes that share rows, since only tokens or widths are split between them, have
    the same part.

    Raises:
      ValueError: the rows of a process are not one such part.
    """
    process = jax.process_index() if process is None else process
    count = ways(mesh, "batch")
    layout = named(mesh, "batch").devices_indices_map((count,))
    held = {
        rows.start or 0
        for device, (rows,) in layout.items()
        if device.process_index == process
    }
    first, size = min(held), len(held)
    if max(held) - first + 1 != size or first % size or count % size:
        raise ValueError(
            f"process {process} holds the parts {sorted(held)} of a batch in {count}; "
            "choose mesh axes for which they are neighbours"
        )
    return first // size, count // size


def named(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """Returns a sharding that device_put and jit take."""
    return NamedSharding(mesh, partition(*names))


def check_divisible(mesh: jax.sharding.Mesh, sizes: dict[str, tuple[str, int]]) -> None:
    """Checks that every dimension divides over its mesh axes.

    Args:
      mesh: the mesh.
      sizes: what the dimension is called to the user -> (logical axis, size).

    Raises:
      ValueError: naming the dimension, its size and the mesh axes.
    """
    for label, (name, size) in sizes.items():
        count = ways(mesh, name)
        if size % count:
            raise ValueError(
                f"{label} is {size}, which does not divide over the {count} shards of "
                f"mesh axes {RULES[name]}"
            )
