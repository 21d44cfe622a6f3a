"""Random keys that depend on names, not on history.

A key is a pure function of (seed, stream name, indices): no generator state is kept
in checkpoints, a restart draws the same noise, and because JAX's threefry generator
is partitionable the drawn values do not depend on the mesh.
"""

import hashlib

import jax


def key(seed: int, stream: str, *indices: int | jax.Array) -> jax.Array:
    """Returns the typed key of one named stream.

    Args:
      seed: the run's root seed.
      stream: what the numbers are for, such as "noise"; hashed with SHA-256, so the
        result is the same in every process and Python version.
      *indices: integers folded in one after the other, such as the step and the row;
        they may be traced.
    """
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
    result = jax.random.fold_in(jax.random.key(seed), name)
    for index in indices:
        result = jax.random.fold_in(result, index)
    return result
