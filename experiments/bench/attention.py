"""Times attention beside torch's scaled_dot_product_attention and jax.nn's.

    python -m experiments.bench.attention [--shapes 1x4096x6x64] [--json runs/attention.json]
    python -m experiments.bench.attention --forms reference,chunked \
        --shapes 1x6240x1x384,8x1024x4x32
    python -m experiments.bench.attention --dtype bfloat16 \
        --shapes 1x8192x12x128,1x32760x12x128,1x75600x40x128

A shape is rows x tokens x heads x head size. Each is timed forward, and with the gradients
of queries, keys and values. Every form is first compared with ours; then all are timed in
turns. Forms:

  stock      jax.nn.dot_product_attention
  cudnn      the same with cuDNN, on a GPU, in bfloat16
  reference, chunked   the two of models/attention.py from which ours chooses
  sdpa       torch's, in the peers' environment
  sdpa_cudnn torch's with cuDNN, on a GPU

Memory is the temporary memory of our compiled programs.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import side_by_side
from sora_jax.models import attention

OURS = {
    side_by_side.OURS: attention.attention,
    "stock": jax.nn.dot_product_attention,
    "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    "reference": attention.reference,
    "chunked": attention.chunked,
}
# Forms of the peer, with the suffix of the operation's name.
THEIRS = {"sdpa": "", "sdpa_cudnn": "_cudnn"}
_SHAPE = re.compile("x".join([r"([1-9]\d*)"] * 4))
# Largest relative errors of values and of gradients.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 3e-2)}
# Smallest ratios to reach, in float32 on a CPU.
BARS = {
    "forward": {"sdpa": 0.95, "stock": 2.0},
    "gradient": {"sdpa": 0.9, "stock": 2.0},
}


def graded(form):
    """Returns a function of (q, k, v) that returns all three gradients, flat."""

    def loss(*qkv):
        return jnp.sum(jnp.sin(form(*qkv).astype(jnp.float32)))

    def run(*qkv):
        return jnp.concatenate([x.ravel() for x in jax.grad(loss, (0, 1, 2))(*qkv)])

    return run


def compare(
    shape: tuple[int, ...], dtype: str, forms, python: str | None, rounds: int
) -> list[dict]:
    """Times forms on one shape; returns a row for values and one for gradients.

    Raises:
      ValueError: the results of two forms differ.
    """
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(shape, np.float32) for name in "qkv"}
    qkv = [jnp.asarray(x, dtype) for x in drawn.values()]
    theirs = [form for form in forms if form in THEIRS and python is not None]
    bars = BARS if jax.default_backend() == "cpu" and dtype == "float32" else {}
    with contextlib.ExitStack() as stack:
        peer = None
        if theirs:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            given = folder, drawn, {"dtype": dtype}
            peer = side_by_side.Peer(python, "timed_attention.py", *given)
            stack.enter_context(peer)
        rows = []
        for what, make in (("forward", lambda form: form), ("gradient", graded)):
            calls, memory = _our_calls(make, [f for f in forms if f in OURS], qkv)
            expected = np.asarray(calls[side_by_side.OURS](), np.float32)
            tolerance, errors = TOLERANCE[dtype][what == "gradient"], {}
            for form in calls:
                if form != side_by_side.OURS:
                    found = np.asarray(calls[form](), np.float32)
                    errors[form] = side_by_side.check(
                        f"{what} {form}", expected, found, tolerance
                    )
            timed = {
                form: functools.partial(side_by_side.seconds, call)
                for form, call in calls.items()
            }
            for form in theirs:
                name = f"{what}{THEIRS[form]}"
                try:
                    peer.seconds(name)
                except side_by_side.Refused as error:
                    print(f"torch does not support {form}: {error}")
                    continue
                found = peer.results()[name]
                errors[form] = side_by_side.check(
                    f"{what} {form}", expected, found, tolerance
                )
                timed[form] = functools.partial(peer.seconds, name)
            times = side_by_side.take_turns(timed, rounds)
            b, n, h, e = shape
            flops = 4 * b * h * n * n * e * (1 if what == "forward" else 3)
            rate = flops / np.median(times[side_by_side.OURS]) / 1e12
            name = f"{'x'.join(map(str, shape))} {dtype} {what}"
            more = {"memory": memory, "utilisation": f"{rate:.3g} TFLOP/s"}
            more |= {"errors": errors, "peer": peer.versions() if peer else {}}
            rows.append(side_by_side.row(name, times, bars.get(what), **more))
    return rows


def _our_calls(make, forms, qkv) -> tuple[dict[str, Callable], dict[str, int]]:
    """Returns compiled forms, ours first, and the bytes of their temporary memory."""
    calls, memory = {}, {}
    for form in dict.fromkeys([side_by_side.OURS, *forms]):
        program = jax.jit(make(OURS[form])).lower(*qkv).compile()
        memory[form] = program.memory_analysis().temp_size_in_bytes
        calls[form] = functools.partial(program, *qkv)
    return calls, memory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "1x1024x6x64,1x4096x6x64,1x8192x6x64"
    parser.add_argument(
        "--shapes", default=default, help="rows x tokens x heads x size"
    )
    parser.add_argument(
        "--forms", help="by default stock,sdpa; on a GPU cudnn,sdpa,sdpa_cudnn"
    )
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", default=side_by_side.PEERS)
    parser.add_argument("--json", help="output file for the rows")
    options = parser.parse_args(argv)
    if options.dtype not in TOLERANCE:
        parser.error(f"dtype is one of {', '.join(TOLERANCE)}")
    # Two libraries share the GPU, so none may allocate all memory in advance.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    default = "stock,sdpa"
    if jax.default_backend() == "gpu":  # there the stock operation stores all scores
        default = "cudnn,sdpa,sdpa_cudnn"
    forms, python = (options.forms or default).split(","), None
    if unknown := set(forms) - {*OURS, *THEIRS}:
        parser.error(f"forms are {', '.join((*OURS, *THEIRS))}; not {unknown}")
    if set(forms) & {*THEIRS}:
        python = options.peer
        if reason := side_by_side.missing(python, ["safetensors"]):
            print(f"Only our side is timed: {reason}")
            python = None
    shapes = [_SHAPE.fullmatch(text) for text in options.shapes.split(",")]
    if None in shapes:
        parser.error(f"shapes are like 1x1024x6x64, not {options.shapes}")
    print(f"{side_by_side.THREADS} cores, load {os.getloadavg()[0]:.1f}")
    rows = []
    for found in shapes:
        shape = tuple(map(int, found.groups()))
        rows += compare(shape, options.dtype, forms, python, options.rounds)
    side_by_side.write(options.json, rows, bench="attention")


if __name__ == "__main__":
    main()
