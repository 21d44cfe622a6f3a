"""What a config's train step needs on a TPU slice that need not be there.

XLA compiles the very step that training runs, for the named slice, on any host; what it
says of memory is what a chip must hold. Floating point operations are counted in the
traced program, loops by their length, so that what is computed twice shows.

Letters: b rows, t, h, w latent time, height and width, c channels, l text tokens, d
text width.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import rng, sharding
from sora_jax.data import packing
from sora_jax.models import video_vae
from sora_jax.training import cost, jobs, loop, objectives, optim
from sora_jax.training import state as states
from sora_jax.training import step as steps

# Bytes that a program may use of a device's HBM, as XLA's TPU compiler counts them. A
# device of a tpu7x is a core, two of which are a chip.
HBM_BYTES = {
    "v5e": 15.75 * 2**30,
    "v5p": 95.74 * 2**30,
    "v6e": 31.25 * 2**30,
    "tpu7x": 94.75 * 2**30,
}
_GIB = 2**30


class DoesNotFit(ValueError):
    """A device's memory is too small."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What was found, of one device and one step.

    Attributes:
      memory: kind -> bytes.
      hbm: bytes that a device has for them.
      model_flops: of the whole slice by formula, nothing computed twice.
      program_flops: of the whole slice in the traced program.
      collectives: "operation over axes" -> bytes of its results on a device, and how
        many of them XLA moves while something else is computed.
      compile_seconds: of XLA.
      rows, tokens: of the global batch, and of a row.
      devices: of the slice.
    """

    memory: Mapping[str, int]
    hbm: float
    model_flops: float
    program_flops: float
    collectives: Mapping[str, tuple[float, float]]
    compile_seconds: float
    rows: int
    tokens: int
    devices: int

    @property
    def used(self) -> float:
        """Share of the device's memory."""
        return sum(self.memory.values()) / self.hbm

    @property
    def recompute(self) -> float:
        """Operations of the program in those of the formula."""
        return self.program_flops / self.model_flops

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        fields = dataclasses.asdict(self)
        return fields | {"used": self.used, "recompute": self.recompute}

    def as_text(self) -> str:
        """The same as lines for people."""
        lines = [f"one device of {self.devices}:"]
        lines += [f"  {k:<12} {v / _GIB:8.2f} GiB" for k, v in self.memory.items()]
        total = sum(self.memory.values()) / _GIB
        lines.append(
            f"  {'in all':<12} {total:8.2f} GiB, {self.used:.0%} of {self.hbm / _GIB:.2f}"
        )
        lines.append(
            f"a step of {self.rows} rows of {self.tokens:,} tokens: "
            f"{self.model_flops / 1e12:,.0f} TFLOP by formula, "
            f"{self.program_flops / 1e12:,.0f} in the program ({self.recompute:.2f} times)"
        )
        for name, (size, hidden) in sorted(self.collectives.items()):
            lines.append(
                f"  {name:<34} {size / _GIB:8.2f} GiB a device, {hidden / size:4.0%} "
                "beside computation"
            )
        lines.append(f"compiled in {self.compile_seconds:.0f} s")
        return "\n".join(lines)


class _EmptyText:
    """A tokenizer of no words but the empty text: no run's data is at hand."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, texts, length: int):
        ids = np.zeros((len(texts), length), np.int32)
        ids[:, 0] = 1
        return ids, ids > 0


def denoiser_objective(c) -> objectives.Denoiser:
    """The denoiser's objective of a config, without any data.

    A frozen text encoder is not held: its states are stored beside the latents.
    """
    null_states = None
    if c.text.frozen:
        null_states = np.zeros((c.text.length, c.model.dit.text_dim), jnp.bfloat16)
    words = _EmptyText(c.model.text_encoder.vocab_size or c.text.vocab_size)
    return objectives.denoiser(c, words, fps=c.sample.fps, null_states=null_states)


def latent_shape(c) -> tuple[int, int, int, int]:
    """Latents [t, h, w, c] of the clips that `sample` names."""
    vae = configs.build(video_vae.Config, c.model.vae, "model.vae")
    return vae.latent_shape(c.sample.num_frames, c.sample.height, c.sample.width)


def train_step(c, mesh: jax.sharding.Mesh) -> Forecast:
    """Compiles a config's train step of clips of `sample`'s size for a mesh of devices.

    Args:
      c: the config of a denoiser.
      mesh: of `meshes.compile_only` devices.

    Raises:
      DoesNotFit: XLA refuses it for want of memory.
      ValueError: sizes that do not divide over the mesh.
    """
    objective = denoiser_objective(c)
    shape = latent_shape(c)
    tokens = packing.tokens_of(shape, objective.dit_config.patch)
    jobs.check_denoiser(mesh, c, objective, [tokens])
    rows = c.data.batch_size
    optimizer = optim.make(
        configs.build(optim.Config, c.optim, "optim"), c.loop.num_steps
    )

    def begin(given):
        return states.init(objective.networks, optimizer, rng.key(0, "init"), given, ())

    with jax.set_mesh(mesh):
        state = loop.abstract_state(jax.jit(begin), mesh)

    def place(dtype, *size):
        layout = sharding.named(mesh, "batch", *(None,) * (len(size) - 1))
        return jax.ShapeDtypeStruct(size, dtype, sharding=layout)

    length = c.text.length
    batch = {
        "latents": place(jnp.float32, rows, *shape),
        "text_mask": place(jnp.bool_, rows, length),
    }
    if c.text.frozen:
        width = objective.text_config.dim
        batch["text_states"] = place(jnp.bfloat16, rows, length, width)
    else:
        batch["text_ids"] = place(jnp.int32, rows, length)
    step = steps.make_train_step(
        objective,
        optimizer,
        seed=0,
        num_steps=c.loop.num_steps,
        ema_decay=c.optim.ema_decay,
        accumulation=c.loop.accumulation,
    )
    hbm, needed = hbm_of(mesh.devices.flat[0]), _bytes_of(state)
    if needed > hbm:
        raise DoesNotFit(
            "parameters, their average and optimizer state alone take "
            f"{needed / _GIB:.1f} GiB of the {hbm / _GIB:.2f} of a device; split them over "
            f"{math.ceil(needed * mesh.size / hbm)} devices or more"
        )
    with jax.set_mesh(mesh):
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        began = time.monotonic()
        compiled = _compile(traced.lower())
    seconds = time.monotonic() - began
    forward = cost.dit_forward_flops(objective.dit_config, tokens, length)
    return Forecast(
        memory=_memory(compiled, state),
        hbm=hbm,
        model_flops=3.0 * rows * forward,
        program_flops=flops_of(traced.jaxpr.jaxpr, mesh.size),
        collectives=collectives(compiled.as_text()),
        compile_seconds=seconds,
        rows=rows,
        tokens=tokens,
        devices=mesh.size,
    )


def hbm_of(device) -> float:
    """Bytes of a device's memory, by its kind.

    Raises:
      ValueError: the kind is in no table.
    """
    kind = device.device_kind.lower().replace("tpu ", "").replace(" lite", "e")
    kind = {"v6elite": "v6e", "7x": "tpu7x", "v5": "v5p"}.get(kind, kind)
    if kind not in HBM_BYTES:
        raise ValueError(f"the memory of {device.device_kind!r} is not known")
    return HBM_BYTES[kind]


def _compile(lowered):
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        raise DoesNotFit(" ".join(text.splitlines()[0].split())) from None


def _bytes_of(tree: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(compiled, state) -> dict[str, int]:
    """Bytes of a device by kind; what is handed on in place counts once.

    The compiler's own count of temporary bytes has what loops carry twice; what it sets
    aside, by which it accepts or refuses a program, has it once.
    """
    found = compiled.memory_analysis()
    arguments = {
        "parameters": _bytes_of(state.params),
        "average": _bytes_of(state.ema),
        "optimizer": _bytes_of(state.opt_state),
    }
    rest = found.argument_size_in_bytes - sum(arguments.values())
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    given = found.argument_size_in_bytes + results
    return arguments | {
        "batch": max(0, rest),
        "results": max(0, results),
        "temporary": found.total_allocation_bytes - given,
        "program": found.generated_code_size_in_bytes,
    }


# -- operations -----------------------------------------------------------------------


def flops_of(jaxpr, devices: int = 1) -> float:
    """FLOPs of products in a traced program, a loop's as often as it runs.

    Of a choice by platform the form with a kernel is counted. A kernel of attention's
    value counts 4 n m e a head, its gradient twice that (arXiv 2205.14135). What is
    written for one device counts for all of them.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [*_inner(equation)]
        if name == "dot_general":
            total += _product(equation)
        elif name == "pallas_call":
            total += _kernel(equation)
        elif name == "scan":
            total += equation.params["length"] * flops_of(inner[0], devices)
        elif name == "shard_map":
            total += devices * sum(map(flops_of, inner))
        elif name == "cond":
            kernels = [branch for branch in inner if _has_kernel(branch)]
            total += max(flops_of(branch, devices) for branch in kernels or inner)
        else:
            total += sum(flops_of(one, devices) for one in inner)
    return total


def _inner(equation):
    """The programs inside of an operation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _has_kernel(jaxpr) -> bool:
    return any(
        equation.primitive.name == "pallas_call"
        or any(map(_has_kernel, _inner(equation)))
        for equation in jaxpr.eqns
    )


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2.0 * math.prod(result.shape) * depth


def _kernel(equation) -> float:
    name = str(equation.params.get("name") or equation.params["name_and_src_info"])
    q, k = [v.aval for v in equation.invars if v.aval.dtype.kind not in "iub"][:2]
    value = 4.0 * math.prod(q.shape) * k.shape[-2]
    # The gradient is two kernels; both together count twice the value.
    for part, times in (("_fwd", 1), ("_dkv", 2), ("_dq", 0)):
        if part in name:
            return times * value
    raise ValueError(f"what the kernel {name} computes is not known")


# -- collectives ----------------------------------------------------------------------

_OPERATION = re.compile(
    r"%(\S+) = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(")
_CALLS = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_AXES = re.compile(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}")
_ARRAY = re.compile(r"(bf16|[fsu]\d+|pred)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[float, float]]:
    """Bytes of the results of collectives in a program compiled for TPUs.

    What stands in the body of a loop counts as often as the loop runs. An operation
    that XLA has cut into a start, steps and an end counts once.

    Returns:
      "operation over axes" -> (bytes on a device, those moved beside computation).
    """
    here, found, calls, most = "", {}, collections.defaultdict(list), {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = start[1]
            continue
        if loop := _LOOP.search(line):
            calls[here].append((loop[2], loop[1], False))
        elif called := _CALLS.search(line):
            hidden = line.lstrip().startswith("%async-collective")
            calls[here].append((called[1], None, hidden))
        for number in re.findall(r"s32\[\]\S* constant\((\d+)\)", line):
            most[here] = max(most.get(here, 1), int(number))
        if operation := _OPERATION.search(line):
            _, result, kind, begun = operation.groups()
            axes = _AXES.search(line)
            axes = axes[1].replace("'", "") if axes else "devices"
            if kind == "all-reduce" and here.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{here} {operation[1]}"
            size = max(map(_array_bytes, _ARRAY.findall(result)), default=0.0)
            found.setdefault(here, []).append(
                (key, f"{kind} over {axes}", size, bool(begun))
            )
    total: dict[str, tuple[str, float, bool]] = {}

    def walk(computation: str, times: int, hidden: bool) -> None:
        for key, name, size, begun in found.get(computation, ()):
            before = total.get(key, (name, 0.0, False))
            total[key] = (
                name,
                max(before[1], times * size),
                before[2] or hidden or begun,
            )
        for called, condition, beside in calls[computation]:
            trips = most.get(condition, 1) if condition else 1
            walk(called, times * trips, hidden or beside)

    entry = re.search(r"^ENTRY %(\S+)", text, re.MULTILINE)
    walk(entry[1] if entry else here, 1, False)
    result: dict[str, tuple[float, float]] = {}
    for name, size, hidden in total.values():
        if size:
            before = result.get(name, (0.0, 0.0))
            result[name] = before[0] + size, before[1] + size * hidden
    return result


def _array_bytes(array: tuple[str, str]) -> float:
    kind, dims = array
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return bits / 8 * math.prod(int(size) for size in dims.split(",") if size)
