"""Searches the layouts of a train step that fit, and ranks them by time.

A layout is a mesh, a remat policy and a number of rows. Formulas for memory and time,
with errors of tens of percent, discard the layouts that cannot fit and sort the others;
the first few are compiled, and ranked by the estimate of `step_time`.

Letters of the formulas: n tokens of a device, d width, f hidden units, L layers, h
heads.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from sora_jax.core import mesh as meshes
from sora_jax.forecast import chips, programs
from sora_jax.forecast.chips import GIB, REACHED, Chip
from sora_jax.forecast.report import DoesNotFit, Forecast, KernelDoesNotFit, table
from sora_jax.models import dit
from sora_jax.training import cost, jobs

REMAT = ("none", "attention", "offload", "full")
_ROWS = (1, 2, 4)  # per group of devices that share a row
_MARGIN = 1.15  # a layout whose formula exceeds the memory by more is discarded
_MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
      sizes: of the mesh, by axis.
      remat: `model.dit.remat`.
      rows: of the batch.
    """

    sizes: tuple[tuple[str, int], ...]
    remat: str
    rows: int

    @property
    def mesh(self) -> str:
        """The value of --mesh."""
        used = [f"{axis}={size}" for axis, size in self.sizes if size > 1]
        return ",".join(used) or "fsdp=1"

    def __str__(self) -> str:
        return f"--mesh={self.mesh}, remat {self.remat}, {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class Guess:
    """The estimate of a layout by formula: bytes of a device, seconds per clip."""

    layout: Layout
    size: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Compiled layouts that fit, the fastest first, and how many were tried."""

    layouts: Sequence[tuple[Layout, Forecast]]
    tried: int
    fitting: int

    def to_json(self) -> list[dict[str, Any]]:
        """The ranking as JSON values."""
        return [
            dataclasses.asdict(layout) | {"mesh": layout.mesh, **forecast.to_json()}
            for layout, forecast in self.layouts
        ]

    def as_text(self) -> str:
        """The ranking as a table, and the full report on the first layout."""
        rows = [("mesh", "remat", "rows", "memory", "s/step", "s/clip", "MFU")]
        for layout, one in self.layouts:
            rows.append(
                (
                    layout.mesh,
                    layout.remat,
                    str(layout.rows),
                    f"{one.used:.0%}",
                    f"{one.seconds:.3g}",
                    f"{one.seconds_per_clip:.3g}",
                    f"{one.mfu:.0%}",
                )
            )
        summary = (
            f"{self.tried} layouts, {self.fitting} of them fit by formula; times are "
            "estimates"
        )
        first = self.layouts[0][1].as_text()
        return f"{table(rows)}\n{summary}\nthe first:\n{first}"


class Formulas:
    """Formulas for memory and time of a config's train step on devices of one kind.

    Args:
      c: the config of a denoiser.
      chip: the kind of device.
      slices: number of slices, joined by a network.
    """

    def __init__(self, c, chip: Chip, slices: int = 1):
        self._c, self._chip, self._slices = c, chip, slices
        self.objective = programs.denoiser_objective(c)
        self.config: dit.Config = self.objective.dit_config
        self.tokens = programs.tokens_of(c)
        make, _ = programs.begin(c, self.objective)
        state = jax.eval_shape(make, {})
        fixed = programs.fixed_shapes(c, self.objective)
        self.state_bytes, self.parameter_bytes, fixed_bytes = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            for tree in ((state, fixed), state.params, fixed)
        )
        self.adapted = bool(fixed)
        # What devices send each other of the weights, in bfloat16.
        self.weight_bytes = fixed_bytes if self.adapted else self.parameter_bytes / 2

    def layouts(self, devices: int) -> Iterator[Layout]:
        """Yields every layout whose sizes divide."""
        c = self._c.copy_and_resolve_references()
        for sizes in _factors(devices, len(meshes.AXES)):
            if sizes[0] % self._slices:
                continue
            mesh = jax.sharding.AbstractMesh(sizes, meshes.AXES)
            groups = mesh.shape["ulysses"] * mesh.shape["tensor"]
            if self.config.kv_heads % groups:
                continue
            for rows in _ROWS:
                batch = rows * sizes[0] * sizes[1] * c.loop.accumulation
                c.data.batch_size = batch
                try:
                    jobs.check_denoiser(mesh, c, self.objective)
                except ValueError:
                    break
                for remat in REMAT:
                    yield Layout(
                        tuple(zip(meshes.AXES, sizes, strict=True)), remat, batch
                    )

    def guess(self, layout: Layout) -> Guess:
        """Memory and time of a layout."""
        seconds = self._seconds(layout) / layout.rows
        return Guess(layout, self._bytes(layout), seconds)

    def _split(self, layout: Layout) -> tuple[int, int, float]:
        """(shards of the parameters, shards of a layer's width, tokens of a device)."""
        sizes = dict(layout.sizes)
        rows = layout.rows / self._c.loop.accumulation
        share = sizes["ring"] * sizes["ulysses"]
        whole = math.prod(sizes.values()) // sizes["replica"]
        tokens = rows * self.tokens / (sizes["replica"] * sizes["fsdp"] * share)
        return whole, sizes["tensor"], tokens

    def _bytes(self, layout: Layout) -> float:
        """Bytes of state and gradients, of saved activations, and of one block's backward.

        The saved input of a block takes 2 n d, the output of its self-attention
        2 (d + 4 h) n, all of its activations about 2 (14 d + 2 f) n; the backward pass of
        one block takes 2 (20 d + 4 f) n.
        """
        whole, tensor, n = self._split(layout)
        d, f = self.config.dim, self.config.mlp_dim / tensor
        outputs = 2 * (d + 4 * self.config.num_heads) / tensor
        saved = {
            "full": 2 * d,
            "attention": 2 * d + outputs,
            "offload": outputs,
            "dots": 2 * (8 * d + f),
            "none": 2 * (14 * d + 2 * f),
        }[layout.remat]
        state = (self.state_bytes + self.parameter_bytes) / whole
        return state + n * (self.config.num_layers * saved + 2 * (20 * d + 4 * f))

    def _seconds(self, layout: Layout) -> float:
        """Seconds of products, kernels, memory traffic and communication."""
        c, chip, config = self._c, self._chip, self.config
        sizes = dict(layout.sizes)
        devices = math.prod(sizes.values())
        whole, tensor, n = self._split(layout)
        length = c.text.length
        pairs = self.tokens * (self.tokens + length)
        attention = layout.rows * config.num_layers * 4.0 * pairs * config.dim
        forward = layout.rows * cost.dit_forward_flops(config, self.tokens, length)
        again = layout.remat != "none"
        full = layout.remat == "full"
        flops = (forward - attention) * (3 - self.adapted + again)
        seconds = flops / (devices * chip.peak * REACHED.peak)
        # Attention kernels compute 2 products forward and 7 for the gradient, and three
        # of the kernels compute the scores.
        flops = attention * (4.5 + full)
        scores = layout.rows * config.num_layers * config.num_heads * pairs * (3 + full)
        kernels = flops / (chip.peak * REACHED.peak)
        kernels += scores * REACHED.vector / chip.vector
        seconds += kernels / (devices * REACHED.kernels)
        width = 2 * (60 * config.dim + 6 * config.mlp_dim / tensor)
        moved = n * config.num_layers * width * (3 + again)
        seconds += moved / (chip.bandwidth * REACHED.bandwidth)
        return seconds + c.loop.accumulation * self._links(sizes, n, layout.remat)

    def _links(self, sizes: dict[str, int], n: float, remat: str) -> float:
        """Seconds of communication: weights, attention and tensor-parallel layers.

        A ring of r devices sends keys and values r - 1 times in the forward pass, and r
        times in the backward pass with their float32 gradients, over one direction of a
        link.
        """
        config, both_ways = self.config, 2 * self._chip.link
        passes, layers = 2 + (remat != "none"), config.num_layers
        shards = sizes["fsdp"] * sizes["ring"] * sizes["ulysses"]
        weights = self.weight_bytes / sizes["tensor"]
        # Weights that are not trained have no gradients to send.
        moved = (passes + 1 - self.adapted) * weights * (shards - 1) / shards
        row = 2 * n * config.dim / sizes["tensor"]
        # Keys and values are narrower than queries where heads share them.
        narrow = config.kv_heads / config.num_heads
        exchanged = layers * passes * 2 * row * (1 + narrow)
        moved += exchanged * (sizes["ulysses"] / 4) * (sizes["ulysses"] > 1)
        tensor = sizes["tensor"]
        moved += layers * passes * 4 * (2 * n * config.dim) * (tensor - 1) / tensor
        seconds = moved / both_ways
        if (ring := sizes["ring"]) > 1:
            hops = (1 + (remat == "full")) * 2 * (ring - 1) + 6 * ring
            seconds += layers * narrow * row * hops / self._chip.link
        if sizes["replica"] > 1:
            copies = (
                2 * self.parameter_bytes * sizes["replica"] / math.prod(sizes.values())
            )
            wires = self._chip.network if self._slices > 1 else both_ways
            seconds += copies / wires
        return seconds


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yields every tuple of `count` positive integers whose product is `number`."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield (first, *rest)


def best(
    c, devices: Sequence, slices: int, limit: int, say: Callable[[str], None] = print
) -> Ranking:
    """Compiles the `limit` layouts that are best by formula, and ranks those that fit.

    Args:
      c: the config of a denoiser.
      devices: of `meshes.compile_only`.
      slices: number of slices of the devices.
      limit: number of programs to compile.
      say: is called with a line about each.

    Raises:
      DoesNotFit: nothing fits; the message has the least excess, and what would fit.
    """
    chip = chips.CHIPS[chips.kind_of(devices[0])]
    formulas = Formulas(c, chip, slices)
    guesses = [*map(formulas.guess, formulas.layouts(len(devices)))]
    if not guesses:
        raise ValueError(f"no layout of {len(devices)} devices divides the config")
    fitting = [one for one in guesses if one.size <= _MARGIN * chip.hbm]
    fitting.sort(key=lambda one: one.seconds)
    ranked, refused, kernels = [], [], []
    for guess in itertools.islice(fitting, limit):
        layout = guess.layout
        say(f"compiling {layout}: {guess.seconds:.3g} s per clip by formula")
        try:
            forecast = programs.train_step(_with(c, layout), _mesh(layout, devices))
        except DoesNotFit as error:
            say(f"  {error}")
            refused.append((layout, error.needed))
            continue
        except KernelDoesNotFit as error:
            say(f"  {error}")
            kernels.append(error)
            continue
        if forecast.excess > 0:
            refused.append((layout, forecast.excess + chip.hbm))
        else:
            ranked.append((layout, forecast))
    if not ranked and kernels and not refused:
        raise kernels[0]
    if not ranked:
        known = [one for one in refused if one[1]]
        if not fitting:
            smallest = min(guesses, key=lambda one: one.size)
            known = [(smallest.layout, smallest.size)]
        message = f"none of {len(guesses)} layouts"
        if known:
            layout, needed = min(known, key=lambda one: one[1])
            excess = (needed - chip.hbm) / GIB
            message += (
                f"; the least excess is {excess:.2f} GiB per device, with {layout}"
            )
        raise DoesNotFit(f"{message}; {advice(c, devices, slices, refused)}")
    ranked.sort(key=lambda one: one[1].seconds_per_clip)
    return Ranking(ranked, len(guesses), len(fitting))


def _with(c, layout: Layout):
    """The config with a layout's policy and rows."""
    c = c.copy_and_resolve_references()
    c.model.dit.remat, c.data.batch_size = layout.remat, layout.rows
    return c


def _mesh(layout: Layout, devices: Sequence) -> jax.sharding.Mesh:
    return meshes.make_mesh(dict(layout.sizes), devices)


def advice(
    c,
    devices: Sequence,
    slices: int = 1,
    refused: Sequence[tuple[Layout, float]] = (),
) -> str:
    """What would fit by formula: another layout of these devices, or more of them.

    Args:
      c: the config of a denoiser.
      devices: of `meshes.compile_only`.
      slices: number of slices of the devices.
      refused: layouts that do not fit, and the bytes that a device needs for each, or 0.
        None of them is proposed. If the formula underestimates them, all its estimates
        are raised by the same factor.
    """
    chip = chips.CHIPS[chips.kind_of(devices[0])]
    formulas = Formulas(c, chip, slices)
    low = max([1.0, *(size / formulas.guess(one).size for one, size in refused)])
    excluded = {layout for layout, _ in refused}
    count = len(devices)
    while count <= _MOST_DEVICES:
        others = (one for one in formulas.layouts(count) if one not in excluded)
        guesses = map(formulas.guess, others)
        fitting = [one for one in guesses if low * one.size <= chip.hbm]
        if fitting:
            fastest = min(fitting, key=lambda one: one.seconds)
            more = f" on {count} devices" if count > len(devices) else ""
            return f"by formula it would fit{more} with {fastest.layout}"
        count *= 2
    return f"by formula it would not fit on {_MOST_DEVICES} devices either"


def layout_of(c, mesh: jax.sharding.Mesh) -> Layout:
    """The layout of a config on a mesh."""
    return Layout(tuple(mesh.shape.items()), c.model.dit.remat, c.data.batch_size)
