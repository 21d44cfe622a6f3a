"""Reports whether a config fits a TPU slice, and estimates its time, without a TPU.

    python -m sora_jax.preflight --config=configs/wan_1_3b.py --topology=v5e:2x2 \\
        --mesh=ulysses=4 --config.data.batch_size=1
    python -m sora_jax.preflight --config=configs/wan_14b.py --topology=v5p:2x2x1 \\
        --mesh=ulysses=4 --job=sample
    python -m sora_jax.preflight --config=configs/wan_14b.py --topology=v6e:4x4 --search

Compiles a program for clips of the config's `sample` size with XLA's TPU compiler
(libtpu, launch/requirements/tpu.txt); nothing is run. Prints the memory of a device by
kind, the operations by formula and in the program, the communication between devices, and
an estimate of the time, with the error of such estimates where times are published.

`--search` estimates layouts, remat policies and batch sizes of the train step by formula,
compiles the best and ranks them. The exit code is 1 where the program does not fit; the
message says by how much, and what would fit. It is 2 where the input is wrong.
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from sora_jax.core import config as configs
from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.forecast import programs, search
from sora_jax.forecast.report import DoesNotFit
from sora_jax.generation import runs
from sora_jax.training import recipe

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v5e:2x2, v5p:2x2x1, ...")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Number of slices.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", None, f"{job.MESH} Default: config.mesh.")
_JOB = flags.DEFINE_enum(
    "job",
    "train",
    ("train", "sample", "vae"),
    "Program to compile: the train step, a step of the sampler, or the decoding of "
    "latents (of a video VAE's config: its train step).",
)
_SEARCH = flags.DEFINE_bool("search", False, "Rank layouts of the train step.")
_LIMIT = flags.DEFINE_integer(
    "compile_limit", 3, "With --search: number of layouts to compile.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "JSON file to write the report to.")


def _program(c):
    """The program that --job names."""
    if c.objective == "vae" and _JOB.value == "vae":
        return programs.vae_step
    if c.objective != "denoiser":
        hint = "; add --job=vae" * (c.objective == "vae")
        raise ValueError(f"the config is of a {c.objective}, not of a denoiser{hint}")
    return {
        "train": programs.train_step,
        "sample": programs.sample_step,
        "vae": programs.decode_chunk,
    }[_JOB.value]


def _search(c, devices) -> tuple[str, list]:
    if _JOB.value != "train" or _MESH.value:
        raise ValueError("--search takes no --mesh, and no other --job than train")
    found = search.best(c, devices, _SLICES.value, _LIMIT.value, say=_say)
    return found.as_text(), found.to_json()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    c, mesh, lacking = _CONFIG.value, None, 0.0
    try:
        make = _program(c)
        configs.build(recipe.Recipe, c, "")
        runs.settings(c)
        devices = meshes.compile_only(_TOPOLOGY.value, _SLICES.value)
        if _SEARCH.value:
            text, values = _search(c, devices)
        else:
            if _MESH.value:
                job.fill_mesh(c, _MESH.value)
            mesh = meshes.make_mesh(dict(c.mesh), devices)
            found = make(c, mesh)
            text, values = found.as_text(), found.to_json()
            lacking = found.excess
    except DoesNotFit as error:
        sys.exit(f"preflight: it does not fit: {error}{_advice(c, mesh, error.needed)}")
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        sys.exit(2)
    if _OUT.value:
        written = json.dumps(values, indent=1) + "\n"
        paths.write_atomically(pathlib.Path(_OUT.value), written)
    print(text)
    if lacking > 0:
        lacks = f"a device is short of {lacking / 2**30:.2f} GiB"
        needed = lacking + found.chip.hbm
        sys.exit(f"preflight: it does not fit: {lacks}{_advice(c, mesh, needed)}")


def _advice(c, mesh, needed: float) -> str:
    """What would fit, by formula, where a train step needs `needed` bytes."""
    if _JOB.value != "train" or _SEARCH.value:
        return ""
    refused = [(search.layout_of(c, mesh), needed)]
    return f"; {search.advice(c, mesh.devices.flat[:], _SLICES.value, refused)}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    job.run(main, "preflight")
