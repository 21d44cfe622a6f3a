"""Devices: initializing the processes of a job, and the mesh.

The mesh always has the same five axes, of explicit type, size 1 when unused, so that no
code asks whether an axis exists:

  replica   data parallel across slices; parameters are replicated
  fsdp      data parallel inside a slice; parameters and optimizer state are sharded
  ring      context parallel: neighbours send keys and values around a ring
  ulysses   context parallel: an all-to-all exchanges tokens for heads
  tensor    tensor parallel: heads and hidden units of a layer are sharded

Parameters and optimizer state are sharded over `ring` and `ulysses` as well.
"""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils, topologies

AXES = ("replica", "fsdp", "ring", "ulysses", "tensor")

# A job scheduler that starts several processes sets one of these; JAX then finds the
# coordinator by itself.
_SCHEDULERS = {
    "SLURM_NTASKS": lambda value: int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,
}


def initialize() -> None:
    """Initializes jax.distributed where the job has several processes.

    Reads `SORA_COORDINATOR` (host:port), `SORA_NUM_PROCESSES` and `SORA_PROCESS_ID`;
    without them it follows a scheduler that JAX knows (TPU pods, Slurm, Open MPI), and on
    a single machine it does nothing. Call it before any other use of JAX.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = os.environ.get("SORA_COORDINATOR")
    if coordinator:
        missing = [
            name
            for name in ("SORA_NUM_PROCESSES", "SORA_PROCESS_ID")
            if not os.environ.get(name, "").isdigit()
        ]
        if missing:
            raise ValueError(
                f"SORA_COORDINATOR is set, so {' and '.join(missing)} must be set to "
                "whole numbers as well"
            )
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=int(os.environ["SORA_NUM_PROCESSES"]),
            process_id=int(os.environ["SORA_PROCESS_ID"]),
        )
        return
    for name, several in _SCHEDULERS.items():
        if os.environ.get(name) and several(os.environ[name]):
            jax.distributed.initialize()
            return


def parse(text: str) -> dict[str, int]:
    """Reads the mesh shape of a flag, such as "fsdp=4,tensor=2".

    Raises:
      ValueError: the text has another format.
    """
    shape = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh is like fsdp=4,tensor=2, not {text!r}")
        shape[axis.strip()] = int(size)
    return shape


def make_mesh(
    shape: Mapping[str, int] | None = None, devices: Sequence | None = None
) -> jax.sharding.Mesh:
    """Builds the mesh.

    Args:
      shape: size by axis name. An axis that is not named has size 1, and one axis may
        be -1, for all devices that are left. By default all devices are on `fsdp`.
      devices: the devices to use, all of the job's by default.

    Raises:
      ValueError: an axis name is unknown or the sizes do not multiply to the number of
        devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = dict(shape or {"fsdp": -1})
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; choose from {list(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh {shape}: sizes must be positive, and at most one of them -1"
        )
    product = 1
    for size in sizes:
        product *= 1 if size == -1 else size
    if -1 in sizes and len(devices) % product == 0:
        sizes[sizes.index(-1)] = len(devices) // product
        product = len(devices)
    if product != len(devices):
        raise ValueError(
            f"mesh {shape} has room for {product} devices, but there are {len(devices)}"
        )
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.sharding.Mesh(_placed(sizes, devices), AXES, axis_types=explicit)


def _placed(sizes: list[int], devices: Sequence) -> np.ndarray:
    """Arranges devices so that neighbours on a mesh axis are neighbours in the topology.

    A mesh axis may take part of a physical one, such as 8 devices of a 4 x 4. Only
    `replica` spans slices: the network between them is slow.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(
            f"the mesh spans {slices} slices, and replica is {sizes[0]}: it must be a "
            f"multiple of {slices}, since only replica spans slices"
        )
    within = (sizes[0] // slices, *sizes[1:])
    try:
        if slices > 1:
            return mesh_utils.create_hybrid_device_mesh(
                within,
                (slices, *(1,) * len(sizes[1:])),
                devices,
                allow_split_physical_axes=True,
            )
        return mesh_utils.create_device_mesh(
            within, devices, allow_split_physical_axes=True
        )
    except NotImplementedError as error:
        raise ValueError(
            f"the mesh {dict(zip(AXES, sizes, strict=True))} does not fit the slice's "
            f"topology: {error}"
        ) from None


def compile_only(topology: str, num_slices: int = 1) -> list:
    """Returns the devices of a TPU slice, to compile for without a TPU.

    Needs libtpu, XLA's compiler for TPUs: the package `libtpu`
    (launch/requirements/tpu.txt), or the file that `TPU_LIBRARY_PATH` names.

    Args:
      topology: such as "v5e:2x2" or "v5p:2x2x1".
      num_slices: number of slices, connected by a data-centre network.

    Raises:
      ValueError: there is no libtpu, or it does not know the topology.
    """
    # Otherwise libtpu queries Google's metadata server for the machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # libtpu's lock keeps two processes off one chip; here no chip is used.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        slices = {"num_slices": num_slices} if num_slices > 1 else {}
        description = topologies.get_topology_desc(topology, platform="tpu", **slices)
    except (RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot compile for {topology} ({reason}): install the package libtpu or set "
            "TPU_LIBRARY_PATH, and give a topology such as v5e:2x2"
        ) from None
    return list(description.devices)


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_text(text: str) -> str:
    """Returns the text of the first process in all of them."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(own))))
    padded = np.zeros(size, np.uint8)
    padded[: len(own)] = own[:size]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()
