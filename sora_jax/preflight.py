"""Says what a config's training would need on a TPU slice, without having one.

    python -m sora_jax.preflight --config=configs/wan_1_3b.py --topology=v5e:2x2 \
        --mesh=ulysses=4 --config.data.batch_size=1

Compiles the train step for clips of the config's `sample` size with XLA's TPU compiler
(libtpu, launch/requirements/tpu.txt) and prints the memory of a device by kind, the
operations by formula and in the program, and what devices exchange. Nothing runs, and
no time is estimated. Exit code 1: it does not fit, by how much.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.training import preflight

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe of a denoiser.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:2x2 or v5p:2x2x1.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of it.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", None, "Such as fsdp=2,ulysses=2; config.mesh.")
_OUT = flags.DEFINE_string("out", None, "JSON file for what is printed.")


def main(arguments):
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)
    c = _CONFIG.value
    try:
        if c.objective != "denoiser":
            raise ValueError(f"the config is of a {c.objective}, not of a denoiser")
        shape = meshes.parse(_MESH.value) if _MESH.value else dict(c.mesh)
        devices = meshes.compile_only(_TOPOLOGY.value, _SLICES.value)
        found = preflight.train_step(c, meshes.make_mesh(shape, devices))
    except preflight.DoesNotFit as error:
        sys.exit(f"preflight: it does not fit: {error}")
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        sys.exit(2)
    if _OUT.value:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        paths.write_atomically(pathlib.Path(_OUT.value), text)
    print(found.as_text())
    if found.used > 1:
        sys.exit("preflight: it does not fit")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    job.run(main, "preflight")
