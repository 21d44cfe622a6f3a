"""Data of TPU devices, and the rates that programs reach: all constants of estimates.

A device is what JAX calls one: a chip, except for tpu7x, where it is a core, half a chip.

Sources, by field:
  peak, memory, bandwidth of v5e, v5p, v6e and tpu7x: docs.cloud.google.com/tpu/docs/v5e,
    /v5p, /v6e and /tpu7x (tpu7x: 2307 TFLOP/s, 192 GiB and 7380 GB/s a chip).
  hbm: the limit of XLA's TPU compiler for a program.
  clock: follows from peak and the number of multipliers in jax-ml.github.io/
    scaling-book/tpus; at this clock, XLA's cycles for large products are 70 to 90 % of
    peak.
  link, network, host: from the same chapter, bytes per second in one direction of a
    link, out of a chip's share of its host, and over PCIe. For tpu7x, the page above
    gives 1200 GB/s per chip over six links in both directions.
  vector: lanes of 8 x 128 with 4 units each per core, from the same chapter; a v5p has
    two cores. XLA's cycles for long chains of elementwise operations agree with that.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a generation.

    Attributes:
      peak: bf16 FLOP/s.
      clock: cycles/s of XLA's estimates.
      hbm: bytes that a program may use.
      bandwidth: of the HBM, bytes/s.
      link: bytes/s over one link in one direction.
      network: bytes/s to other slices.
      host: bytes/s to the host's memory.
      cores: that share a kernel's tiles.
    """

    peak: float
    clock: float
    hbm: float
    bandwidth: float
    link: float
    network: float
    host: float
    cores: int

    @property
    def vector(self) -> float:
        """Elementwise operations/s."""
        return self.cores * _LANES * self.clock


_LANES = 8 * 128 * 4  # of a core
CHIPS = {
    "v5e": Chip(197e12, 1.5e9, 15.75 * GIB, 819e9, 45e9, 3.1e9, 15e9, 1),
    "v5p": Chip(459e12, 1.75e9, 95.74 * GIB, 2765e9, 90e9, 6.2e9, 15e9, 2),
    "v6e": Chip(918e12, 1.75e9, 31.25 * GIB, 1640e9, 90e9, 12.5e9, 15e9, 1),
    "tpu7x": Chip(1153.5e12, 2.2e9, 94.75 * GIB, 3690e9, 50e9, 6.2e9, 15e9, 1),
}


@dataclasses.dataclass(frozen=True)
class Reached:
    """The rates that programs reach: the one table behind every estimate.

    The first four come from published measurements of 8192^3 bf16 products (v6e 827
    TFLOP/s, tpu7x 956 per core) and of copies (v6e 1.36 TB/s, tpu7x 3.21 per core):
    GitHub, AI-Hypercomputer/tpu-recipes, microbenchmarks. `vector` is counted in the
    source of JAX's splash attention: two for the mask, a maximum or a product, one or two
    differences, two for the exponential as XLA counts it, a sum and a cast. The last two
    solve two equations: a published ratio of two tile sizes, and the one published
    training step (`calibration.fit`). `python -m experiments.calibrate_preflight` prints
    all of them.

    Attributes:
      peak: share of `Chip.peak` in the products of a kernel.
      bandwidth: share of `Chip.bandwidth`.
      xla_products, xla_moves: actual time of operations, relative to XLA's estimate in
        cycles; of matrix products, and of all others.
      vector: elementwise operations of an attention kernel per score, forward or
        backward, in addition to its products.
      kernels: share of these rates that attention kernels reach.
      tile: seconds of a core between two tiles of a kernel.
    """

    peak: float
    bandwidth: float
    xla_products: float
    xla_moves: float
    vector: float
    kernels: float
    tile: float


REACHED = Reached(0.865, 0.85, 0.876, 0.46, 8.0, 0.807, 0.286e-6)


def kind_of(device) -> str:
    """The name of a device's kind in `CHIPS`.

    Raises:
      ValueError: the kind is not in it.
    """
    kind = device.device_kind.lower().replace("tpu ", "").replace(" lite", "e")
    kind = {"v6elite": "v6e", "7x": "tpu7x", "v5": "v5p"}.get(kind, kind)
    if kind not in CHIPS:
        raise ValueError(f"the memory of {device.device_kind!r} is not known")
    return kind
