"""Flags of XLA's compilers that jobs set, and why. Those of the environment win."""

import os
from collections.abc import Mapping, MutableMapping

_TPU = {
    # The all-to-alls of attention (`models/attention.py`) overlap with computation: in the
    # schedule of Wan 14B's train step on four v5p chips the wait for them halves, and as
    # much for a row of 16,384 tokens on v5e.
    "xla_tpu_enable_async_all_to_all": "true",
    # Weights are cast block by block, where they are used (`layers.Linear`), not all of
    # them up front: that copy would take 2 bytes a parameter, 5.7 GiB a device for Wan 14B
    # on four v5p chips, and save no time.
    "xla_jf_bf16_propagation": "false",
}
# Flags of the TPU compiler by the value of `--xla_profile`.
PROFILES = {
    "default": _TPU,
    # The SparseCores of v5p, v6e and tpu7x reduce-scatter the gradients while the
    # TensorCores compute. In the schedule of the same step nothing then waits for them.
    # Others have measured it on tpu7x. Older versions of libtpu refuse the flag.
    "sparse_core": _TPU
    | {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true"},
}

# Flags of the CPU compiler where a clip's numbers must not depend on the batch size.
ANY_BATCH = {
    # YNNPACK chooses kernels by the number of rows, and their summation order differs: on
    # an AVX-512 CPU one 8-bit pixel in 200,000 differed between batches. With it off (the
    # value is the list of operations that it takes) the toy's clips are equal to the last
    # bit; sums of 384 and more numbers need not be. A denoiser's step takes a tenth longer
    # at the toy's size, a quarter at 2,040 tokens.
    "xla_cpu_experimental_ynn_fusion_type": "",
}


def set_defaults(
    profile: str = "default",
    environment: MutableMapping[str, str] = os.environ,
    any_batch: bool = False,
) -> None:
    """Adds the flags to the environment. XLA reads it once, so call this before JAX runs.

    Args:
      profile: one of `PROFILES`.
      environment: the environment variables.
      any_batch: whether to add `ANY_BATCH`, unless XLA_FLAGS names a file of flags.
    """
    _add(environment, "LIBTPU_INIT_ARGS", PROFILES[profile])
    present = environment.get("XLA_FLAGS", "").strip()
    if any_batch and (not present or present.startswith("-")):
        _add(environment, "XLA_FLAGS", ANY_BATCH)


def _add(
    environment: MutableMapping[str, str], variable: str, flags: Mapping[str, str]
) -> None:
    """Appends the flags that the variable does not set yet."""
    present = environment.get(variable, "").split()
    known = {flag.lstrip("-").partition("=")[0] for flag in present}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in known]
    environment[variable] = " ".join([*present, *added])
