"""The report on a compiled program: memory, operations, communication and time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.forecast import calibration, chips, step_time
from sora_jax.forecast.chips import GIB


class DoesNotFit(ValueError):
    """A device's memory is too small.

    Args:
      text: by how much.
      needed: least bytes that a device would have to hold; 0 if unknown.
    """

    def __init__(self, text: str, needed: float = 0.0):
        super().__init__(text)
        self.needed = needed


class KernelDoesNotFit(ValueError):
    """The memory of a core (VMEM) is too small for the tiles of a kernel."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The report, for one device and one run of a program.

    Attributes:
      what: the program, such as "a step of 1 rows of 75,600 tokens".
      kind: of the device, in `chips.CHIPS`.
      memory: kind -> bytes.
      model_flops: of the whole slice by formula, without recomputation; for a video VAE,
        which has no formula, those of the program.
      program_flops: of the whole slice in the traced program.
      collectives: "operation over axes" -> bytes of its results on a device, and how
        many of them XLA overlaps with computation.
      work: of a device.
      compile_seconds: of XLA.
      rows, tokens: of the global batch, and of a row.
      runs: runs of the program for all of these rows, such as the steps of a sampler.
      devices: of the slice.
    """

    what: str
    kind: str
    memory: Mapping[str, int]
    model_flops: float
    program_flops: float
    collectives: Mapping[str, tuple[float, float]]
    work: step_time.Work
    compile_seconds: float
    rows: int
    tokens: int
    runs: float
    devices: int

    @property
    def chip(self) -> chips.Chip:
        return chips.CHIPS[self.kind]

    @property
    def used(self) -> float:
        """Share of the device's memory that is used."""
        return sum(self.memory.values()) / self.chip.hbm

    @property
    def excess(self) -> float:
        """Bytes by which the device's memory is exceeded; negative if it fits."""
        return sum(self.memory.values()) - self.chip.hbm

    @property
    def recompute(self) -> float:
        """Operations of the program, relative to those of the formula."""
        return self.program_flops / self.model_flops

    @property
    def parts(self) -> dict[str, float]:
        """Estimated seconds of a run, by component."""
        return self.work.parts(self.chip, chips.REACHED)

    @property
    def seconds(self) -> float:
        """Estimated seconds of one run of the program."""
        return sum(self.parts.values())

    @property
    def seconds_per_clip(self) -> float:
        """Estimated seconds of the whole slice for one row."""
        return self.runs * self.seconds / self.rows

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the formula's operations over those at peak rate."""
        return self.model_flops / (self.devices * self.chip.peak * self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        more = ("used", "recompute", "parts", "seconds", "seconds_per_clip", "mfu")
        fields = dataclasses.asdict(self) | {name: getattr(self, name) for name in more}
        return fields | {
            "hbm": self.chip.hbm,
            "estimate_errors": {one.name: one.error for one in calibration.checks()},
        }

    def as_text(self) -> str:
        """The report as text."""
        lines = [f"memory of one of {self.devices} devices:"]
        lines += [f"  {k:<12} {v / GIB:8.2f} GiB" for k, v in self.memory.items()]
        total, hbm = sum(self.memory.values()) / GIB, self.chip.hbm / GIB
        lines.append(f"  {'total':<12} {total:8.2f} GiB, {self.used:.0%} of {hbm:.2f}")
        lines.append(
            f"{self.what}: {self.model_flops / 1e12:,.0f} TFLOP by formula, "
            f"{self.program_flops / 1e12:,.0f} in the program ({self.recompute:.2f} times)"
        )
        for name, (size, hidden) in sorted(self.collectives.items()):
            lines.append(
                f"  {name:<34} {size / GIB:8.2f} GiB per device, {hidden / size:4.0%} "
                "overlapped with computation"
            )
        lines += self._time()
        lines.append(f"compiled in {self.compile_seconds:.0f} s")
        return "\n".join(lines)

    def _time(self) -> list[str]:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.parts.items())
        lines = [
            f"estimated, not measured: {self.seconds:.3g} s ({parts}), "
            f"{self.seconds_per_clip:.3g} s per clip, MFU {self.mfu:.0%}"
        ]
        return lines + [f"  {one}" for one in calibration.checks()]


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, with the first row as their heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
