"""Estimates the time of a compiled program on a device.

A TPU program lists its operations in the order of execution, so a clock that walks
through them knows which of them overlap.

  products XLA's estimated cycles of matrix products, over the clock rate, corrected.
  moves    the same for all other operations; an operation without cycles moves its
           result through memory twice, once in and once out.
  kernels  XLA gives no cycles for them. Attention kernels compute 2 (forward) or 5
           (gradient) products of 2 n m e FLOPs per head and n m scores, tile by tile;
           products and elementwise operations do not overlap:
           (FLOPs / peak + scores x operations / vector rate) / reached + tiles x s.
  links    a ring over n devices, each of which sends in both directions. With W the
           bytes/s of two links and s the bytes of the result: (n - 1) / n s / W for
           all-gather and reduce-scatter (of the whole), twice that for all-reduce,
           n / 4 s / W for all-to-all (the mean distance is a quarter of the ring),
           2 s / W for collective-permute (one direction). Across slices, W is that of
           the network.
  host     bytes over PCIe.

An asynchronous operation overlaps with the operations between its start and its end; the
end waits only for the rest of it. Transfers over the same links run one after another. A
collective on another core of the chip ("call-start", -update, -done) starts when it gets
its operand, and is assumed to be limited by the links.
"""

import dataclasses
import math
import re

from sora_jax.forecast import hlo
from sora_jax.forecast.chips import Chip, Reached

# Products of 2 n m e FLOPs in a kernel, by what its name contains.
PRODUCTS = {"_fwd": 2, "_dkv": 5}
_KERNEL = 'custom_call_target="tpu_custom_call"'
_HOST = "S(5)"  # XLA's memory space of the host
_CONTEXT = 64  # most bytes of the context that a transfer carries beside its arrays
_FUSED_END = "async-collective-done"
_FREE = {
    "get-tuple-element",
    "bitcast",
    "constant",
    "parameter",
    "tuple",
    "partition-id",
    "after-all",
    "iota",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a program on a device, with the trips of loops.

    Attributes:
      products, moves: XLA's cycles.
      memory: bytes through memory of operations without cycles.
      flops, scores, tiles: of kernels.
      links, host: seconds of waiting for transfers that are not overlapped.
    """

    products: float = 0.0
    moves: float = 0.0
    memory: float = 0.0
    flops: float = 0.0
    scores: float = 0.0
    tiles: float = 0.0
    links: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in both))

    def __rmul__(self, times: float) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))

    def parts(self, chip: Chip, reached: Reached) -> dict[str, float]:
        """Seconds by component."""
        kernels = self.flops / (chip.peak * reached.peak)
        kernels += self.scores * reached.vector / chip.vector
        kernels = kernels / reached.kernels + self.tiles * reached.tile / chip.cores
        memory = self.memory / (chip.bandwidth * reached.bandwidth)
        return {
            "products": reached.xla_products * self.products / chip.clock,
            "moves": reached.xla_moves * self.moves / chip.clock + memory,
            "kernels": kernels,
            "links": self.links,
            "host": self.host,
        }

    def seconds(self, chip: Chip, reached: Reached) -> float:
        """Seconds in total."""
        return sum(self.parts(chip, reached).values())


def kernel(operation: hlo.Operation) -> Work:
    """The work of one of the kernels of JAX's splash attention.

    Raises:
      ValueError: it is another kernel.
    """
    match = re.search(r"operand_layout_constraints=\{(.*)\}", operation.rest)
    operands = re.findall(r"(bf|[fsu])\d+\[([\d,]*)\]", match[1] if match else "")
    shapes = [
        (kind, tuple(map(int, sizes.split(",")))) for kind, sizes in operands if sizes
    ]
    floats = [sizes for kind, sizes in shapes if kind in ("bf", "f")]
    # An integer operand before the queries has the grid of tiles: [..., rows, columns].
    grid = shapes[0][1][-2:] if shapes and shapes[0][0] == "s" else ()
    for part, products in PRODUCTS.items():
        if part in operation.name and len(floats) > 1:
            (*rows, size), keys = floats[0], floats[1][-2]
            scores = float(math.prod(rows) * keys)
            tiles = math.prod(rows[:-1]) * math.prod(grid) if grid else 0
            flops = 2.0 * products * scores * size
            return Work(flops=flops, scores=scores, tiles=float(tiles))
    raise ValueError(f"what the kernel {operation.name} computes is not known")


def exchange_seconds(one: hlo.Exchange, devices: int, chip: Chip, slices: int) -> float:
    """Seconds of an exchange when nothing else uses the links."""
    n = one.members or devices
    across = slices > 1 and ("replica" in one.axes or one.axes == "devices")
    both_ways = chip.network if across else 2 * chip.link
    if one.kind == "collective-permute":
        return one.size / (both_ways if across else chip.link)
    if n < 2:
        return 0.0
    factor = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": n / 4,
    }[one.kind]
    return factor * one.whole / both_ways


class _Walk:
    """One pass over a computation, with the time and when each kind of link is free."""

    def __init__(self, clock: "_Clock", computation: str):
        self._of, self._computation = clock, computation
        self._now = 0.0
        self._free = {"links": 0.0, "host": 0.0, "memory": 0.0}
        self._ready: dict[str, tuple[str, float]] = {}
        self._called: dict[str, list[hlo.Exchange]] = {}
        self._results = {}
        self.work = Work()

    def run(self) -> Work:
        """Walks through the operations in order."""
        for operation in self._of.program.computations.get(self._computation, ()):
            self._results[operation.name] = operation.result
            self._step(operation)
        return self.work

    def _spend(self, work: Work) -> None:
        self.work += work
        self._now += work.seconds(self._of.chip, self._of.reached)

    def _begin(self, wires: str, seconds: float, names) -> None:
        self._free[wires] = max(self._now, self._free[wires]) + seconds
        for name in names:
            self._ready[name] = wires, self._free[wires]

    def _end(self, names) -> None:
        """Waits for transfers; those of an earlier iteration have finished."""
        for name in names:
            wires, ready = self._ready.pop(name, ("links", 0.0))
            left = max(0.0, ready - self._now)
            if wires == "memory":
                left *= self._of.chip.bandwidth * self._of.reached.bandwidth
            self._spend(Work(**{wires: left}))

    def _step(self, operation: hlo.Operation) -> None:
        kind, of = operation.kind, self._of
        fused = operation.name.startswith("async-collective")
        if kind in _FREE:
            return
        if kind in ("call-start", "call-update"):
            self._call(operation)
            return
        if kind in ("while", "call", "conditional"):
            trips = of.program.trips(operation) if kind == "while" else 1
            inner = [of.computation(name) for name in operation.called]
            inner.sort(key=lambda work: work.seconds(of.chip, of.reached))
            self._spend(trips * inner[-1])
        elif kind.endswith("-done") or operation.name.startswith(_FUSED_END):
            self._end(operation.operands + [key for key, _ in self._moved(operation)])
        elif moved := self._moved(operation):
            begun = fused or kind.endswith("-start") or operation.cycles is not None
            for key, one in moved:
                if key not in self._ready:
                    seconds = exchange_seconds(one, of.devices, of.chip, of.slices)
                    self._begin("links", seconds, (key, operation.name))
                if not begun:
                    self._end((key, operation.name))
            if operation.cycles is not None:
                self._compute(operation)
        elif kind.endswith("-start"):
            host = _HOST in operation.result
            wires, rate = "memory", of.chip.bandwidth * of.reached.bandwidth
            if host:
                wires, rate = "host", of.chip.host
            self._begin(wires, self._bytes(operation) / rate, (operation.name,))
        else:
            self._compute(operation)

    def _call(self, operation: hlo.Operation) -> None:
        """A collective on another core, which starts when it gets its operand."""
        first, *given = operation.operands or [""]
        moved = self._called.pop(first, None)
        if first in self._ready:  # started before, under the name of its operand
            self._ready[operation.name] = self._ready.pop(first)
        if operation.kind == "call-start":
            inside = map(self._of.program.exchanges_in, operation.called)
            moved = [one for found in inside for _, one in found]
            given = operation.operands
        if given:
            of = self._of
            for one in moved or ():
                seconds = exchange_seconds(one, of.devices, of.chip, of.slices)
                self._begin("links", seconds, (operation.name,))
        else:
            self._called[operation.name] = moved

    def _moved(self, operation: hlo.Operation) -> list[tuple[str, hlo.Exchange]]:
        """(key, exchange) of an operation, or of those inside a fusion."""
        program = self._of.program
        if one := program.exchange(self._computation, operation):
            return [(hlo.key_of(self._computation, operation), one)]
        if operation.kind != "fusion" and not operation.kind.startswith("async"):
            return []
        inside = map(program.exchanges_in, operation.called)
        return [*{key: one for found in inside for key, one in found}.items()]

    def _bytes(self, operation: hlo.Operation) -> float:
        """Bytes that a transfer moves."""
        if operation.kind.startswith("dynamic-update-slice"):
            return hlo.largest(self._results.get(operation.operands[1], ""))
        # Of (operands, result, context): the smallest array that is not context.
        sizes = [
            width * math.prod(sizes) for width, sizes in hlo.arrays(operation.result)
        ]
        return min((size for size in sizes if size > _CONTEXT), default=0.0)

    def _compute(self, operation: hlo.Operation) -> None:
        of = self._of
        inside = (of.program.computations.get(name, ()) for name in operation.called)
        # A kernel that takes a slice of an array is fused with the slice.
        fused = [one for found in inside for one in found if _KERNEL in one.rest]
        if _KERNEL in operation.rest or fused:
            for one in fused or [operation]:
                self._spend(kernel(one))
        elif operation.cycles is not None:
            multiplies = of.program.multiplies(operation)
            name = "products" if multiplies else "moves"
            self._spend(Work(**{name: operation.cycles}))
        elif operation.kind not in ("fusion", "custom-call"):
            moved = operation.result
            if operation.kind == "dynamic-update-slice":
                moved = self._results.get(operation.operands[1], "")
            self._spend(Work(memory=2 * hlo.total(moved)))


@dataclasses.dataclass
class _Clock:
    program: hlo.Program
    chip: Chip
    reached: Reached
    devices: int
    slices: int

    def __post_init__(self):
        self._known: dict[str, Work] = {}

    def computation(self, name: str) -> Work:
        """Work of one pass over a computation."""
        if name not in self._known:
            self._known[name] = _Walk(self, name).run()
        return self._known[name]


def work_of(
    program: hlo.Program, chip: Chip, reached: Reached, devices: int, slices: int = 1
) -> Work:
    """The work of a program on each of `devices`, which lie on `slices`.

    Raises:
      ValueError: it has an unknown kernel.
    """
    clock = _Clock(program, chip, reached, devices, slices)
    return clock.computation(program.entry)
