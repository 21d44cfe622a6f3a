"""Flags of XLA's compilers that jobs set, and why; what the environment has comes first.

On CPUs and GPUs none is set.
"""

import os
from collections.abc import MutableMapping

TPU = {
    # Heads and tokens change places (`models/attention.py`) while something else is
    # computed: in the schedule of Wan 14B's train step on four v5p chips the wait for
    # all exchanges falls by half, and by as much for a row of 16,384 tokens on v5e.
    "xla_tpu_enable_async_all_to_all": "true",
}


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags to what libtpu reads when it is loaded; call it before JAX is used."""
    given = environment.get("LIBTPU_INIT_ARGS", "")
    flags = [f"--{name}={value}" for name, value in TPU.items() if name not in given]
    environment["LIBTPU_INIT_ARGS"] = " ".join([*given.split(), *flags])
