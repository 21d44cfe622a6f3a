"""What stands behind preflight's estimates of time: compiles it all, and fits the table.

    python -m experiments.calibrate_preflight [--only=offload]
    python -m experiments.calibrate_preflight --skip_programs

Compiles the published settings of `sora_jax/forecast/calibration.py` for the devices
that they name, which takes some minutes on one core and about 10 GB of memory, writes
what they ask of a device to sora_jax/forecast/calibration.json, and prints the table
that follows; it is copied by hand into sora_jax/forecast/chips.py, with three digits.
`--skip_programs` compiles nothing and prints the same from the file. Needs libtpu.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from configs import wan_14b
from sora_jax.core import mesh as meshes
from sora_jax.core import paths
from sora_jax.forecast import calibration, chips, hlo, programs

_ONLY = flags.DEFINE_string("only", None, "One part, such as offload.")
_SKIP = flags.DEFINE_bool("skip_programs", False, "Compile nothing.")
# Queries and keys of a tile: the default of MaxDiffusion's config, with which it trains,
# and what its README gives to generation.
_TRAINED_TILE, _SAMPLED_TILE = (512, 512), (3024, 2048)


def _config(remat: str):
    c = wan_14b.get_config()
    c.model.dit.remat = remat
    c.data.batch_size = 1
    c.sample.num_frames, c.sample.height, c.sample.width = 81, 720, 1280
    c.sample.num_inference_steps = calibration.SAMPLED_STEPS
    return c


def _train(remat: str) -> dict:
    """The training step on four chips that share the tokens of a clip."""
    mesh = meshes.make_mesh({"ulysses": 4}, meshes.compile_only("v5p:2x2x1"))
    found = programs.train_step(_config(remat), mesh)
    print(found.what, found.work, found.parts, flush=True)
    return dataclasses.asdict(calibration.as_published(found.work, _TRAINED_TILE))


def _sampling(make) -> programs.Forecast:
    """Eight cores: two groups, of four that share the tokens of a clip."""
    devices = meshes.compile_only("tpu7x:2x2x1")
    found = make(_config("none"), meshes.make_mesh({"fsdp": 2, "ulysses": 4}, devices))
    print(found.what, found.work, found.parts, flush=True)
    return found


def _sample() -> dict:
    found = _sampling(programs.sample_step)
    work = calibration.as_published(found.work, _SAMPLED_TILE)
    return {"sample": dataclasses.asdict(work), "sampled_clips": found.rows}


def _decode() -> dict:
    found = _sampling(programs.decode_chunk)
    work = dataclasses.asdict(found.work)
    return {"decode": work, "chunks": found.runs / found.rows}


def _cycles(topology: str, function, *shapes) -> int:
    """XLA's cycles for one operation on one device."""
    layout = jax.sharding.SingleDeviceSharding(meshes.compile_only(topology)[0])
    given = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout) for shape in shapes
    ]
    program = hlo.parse(jax.jit(function).lower(*given).compile().as_text())
    found = [one.cycles for one in program.computations[program.entry]]
    return sum(cycles for cycles in found if cycles)


def _operations() -> dict:
    slices = {"v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
    side = (8192, 8192)
    return {
        "product": {k: _cycles(s, jnp.matmul, side, side) for k, s in slices.items()},
        "copy": {
            k: _cycles(s, lambda x: x + 1, (16_384, 8192)) for k, s in slices.items()
        },
    }


PARTS = {
    "operations": _operations,
    "decode": _decode,
    "sample": _sample,
    "offload": lambda: {"offload": _train("offload")},
    "full": lambda: {"full": _train("full")},
}


def main(_):
    """Compiles what is asked for, and prints the table and its errors."""
    found = dict(calibration.measured())
    if _ONLY.value and _ONLY.value not in PARTS:
        sys.exit(f"--only is one of {[*PARTS]}")
    for name, part in () if _SKIP.value else PARTS.items():
        if _ONLY.value in (None, name):
            found |= part()
            text = json.dumps(found, indent=1, sort_keys=True) + "\n"
            paths.write_atomically(calibration.FILE, text)
    missing = {"product", "sample", "decode", "offload", "full"} - found.keys()
    if missing:
        sys.exit(f"calibrate_preflight: {sorted(missing)} are not compiled yet")
    fitted = calibration.fit(found)
    print(fitted)
    for check in calibration.checks(fitted, found):
        print(check)
    print(f"with the table of chips.py, {chips.REACHED}:")
    for check in calibration.checks(chips.REACHED, found):
        print(check)


if __name__ == "__main__":
    app.run(main)
