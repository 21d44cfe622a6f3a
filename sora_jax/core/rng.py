"""Random keys that depend on names, not on history.

A key is a pure function of (seed, stream name, indices): checkpoints contain no generator
state, a restart draws the same noise, and since JAX's threefry generator is partitionable
the values do not depend on the mesh.
"""

import hashlib

import jax
import numpy as np

SEEDS = 2**64  # seeds are below this


def key(seed: int, stream: str, *indices: int | jax.Array) -> jax.Array:
    """Returns the typed key of one named stream.

    Args:
      seed: the run's root seed, in [0, 2^64). All are distinct, while JAX itself takes
        seeds modulo 2^32 where 64-bit numbers are off. Below 2^32 both agree.
      stream: what the numbers are for, such as "noise"; hashed with SHA-256, so the
        result is the same in every process and Python version.
      *indices: integers folded in one after the other, such as the step and the row;
        they may be traced.

    Raises:
      ValueError: the seed is out of range.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"a seed is a whole number in [0, 2^64), not {seed}")
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
    words = np.uint32([int(seed) >> 32, int(seed) % 2**32])
    root = jax.random.wrap_key_data(words, impl="threefry2x32")
    result = jax.random.fold_in(root, name)
    for index in indices:
        result = jax.random.fold_in(result, index)
    return result
