"""What a program needs of each device of a slice, and how it is said."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.forecast import calibration, chips, step_time
from sora_jax.forecast.chips import GIB


class DoesNotFit(ValueError):
    """A device's memory is too small.

    Args:
      text: by how much.
      needed: bytes that a device would hold, at least; 0 where nothing says so.
    """

    def __init__(self, text: str, needed: float = 0.0):
        super().__init__(text)
        self.needed = needed


class KernelDoesNotFit(ValueError):
    """A core's own memory is too small for the tiles of a kernel."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What was found, of one device and one run of a program.

    Attributes:
      what: such as "a train step of 1 rows of 75,600 tokens".
      kind: of the device, in `chips.CHIPS`.
      memory: kind -> bytes.
      model_flops: of the whole slice by formula, nothing computed twice; of a video VAE,
        for which there is none, those of the program.
      program_flops: of the whole slice in the traced program.
      collectives: "operation over axes" -> bytes of its results on a device, and how
        many of them XLA moves while something else is computed.
      work: of a device.
      compile_seconds: of XLA.
      rows, tokens: of the global batch, and of a row.
      runs: of the program for all of these rows, such as the steps of a sampler.
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
        """Share of the device's memory."""
        return sum(self.memory.values()) / self.chip.hbm

    @property
    def excess(self) -> float:
        """Bytes that a device lacks; negative where some are left."""
        return sum(self.memory.values()) - self.chip.hbm

    @property
    def recompute(self) -> float:
        """Operations of the program in those of the formula."""
        return self.program_flops / self.model_flops

    @property
    def parts(self) -> dict[str, float]:
        """Estimated seconds of a run by what takes them."""
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
        """Operations of the formula, of those that the devices could do meanwhile."""
        return self.model_flops / (self.devices * self.chip.peak * self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        more = ("used", "recompute", "parts", "seconds", "seconds_per_clip", "mfu")
        found = dataclasses.asdict(self) | {name: getattr(self, name) for name in more}
        return found | {
            "hbm": self.chip.hbm,
            "estimate_errors": {one.name: one.error for one in calibration.checks()},
        }

    def as_text(self) -> str:
        """The same as lines for people."""
        lines = [f"one device of {self.devices}:"]
        lines += [f"  {k:<12} {v / GIB:8.2f} GiB" for k, v in self.memory.items()]
        total, hbm = sum(self.memory.values()) / GIB, self.chip.hbm / GIB
        lines.append(f"  {'in all':<12} {total:8.2f} GiB, {self.used:.0%} of {hbm:.2f}")
        lines.append(
            f"{self.what}: {self.model_flops / 1e12:,.0f} TFLOP by formula, "
            f"{self.program_flops / 1e12:,.0f} in the program ({self.recompute:.2f} times)"
        )
        for name, (size, hidden) in sorted(self.collectives.items()):
            lines.append(
                f"  {name:<34} {size / GIB:8.2f} GiB a device, {hidden / size:4.0%} "
                "beside computation"
            )
        lines += self._time()
        lines.append(f"compiled in {self.compile_seconds:.0f} s")
        return "\n".join(lines)

    def _time(self) -> list[str]:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.parts.items())
        lines = [
            f"estimated, not measured: {self.seconds:.3g} s ({parts}), "
            f"{self.seconds_per_clip:.3g} s a clip, MFU {self.mfu:.0%}"
        ]
        return lines + [f"  {one}" for one in calibration.checks()]


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, the first row above the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
