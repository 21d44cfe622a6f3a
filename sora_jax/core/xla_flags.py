"""Flags of XLA's compilers that jobs set, and why; what the environment has comes first.

On CPUs and GPUs none is set.
"""

import os
from collections.abc import MutableMapping

_TPU = {
    # Heads and tokens change places (`models/attention.py`) while something else is
    # computed: in the schedule of Wan 14B's train step on four v5p chips the wait for
    # all exchanges falls by half, and by as much for a row of 16,384 tokens on v5e.
    "xla_tpu_enable_async_all_to_all": "true",
    # Weights are rounded block by block, as they are used (`layers.Linear`), and not all
    # of them before the first: that copy takes 2 bytes a parameter of a split state, 5.7
    # GiB a device of Wan 14B on four v5p chips, and saves no time.
    "xla_jf_bf16_propagation": "false",
}
# By what `--xla_profile` calls them: flags of the compiler for TPUs.
PROFILES = {
    "default": _TPU,
    # Gradients are summed and split by the SparseCores, which v5p, v6e and tpu7x have,
    # while the others compute. In the schedule of the same step they then wait for
    # nothing. Others have measured it on tpu7x; older versions of libtpu do not know
    # the flag and would not start.
    "sparse_core": _TPU
    | {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true"},
}


def set_defaults(
    profile: str = "default", environment: MutableMapping[str, str] = os.environ
) -> None:
    """Adds the flags to what libtpu reads when it is loaded; call it before JAX is used.

    Args:
      profile: one of `PROFILES`.
      environment: the process's.
    """
    given = environment.get("LIBTPU_INIT_ARGS", "").split()
    known = {flag.lstrip("-").partition("=")[0] for flag in given}
    flags = PROFILES[profile].items()
    added = [f"--{name}={value}" for name, value in flags if name not in known]
    environment["LIBTPU_INIT_ARGS"] = " ".join([*given, *added])
