"""Finds the fastest tile sizes of JAX's splash attention kernel on a device.

    python -m experiments.tile_search [--head_size 128] [--write]
    python -m experiments.tile_search --topology v6e:2x2 [--write]

On a TPU every candidate is timed. With `--topology` it is compiled for one device of a
slice (with libtpu, without the slice), and its time is estimated as in `preflight`; since
this includes the time of a core between two tiles, the largest that fit are preferred. A
tile must leave a part of VMEM free, since the same kernel needs up to a fifth more inside
a model, both for rows of whole tiles and for rows with a masked remainder. The forward
pass is searched first, then the gradient with the best forward tile. `--write` stores the
fastest in sora_jax/models/splash_tiles.json, which attention reads.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp

from sora_jax.core import mesh as meshes
from sora_jax.core import xla_flags
from sora_jax.forecast import chips, hlo, step_time
from sora_jax.models import attention, splash_attention

QUERIES, KEYS = (512, 1024, 2048, 4096), (512, 1024, 2048)
ROUNDS = 5
# VMEM that XLA gives to a kernel, in KiB, and the share of it that a tile may use.
VMEM = {"v5e": 16_384, "v5p": 16_384, "v6e": 32_768, "tpu7x": 32_768}
SHARE = 0.75


def program(tiles: splash_attention.Tiles, graded: bool):
    """Returns attention with its residuals, or all three gradients, with these tiles."""

    def attend(*qkv):
        return attention.splash(*qkv, tiles=tiles)

    def value(*qkv):
        y, pull = jax.vjp(attend, *qkv)
        return y, jax.tree.leaves(pull)

    def loss(*qkv):
        return jnp.sum(attend(*qkv).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 1, 2)) if graded else value)


def seconds(compiled, device, qkv) -> float:
    """Returns the median of some runs; an estimate without the device."""
    if isinstance(qkv[0], jax.ShapeDtypeStruct):
        chip = chips.CHIPS[chips.kind_of(device)]
        work = step_time.work_of(hlo.parse(compiled.as_text()), chip, chips.REACHED, 1)
        return work.seconds(chip, chips.REACHED)
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*qkv))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def search(device, qkv, whole, graded: bool, best: splash_attention.Tiles):
    """Returns the fastest tile of value or gradient; prints each.

    Args:
      device: the device.
      qkv: inputs of attention, or their shapes.
      whole: shapes of whole tiles.
      graded: whether to search for the gradient's tile.
      best: the other tiles.
    """
    found = {}
    most = int(SHARE * VMEM[chips.kind_of(device)])
    options = {"xla_tpu_scoped_vmem_limit_kib": str(most)}
    for tile in itertools.product(QUERIES, KEYS):
        tiles = best._replace(**{"gradient" if graded else "value": tile})
        run = program(tiles, graded)
        try:
            run.lower(*whole).compile(options)
            compiled = run.lower(*qkv).compile(options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{tile[0]:5} x {tile[1]:5}: does not fit", flush=True)
            continue
        found[tile] = seconds(compiled, device, qkv)
        print(f"{tile[0]:5} x {tile[1]:5}: {1e3 * found[tile]:.2f} ms", flush=True)
    if not found:
        raise SystemExit("tile_search: no tile fits")

    def order(tile):
        # For equal times: the squarer tile loads less into VMEM; then that with more
        # queries, for which keys are loaded less often.
        return float(f"{found[tile]:.3g}"), abs(math.log(tile[0] / tile[1])), -tile[0]

    return min(found, key=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="such as v6e:2x2; by default this device")
    sizes = splash_attention.HEAD_SIZES
    parser.add_argument("--head_size", type=int, default=sizes[0], choices=sizes)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    largest = max(*QUERIES, *KEYS)
    if args.tokens < 2 * largest or args.heads < 1:
        parser.error(
            f"tiles of {largest} need {2 * largest} tokens and one head or more"
        )
    xla_flags.set_defaults()
    if args.topology:
        try:
            device = meshes.compile_only(args.topology, 1)[0]
        except ValueError as error:
            parser.error(str(error))
    else:
        device = jax.local_devices()[0]
    if device.platform != "tpu":
        parser.error("this is not a TPU; --topology compiles without one")
    size = (1, args.tokens, args.heads, args.head_size)
    mesh = meshes.make_mesh({"fsdp": 1}, [device])
    with jax.set_mesh(mesh):
        layout = jax.NamedSharding(mesh, jax.P())
        shape = functools.partial(
            jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=layout
        )
        qkv = [shape(size)] * 3
        whole = [shape((1, args.tokens // largest * largest, *size[2:]))] * 3
        if not args.topology:
            keys = jax.random.split(jax.random.key(0), 3)
            qkv = [jax.random.normal(key, size, jnp.bfloat16) for key in keys]
        best = splash_attention.Tiles()
        for graded, name in enumerate(best._fields):
            print(f"{device.device_kind}, {name}:", flush=True)
            tile = search(device, qkv, whole, bool(graded), best)
            best = best._replace(**{name: tile})
    print(f"fastest: {best}")
    if args.write:
        table = json.loads(splash_attention.TABLE.read_text())
        of_kind = table.setdefault(device.device_kind, {})
        of_kind[str(args.head_size)] = best._asdict()
        splash_attention.TABLE.write_text(
            json.dumps(table, indent=1, sort_keys=True) + "\n"
        )


if __name__ == "__main__":
    main()
