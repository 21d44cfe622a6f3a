"""Tells what this machine can do: versions, devices, speeds, and what is missing.

    python -m sora_jax.doctor --folder runs

Measures the rate of matrix products, attention, video decoding and the disk, compiles and
runs training steps of the toy denoiser, and estimates how many of them the 20 minutes of
./launch/quickstart are here. With --config another denoiser's steps are timed. It takes about a minute, most of
it for compilation. The exit code is 1 where a package that every job needs is missing.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from sora_jax.core import config as configs
from sora_jax.core import job, paths, versions
from sora_jax.data import video_io
from sora_jax.forecast import programs
from sora_jax.models import attention
from sora_jax.training import cost, recipe

_TOY = "configs/toy.py"  # the quickstart's
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Recipe whose training step is timed; default: {_TOY}."
)
_FOLDER = flags.DEFINE_string("folder", ".", "Folder whose disk is measured.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write the findings to.")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "av")
_SECONDS = 2.0  # that each rate is measured for, at least
# Of x86-64 and Arm, the widest first; names as in /proc/cpuinfo.
_INSTRUCTIONS = {
    "amx_tile": "AMX",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "sve": "SVE",
    "asimd": "NEON",
}
# What the quickstart does besides the denoiser's steps, on two cores of an AMD EPYC with
# AVX-512 (experiments/RESULTS.md, "The quickstart"): seconds that follow the speed of
# training steps, other seconds, and the steps per second it was measured at.
_QUICKSTART = {"computing": 313.0, "other": 120.0, "steps_per_second": 3.4}
_MINUTES = 20  # of the quickstart
# Compiles a program and prints how many were found in the cache.
_COUNT_HITS = """
import jax
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
print(seen.count("/jax/compilation_cache/cache_hits"))
"""
# Programs that only some features need.
_PROGRAMS = {
    "ffmpeg": "tests of video files",
    "chromium": "tests of reports",
    "git": "the commit in a run's env.json",
}


def version_of(package: str) -> str:
    """The installed version of a package, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def processor() -> dict[str, object]:
    """Its name, cores that this process may use, instruction sets and memory in GiB."""
    name, found = platform.processor() or platform.machine(), set()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text().splitlines()
            if ":" in line
        )
        name = fields.get("model name", name)
        found = set(fields.get("flags", fields.get("Features", "")).split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [text for flag, text in _INSTRUCTIONS.items() if flag in found],
        "memory_gib": round(pages / 2**30, 1),
    }


def rate(work: Callable[[], object], seconds: float = _SECONDS) -> float:
    """Calls per second of `work`, after a first call that is not timed."""
    jax.block_until_ready(work())
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < seconds:
        jax.block_until_ready(work())
        count += 1
    return count / (time.perf_counter() - began)


def attention_flops() -> float:
    """FLOP/s of self-attention over 2,048 tokens, 8 heads of 64, without gradient."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x_bnhe = jnp.ones((1, 2048, 8, 64), dtype)
    attend = jax.jit(attention.attention)
    return 4 * 2048**2 * 8 * 64 * rate(lambda: attend(x_bnhe, x_bnhe, x_bnhe))


def decoded_frames() -> float:
    """Frames per second of decoding H.264 of 256 x 256 pixels, in one process."""
    ramp = np.add.outer(np.arange(256), np.arange(256))
    frames_thw = np.stack([(ramp + 4 * t) % 256 for t in range(33)]).astype(np.uint8)
    file = video_io.encode_mp4(np.repeat(frames_thw[..., None], 3, axis=-1), 8.0)
    return len(frames_thw) * rate(lambda: video_io.decode(file).frames)


def disk_rate(folder: pathlib.Path) -> float:
    """Bytes per second of writing 64 MiB to the folder's disk, flushed."""
    with tempfile.TemporaryFile(dir=folder) as file:
        content, began = os.urandom(2**20), time.perf_counter()
        for _ in range(64):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return 64 * 2**20 / (time.perf_counter() - began)


def training_rate(
    c: ml_collections.ConfigDict, seconds: float = 5.0
) -> tuple[float, float]:
    """Training steps per second of a denoiser, and seconds to compile one.

    Clips have the size that the config generates; their content is random. There is no
    second task (`state_loss`), which needs clips of the toy world.
    """
    configs.build(recipe.Recipe, c, "")
    objective = programs.denoiser_objective(c)
    make, optimizer = programs.begin(c, objective)
    rows, length = c.data.batch_size, c.text.length
    random = np.random.default_rng(0)
    size = (rows, *programs.latent_shape(c))
    batch = {
        "latents": random.standard_normal(size, np.float32),
        "text_mask": np.ones((rows, length), bool),
    }
    if objective.null_states_1ld is None:
        batch["text_ids"] = np.ones((rows, length), np.int32)
    else:
        null_ld = np.asarray(objective.null_states_1ld[0])
        batch["text_states"] = np.broadcast_to(null_ld, (rows, *null_ld.shape))
    state = make({})
    step = jax.jit(programs.step_of(c, objective, optimizer))
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    spent = time.perf_counter() - began
    return rate(lambda: compiled(state, batch), seconds), spent


def compile_cache_works() -> bool:
    """Whether a second process finds a program that a first one has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        more = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-c", _COUNT_HITS]
        said = [
            subprocess.run(command, env=os.environ | more, capture_output=True).stdout
            for _ in range(2)
        ]
        return said[0] == b"0\n" and said[1].strip() not in (b"", b"0")


def quickstart_steps(steps_per_second: float) -> int:
    """How many steps the quickstart's denoiser takes, from a measured rate of them."""
    times = _QUICKSTART["steps_per_second"] / steps_per_second
    seconds = _QUICKSTART["computing"] * times + _QUICKSTART["other"]
    return max(0, round((60 * _MINUTES - seconds) * steps_per_second))


def missing() -> dict[str, str]:
    """What is not installed -> what needs it."""
    found = {
        name: needed_by
        for name, needed_by in _PROGRAMS.items()
        if not shutil.which(name)
        and not (name == "chromium" and shutil.which("google-chrome"))
    }
    if version_of("libtpu") == "missing":
        found["libtpu"] = "preflight"
    peers = pathlib.Path(__file__).resolve().parents[1] / ".peers"
    if not peers.is_dir():
        found[".peers"] = "tests against torch; ./launch/test makes it"
    return found


def examine(
    folder: pathlib.Path, c: ml_collections.ConfigDict, is_toy: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields (section, findings), slow measurements last.

    Args:
      folder: whose disk is measured.
      c: config of the denoiser that is timed.
      is_toy: whether it is the quickstart's.
    """
    described = versions.describe()
    yield (
        "versions",
        {"sora_jax": described["sora_jax"], "python": described["python"]}
        | {package: version_of(package) for package in _PACKAGES},
    )
    free = shutil.disk_usage(folder).free
    yield "machine", processor() | {"free_disk_gib": round(free / 2**30, 1)}
    devices = {"devices": described["devices"]}
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        devices["device_memory_gib"] = round(limit / 2**30, 1)
    yield "devices", devices
    yield (
        "speed",
        {
            "matmul_gflops": round(cost.matmul_peak() / 1e9),
            "attention_gflops": round(attention_flops() / 1e9),
            "decoded_frames_per_second": round(decoded_frames()),
            "disk_mib_per_second": round(disk_rate(folder) / 2**20),
        },
    )
    per_second, compiling = training_rate(c)
    training = {
        "steps_per_second": round(per_second, 2),
        "seconds_to_compile_a_step": round(compiling, 1),
        "compile_cache_works": compile_cache_works(),
    }
    if is_toy:
        training["steps_of_quickstart"] = quickstart_steps(per_second)
    yield "training", training
    yield "missing", missing()


def as_lines(section: str, findings: dict[str, object]) -> list[str]:
    """Aligned lines of one section."""
    lines = [section]
    width = max(map(len, findings), default=0)
    for name, value in findings.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        text = ", ".join(value) if isinstance(value, list) else str(value)
        lines.append(f"  {name.replace('_', ' '):<{width}}  {text}")
    return lines if findings else [*lines, "  nothing"]


def main() -> None:
    folder = pathlib.Path(_FOLDER.value)
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is not a folder")
    job.check_writable(_OUT.value)
    found = {}
    if is_toy := _CONFIG.value is None:
        flags.FLAGS["config"].parse(_TOY)
    for section, findings in examine(folder, _CONFIG.value, is_toy):
        found[section] = findings
        print("\n".join(as_lines(section, findings)), flush=True)
    if _OUT.value:
        paths.write_atomically(
            pathlib.Path(_OUT.value), json.dumps(found, indent=1) + "\n"
        )
    absent = [name for name, v in found["versions"].items() if v == "missing"]
    if absent:
        raise ValueError(
            f"{', '.join(absent)} not installed; requirements.txt lists what is needed"
        )


if __name__ == "__main__":
    job.run(main, "doctor")
