"""Flags of XLA's compilers that jobs set, and why; what the environment has comes first."""

import os
from collections.abc import Mapping, MutableMapping

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

# Flags of the compiler for CPUs, where a clip's numbers should not depend on how many
# clips are computed at a time.
ANY_BATCH = {
    # YNNPACK picks its kernels by the number of rows, and they add in other orders: on an
    # AVX-512 CPU one 8-bit pixel in 200,000 differed between batches. Without it (the
    # value is the list of what it computes) the toy's clips are equal to the last bit;
    # sums of 384 and more numbers need not be. It costs a tenth of a denoiser's step at
    # the toy's size, a quarter at 2,040 tokens.
    "xla_cpu_experimental_ynn_fusion_type": "",
}


def set_defaults(
    profile: str = "default",
    environment: MutableMapping[str, str] = os.environ,
    any_batch: bool = False,
) -> None:
    """Adds the flags to what compilers read once, at first use; call it before that.

    Args:
      profile: one of `PROFILES`.
      environment: the process's.
      any_batch: adds `ANY_BATCH`, but not where XLA_FLAGS names a file of flags.
    """
    _add(environment, "LIBTPU_INIT_ARGS", PROFILES[profile])
    given = environment.get("XLA_FLAGS", "").strip()
    if any_batch and (not given or given.startswith("-")):
        _add(environment, "XLA_FLAGS", ANY_BATCH)


def _add(
    environment: MutableMapping[str, str], variable: str, flags: Mapping[str, str]
) -> None:
    """Appends flags that the variable does not name yet."""
    given = environment.get(variable, "").split()
    known = {flag.lstrip("-").partition("=")[0] for flag in given}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in known]
    environment[variable] = " ".join([*given, *added])
