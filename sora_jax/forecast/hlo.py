"""Parses programs that XLA has compiled: the order and number of their operations.

The text of a compiled program has one list of operations per computation, in the order
of execution. The bodies of loops and the contents of fusions are computations of their
own.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"(pred|bf|[fsu])(\d*)\w*\[([\d,]*)\]")  # f8e4m3fn: 8 bits
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_EXCHANGES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
      name: of its result.
      kind: such as "fusion".
      result: type of the result.
      rest: operands and attributes, as text.
    """

    name: str
    kind: str
    result: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([^\s,()]+)", self.rest.partition(")")[0])

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls, without the condition of a loop."""
        names = _CALLED.findall(self.rest)
        for branches in _BRANCHES.findall(self.rest):
            names += re.findall(r"%([\w.\-]+)", branches)
        return names

    @property
    def cycles(self) -> int | None:
        """XLA's estimate, or None."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective: communication between devices.

    Attributes:
      kind: such as "all-gather".
      axes: of the mesh; "devices" if unknown.
      members: devices of a group; 0 if unknown.
      size: bytes of the result on a device.
      whole: bytes of the result before it is scattered.
    """

    kind: str
    axes: str
    members: int
    size: float
    whole: float

    @property
    def name(self) -> str:
        return f"{self.kind} over {self.axes}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations, and the name of the first."""

    entry: str
    computations: Mapping[str, list[Operation]]

    def trips(self, loop: Operation) -> int:
        """The trip count of a loop: the constant in its condition."""
        condition = _LOOP.search(loop.rest)[1]
        bounds = [
            int(operation.rest.partition(")")[0])
            for operation in self.computations.get(condition, ())
            if operation.kind == "constant" and operation.result.startswith("s32[]")
        ]
        return max([1, *bounds])

    def multiplies(self, operation: Operation) -> bool:
        """Whether an operation, or a part of the fusion, is a matrix product."""
        if operation.kind in ("convolution", "dot"):
            return True
        inside = (self.computations.get(name, ()) for name in operation.called)
        return any(self.multiplies(one) for found in inside for one in found)

    def exchange(self, computation: str, operation: Operation) -> Exchange | None:
        """The collective of an operation, or None."""
        kind = operation.kind.removesuffix("-start")
        if kind not in _EXCHANGES:
            return None
        axes, members = "devices", 0
        if mesh := _MESH.search(operation.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            axes = mesh[2].replace("'", "")
            members = math.prod(int(sizes[axis]) for axis in axes.split(","))
        elif group := _GROUP.search(operation.rest):
            members = int(group[2] or len(group[1].split(",")))
        elif kind == "collective-permute":  # it has pairs, and only rings use it
            axes = "ring"
        size = largest(operation.result)
        whole = size * members if kind == "reduce-scatter" and members else size
        # XLA writes a reduce-scatter as a fusion around an all-reduce.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        return Exchange(kind, axes, members, size, whole)

    def exchanges_in(self, computation: str) -> Iterator[tuple[str, Exchange]]:
        """Yields (key, exchange) inside a computation and those that it calls.

        The parts into which XLA splits one operation have the same key.
        """
        for operation in self.computations.get(computation, ()):
            if found := self.exchange(computation, operation):
                yield key_of(computation, operation), found
            for called in operation.called:
                yield from self.exchanges_in(called)


def key_of(computation: str, operation: Operation) -> str:
    """The key shared by the start, the updates and the end of one exchange."""
    channel = re.search(r"channel_id=(\d+)", operation.rest)
    return channel[1] if channel else f"{computation} {operation.name}"


def parse(text: str) -> Program:
    """Parses the text of a compiled program."""
    computations, entry, here = {}, "", ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = start[2]
            computations[here] = []
            entry = here if start[1] else entry
        elif match := _OPERATION.match(line):
            name, result, kind, rest = match.groups()
            operation = Operation(name, kind, result, rest)
            computations.setdefault(here, []).append(operation)
    return Program(entry or here, computations)


def arrays(types: str) -> list[tuple[float, tuple[int, ...]]]:
    """(bytes of a number, shape) of every array in a type."""
    return [
        (int(bits or 8) / 8, tuple(int(size) for size in sizes.split(",") if size))
        for _, bits, sizes in _ARRAY.findall(types)
    ]


def largest(types: str) -> float:
    """Bytes of the largest array in a type."""
    return max((w * math.prod(sizes) for w, sizes in arrays(types)), default=0.0)


def total(types: str) -> float:
    """Bytes of all arrays in a type."""
    return sum(width * math.prod(sizes) for width, sizes in arrays(types))


def exchanges(program: Program) -> dict[str, tuple[float, float]]:
    """Bytes of the results of collectives.

    Operations in a loop count once per iteration. An operation that XLA has split into a
    start, updates and an end counts once.

    Returns:
      "operation over axes" -> (bytes on a device, those overlapped with computation).
    """
    moved: dict[str, tuple[str, float, bool]] = {}

    def walk(computation: str, times: int, hidden: bool) -> None:
        for operation in program.computations.get(computation, ()):
            if one := program.exchange(computation, operation):
                key = key_of(computation, operation)
                _, size, beside = moved.get(key, ("", 0.0, False))
                begun = operation.kind.endswith("-start")
                size = max(size, times * one.size)
                moved[key] = one.name, size, beside or hidden or begun
            trips = program.trips(operation) if operation.kind == "while" else 1
            beside = operation.name.startswith("async-collective")
            beside |= operation.kind == "call-start"
            for called in operation.called:
                walk(called, times * trips, hidden or beside)

    walk(program.entry, 1, False)
    result: dict[str, tuple[float, float]] = {}
    for name, size, hidden in moved.values():
        if size:
            before = result.get(name, (0.0, 0.0))
            result[name] = before[0] + size, before[1] + size * hidden
    return result
