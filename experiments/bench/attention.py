"""Attention in chunks beside the reference, in turns: value alone, and with gradients.

python -m experiments.bench.attention [--shapes 1x6240x1x384,8x1024x4x32] [--repeat 9]

A shape is rows x tokens x heads x head size, float32. By default that of the video
VAE's middle block for one frame of 480 x 832, and that of a small denoiser. Memory is
what the compiled program asks for beside its arguments and results.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models import attention

FORMS = {"reference": attention.reference, "chunked": attention.chunked}


def graded(form):
    """A function of (q, k, v) that returns the gradients of all three."""

    def loss(*qkv):
        return jnp.sum(jnp.sin(form(*qkv)))

    return lambda *qkv: jax.grad(loss, (0, 1, 2))(*qkv)


def compare(shape: tuple[int, ...], repeat: int) -> dict[str, float]:
    """Prints a line for values and one for gradients; returns reference / chunked.

    Raises:
      ValueError: what the two compute differs.
    """
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
    ratios = {}
    for what, make in (("forward", lambda form: form), ("gradient", graded)):
        runs = {name: jax.jit(make(form)).lower(*qkv) for name, form in FORMS.items()}
        runs = {name: lowered.compile() for name, lowered in runs.items()}
        a, b = (jax.tree.leaves(run(*qkv)) for run in runs.values())
        for x, y in zip(a, b, strict=True):
            error = float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x))
            if not error <= 1e-5:
                raise ValueError(f"{what} differs from the reference's by {error:.1e}")
        times = {name: [] for name in runs}
        for turn in range(repeat):
            for name in list(runs)[:: 1 - 2 * (turn % 2)]:
                began = time.perf_counter()
                jax.block_until_ready(runs[name](*qkv))
                times[name].append(1e3 * (time.perf_counter() - began))
        line = []
        for name, found in times.items():
            low, middle, high = np.quantile(found, (0, 0.5, 1))
            held = runs[name].memory_analysis().temp_size_in_bytes / 1e6
            line.append(f"{name} {middle:.4g} ms ({low:.4g}-{high:.4g}), {held:.0f} MB")
        ratios[what] = float(
            np.median(times["reference"]) / np.median(times["chunked"])
        )
        print(f"{shape} {what}: {'; '.join(line)}: {ratios[what]:.2f} times")
    return ratios


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="1x6240x1x384,8x1024x4x32")
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args(argv)
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    for text in options.shapes.split(","):
        compare(tuple(map(int, text.split("x"))), options.repeat)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
