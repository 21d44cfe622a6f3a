"""Compares estimates with published times; their errors are shown beside each estimate.

`calibration.json` holds the work of the compiled programs for these settings;
`python -m experiments.calibrate_preflight` compiles them again. The settings are those
of MaxDiffusion (github.com/AI-Hypercomputer/maxdiffusion, README of 2026-08-21), for
Wan 2.1 14B with 81 frames of 1280 x 720, 75,600 tokens:

  training  36.0 s per step of one clip on v5p-8, four chips, which share its tokens;
            bf16 weights and AdamW; attention in tiles of 512 x 512, with one kernel for
            each of two parts of its gradient. The command says HIDDEN_STATE_WITH_OFFLOAD
            (block inputs and attention outputs in host memory), the text beside it says
            full recomputation: both are estimated, and `Reached.kernels` is fitted to
            their mean.
  sampling  249.3 s per clip of 50 steps with guidance, decoded, on v7x-8, eight cores,
            four of which share the tokens of a row; tiles of 3024 x 2048. It is not used
            for fitting.

Limits: the operations, communication and memory traffic are those of our own programs of
the same model, not of MaxDiffusion's, which all-gather keys and values where ours use an
all-to-all, and have other kernels on tpu7x. Multipliers of 256 x 256 that heads of 128
half fill are not modelled. So errors of the model of a chip cannot be told from
differences between the programs. One number is fitted to one step; other sizes, chips and
layouts are not measured here. The form of the model was chosen with knowledge of the
results: with the elementwise operations fitted in place of the share that kernels reach,
the step fits equally well and the sampling is off by 21 %; so those operations were
counted, and the share was fitted. Errors of other estimates may be larger.
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
    """The work of our program with the attention kernels of MaxDiffusion.

    Theirs compute the gradient in two parts, of 4 and 3 products per score, each with its
    own scores; ours compute it in one part of 5 products, and the output with 2. The
    additional memory traffic of ours, about 2 % of the step, is left in.

    Args:
      work: of a program with heads of size 128, as Wan's.
      tile: queries and keys of their tiles.
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
        """The error of the estimate, relative to the published time."""
        return self.estimated / self.published - 1

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.estimated:.1f} s estimated, {self.published:.1f} s "
            f"published, {self.error:+.1%}"
        )


@functools.cache
def measured() -> dict[str, Mapping]:
    """The content of `calibration.json`: name -> fields of `step_time.Work`, or cycles."""
    return json.loads(FILE.read_text())


def _seconds(name: str, kind: str, reached: Reached, works: Mapping) -> float:
    return step_time.Work(**works[name]).seconds(CHIPS[kind], reached)


def checks(
    reached: Reached = REACHED, works: Mapping | None = None
) -> tuple[Check, Check, Check]:
    """The two variants of the training step, and the sampling."""
    works = measured() if works is None else works
    sampling = SAMPLED_STEPS * _seconds("sample", "tpu7x", reached, works)
    sampling /= works["sampled_clips"]
    sampling += works["chunks"] * _seconds("decode", "tpu7x", reached, works)
    where = "Wan 14B 720p"
    return (
        Check(
            f"{where} training on v5p-8, attention offloaded (fitted)",
            TRAINING,
            _seconds("offload", "v5p", reached, works),
        ),
        Check(
            f"{where} training on v5p-8, full recomputation (fitted)",
            TRAINING,
            _seconds("full", "v5p", reached, works),
        ),
        Check(f"{where} sampling on v7x-8 (not fitted)", SAMPLING, sampling),
    )


def fit(works: Mapping) -> Reached:
    """The table `chips.REACHED` that follows from the measurements.

    Shares are means over the chips. A forward kernel on v6e takes 4/3 as long with tiles
    of 512 as with tiles of 1024 (`TILING`), so the time between two tiles is half the
    time of a small one; and the mean of the two variants of the training step must be
    right. Both depend linearly on one over the share that kernels reach.
    """
    kinds = list(PRODUCT)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    def longer(kind, amount, rate, cycles) -> float:
        """The measured time, relative to XLA's estimate."""
        return amount / rate[kind] * CHIPS[kind].clock / cycles[kind]

    peak = mean(PRODUCT[kind] / CHIPS[kind].peak for kind in kinds)
    scores, v6e = 512.0**2, CHIPS["v6e"]
    small = 4 * 128 * scores / (v6e.peak * peak) + scores * REACHED.vector / v6e.vector

    def table(cost: float) -> Reached:
        return Reached(
            peak=peak,
            bandwidth=mean(COPY[kind] / CHIPS[kind].bandwidth for kind in kinds),
            xla_products=mean(
                longer(kind, PRODUCT_FLOPS, PRODUCT, works["product"]) for kind in kinds
            ),
            xla_moves=mean(
                longer(kind, COPY_BYTES, COPY, works["copy"]) for kind in kinds
            ),
            vector=REACHED.vector,
            kernels=1 / cost,
            # small + tile = TILING (small + tile / 4)
            tile=(TILING - 1) / (1 - TILING / 4) * small * cost,
        )

    one, two = (
        mean(check.estimated for check in checks(table(cost), works)[:2])
        for cost in (1.0, 2.0)
    )
    return table(1 + (TRAINING - one) / (two - one))
