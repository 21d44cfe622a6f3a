"""How far estimates are from what others have published: the errors beside each of them.

`calibration.json` holds what the compiled programs of those settings ask of a device;
`python -m experiments.calibrate_preflight` compiles them again. The settings are those
of MaxDiffusion (github.com/AI-Hypercomputer/maxdiffusion, README of 2026-08-21), for
Wan 2.1 14B of 81 frames of 1280 x 720, 75,600 tokens:

  training  36.0 s a step of one clip on v5p-8, four chips, that share its tokens; bf16
            weights and AdamW, attention in tiles of 512 x 512 with a kernel for each of
            two parts of its gradient. The command says HIDDEN_STATE_WITH_OFFLOAD (block
            inputs and what attention gave lie in the host's memory), the text beside it
            says full recomputation: both are estimated, and `Reached.kernels` is
            fitted so that their mean is right.
  sampling  249.3 s a clip of 50 steps with guidance, decoded, on v7x-8, eight cores,
            of which four share the tokens of a row; tiles of 3024 x 2048. Not used for
            fitting.

What this says: the operations, exchanges and memory traffic are those of our own
programs of the same model, compiled for those devices, not of theirs. They gather keys
and values where ours exchange heads for tokens; theirs are other kernels on tpu7x; what
half fills a multiplier of 256 x 256, as heads of 128 do, is not counted. So
errors of the model of a chip and differences of the programs are not told apart, one
number is fitted to one step, and other sizes, chips and layouts have been measured by
nobody here. Nor is the form of the model free of what it was to predict: with the
elementwise operations fitted in place of the share that kernels reach, the step is met
as well and the sampling missed by 21 %; these were then counted, and the share fitted.
Errors of other estimates may be larger.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

from sora_jax.forecast import step_time
from sora_jax.forecast.chips import CHIPS, REACHED, Reached

FILE = pathlib.Path(__file__).with_name("calibration.json")
TRAINING = 36.0  # seconds a step
SAMPLING = 249.3  # seconds a clip
SAMPLED_STEPS = 50
# FLOP/s of 8192^3 products, and bytes/s of copies, as measured on a device.
PRODUCT = {"v6e": 827e12, "tpu7x": 956e12}
COPY = {"v6e": 1.36e12, "tpu7x": 3.21e12}
# How much longer splash attention takes on v6e with tiles of 512 than with 1024
# (github.com/apple/axlearn, pull request 958: "improves the performance by 1/3").
TILING = 4 / 3
PRODUCT_FLOPS, COPY_BYTES = 2.0 * 8192**3, 4.0 * 16384 * 8192


def as_published(work: step_time.Work, tile: tuple[int, int]) -> step_time.Work:
    """The work of our program with MaxDiffusion's kernels of attention in place of ours.

    Theirs make the gradient in two parts, of 4 and 3 products a score, each with scores
    of its own; ours make it in one, of 5, and the value of 2. What ours
    move besides, a head at a time, stays in: some 2 % of the step.

    Args:
      work: of a program whose heads have 128 numbers, as those of Wan have.
      tile: queries and keys of theirs.
    """
    products = work.flops / (2 * 128)
    gradients = (products - 2 * work.scores) / 3
    scores = work.scores + gradients
    return dataclasses.replace(
        work,
        flops=2 * 128 * (products + 2 * gradients),
        scores=scores,
        tiles=scores / (tile[0] * tile[1]),
    )


@dataclasses.dataclass(frozen=True)
class Check:
    """A published time and its estimate, in seconds."""

    name: str
    published: float
    estimated: float

    @property
    def error(self) -> float:
        """The estimate's, as a share of what is published."""
        return self.estimated / self.published - 1

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.estimated:.1f} s estimated, {self.published:.1f} s "
            f"published, {self.error:+.1%}"
        )


@functools.cache
def measured() -> dict[str, Mapping]:
    """What `calibration.json` holds: name -> the fields of `step_time.Work` or cycles."""
    return json.loads(FILE.read_text())


def _seconds(name: str, kind: str, reached: Reached, found: Mapping) -> float:
    return step_time.Work(**found[name]).seconds(CHIPS[kind], reached)


def checks(
    reached: Reached = REACHED, found: Mapping | None = None
) -> tuple[Check, Check, Check]:
    """The two readings of the training step, and the sampling."""
    found = measured() if found is None else found
    sampling = SAMPLED_STEPS * _seconds("sample", "tpu7x", reached, found)
    sampling /= found["sampled_clips"]
    sampling += found["chunks"] * _seconds("decode", "tpu7x", reached, found)
    where = "Wan 14B 720p"
    return (
        Check(
            f"{where} training on v5p-8, attention offloaded (fitted)",
            TRAINING,
            _seconds("offload", "v5p", reached, found),
        ),
        Check(
            f"{where} training on v5p-8, full recomputation (fitted)",
            TRAINING,
            _seconds("full", "v5p", reached, found),
        ),
        Check(f"{where} sampling on v7x-8 (not fitted)", SAMPLING, sampling),
    )


def fit(found: Mapping) -> Reached:
    """The table of `chips` that the measurements lead to.

    Shares are means over the chips. A forward kernel on v6e takes 4/3 as long with
    tiles of 512 as with tiles of 1024 (`TILING`), so the time between two tiles is half
    of what a small one takes; and the mean of the two readings of the training step is
    right. Both depend linearly on one over the share that kernels reach.
    """
    kinds = list(PRODUCT)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    def longer(kind, amount, rate, cycles) -> float:
        """What is measured, in XLA's time."""
        return amount / rate[kind] * CHIPS[kind].clock / cycles[kind]

    peak = mean(PRODUCT[kind] / CHIPS[kind].peak for kind in kinds)
    scores, v6e = 512.0**2, CHIPS["v6e"]
    small = 4 * 128 * scores / (v6e.peak * peak) + scores * REACHED.vector / v6e.vector

    def table(cost: float) -> Reached:
        return Reached(
            peak=peak,
            bandwidth=mean(COPY[kind] / CHIPS[kind].bandwidth for kind in kinds),
            xla_products=mean(
                longer(kind, PRODUCT_FLOPS, PRODUCT, found["product"]) for kind in kinds
            ),
            xla_moves=mean(
                longer(kind, COPY_BYTES, COPY, found["copy"]) for kind in kinds
            ),
            vector=REACHED.vector,
            kernels=1 / cost,
            # small + tile = TILING (small + tile / 4)
            tile=(TILING - 1) / (1 - TILING / 4) * small * cost,
        )

    one, two = (
        mean(check.estimated for check in checks(table(cost), found)[:2])
        for cost in (1.0, 2.0)
    )
    return table(1 + (TRAINING - one) / (two - one))
