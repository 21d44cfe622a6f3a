"""Which tiles of scores JAX's splash kernel takes on a device, and which are fastest.

    python -m experiments.tile_search [--head_size 128] [--write]
    python -m experiments.tile_search --topology v6e:2x2 [--write]

On a TPU every candidate is timed. With `--topology` it is compiled for one device of a
slice that need not be there (libtpu), and its time is the estimate of `preflight`: with
what a core spends between two tiles it prefers the largest that fit. To fit, a tile leaves
a part of VMEM free, since within a model the same kernel asks for up to a fifth more, and
it does so both for rows of whole tiles and for others, whose rest is hidden. Value first,
then the gradient with the best value. `--write` keeps the fastest in
sora_jax/models/splash_tiles.json, from which attention takes them.
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
# What XLA lets a kernel take of VMEM, in KiB, and how much of it a tile may take here.
VMEM = {"v5e": 16_384, "v5p": 16_384, "v6e": 32_768, "tpu7x": 32_768}
SHARE = 0.75


def program(tiles: splash_attention.Tiles, graded: bool):
    """Attention with what its gradient keeps, or all three gradients, in these tiles."""

    def attend(*qkv):
        return attention.splash(*qkv, tiles=tiles)

    def value(*qkv):
        y, pull = jax.vjp(attend, *qkv)
        return y, jax.tree.leaves(pull)

    def loss(*qkv):
        return jnp.sum(attend(*qkv).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 1, 2)) if graded else value)


def seconds(compiled, device, qkv) -> float:
    """The median of some runs; an estimate where the device is not there."""
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
    """The fastest tile of value or gradient; prints each.

    Args:
      device: that is searched for.
      qkv: what attention is timed with; whole: shapes of whole tiles.
      graded: whether the gradient is meant. best: tiles of all else.
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
        # What no digit tells apart: the squarer tile brings less into VMEM, and then that
        # of more queries, for which keys are brought less often.
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
        parser.error(f"tiles of {largest} ask for {2 * largest} tokens, and a head")
    xla_flags.set_defaults()
    if args.topology:
        try:
            device = meshes.compile_only(args.topology, 1)[0]
        except ValueError as error:
            parser.error(str(error))
    else:
        device = jax.local_devices()[0]
    if device.platform != "tpu":
        parser.error("this is no TPU; --topology compiles for one that is not there")
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
