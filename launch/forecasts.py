"""Runs preflight for the shipped recipes on TPU slices, and writes a table of them.

    python launch/forecasts.py [--only wan_14b] [--table]

Runs `preflight` for each row below, which takes a few minutes, stores its report in
launch/forecasts.json, and writes the table launch/forecasts.md. `--only` runs the rows
whose command contains a text, `--table` none. Needs libtpu.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORTS, TABLE = ROOT / "launch" / "forecasts.json", ROOT / "launch" / "forecasts.md"

_720P = {"sample.height": 720, "sample.width": 1280, "sample.num_frames": 81}
_480P = {"sample.height": 480, "sample.width": 832, "sample.num_frames": 81}
_MINUTE = _480P | {"sample.num_frames": 961}  # at 16 frames a second
# The inputs of the blocks are kept in host memory.
_OFFLOAD = {"model.dit.remat": "offload"}
# On latents of Wan 2.2's video VAE, 4 x 16 x 16 with 48 channels.
_COARSE = {"model.dit.in_channels": 48, "model.dit.out_channels": 48}
_COARSE |= {
    "model.vae.latent_channels": 48,
    "model.vae.patch_size": 2,
    "model.vae.base_dim": 160,
    "model.vae.residual_shortcuts": True,
    "model.vae.temporal_downsample": "(False,True,True)",
}
# Recipe, job, slice, mesh, rows of a step, changed fields of the config.
ROWS = [
    ("s", "train", "v5e:4x4", "fsdp=16", 256, {}),
    ("b", "train", "v5e:4x4", "fsdp=16", 256, {}),
    ("l", "train", "v6e:4x4", "fsdp=4,ulysses=4", 64, {}),
    ("wan_1_3b", "train", "v5e:2x2", "ulysses=4", 1, _480P),
    ("wan_5b", "train", "v6e:4x4", "fsdp=4,ulysses=4", 4, {}),
    ("wan_14b", "train", "v5p:2x2x1", "ulysses=4", 1, _720P),
    ("wan_14b", "train", "v6e:4x4", "ring=2,ulysses=8", 1, _720P),
    ("wan_14b", "train", "tpu7x:2x2x1", "fsdp=2,ulysses=4", 2, _720P | _OFFLOAD),
    ("wan_14b", "train", "v6e:4x4", "fsdp=2,ulysses=8", 2, _480P),
    ("wan_14b", "train", "v6e:2x4", "ulysses=8", 1, _480P | _OFFLOAD),
    ("wan_14b", "train", "v5p:4x4x4", "ring=8,ulysses=8", 1, _MINUTE),
    ("wan_14b", "train", "v6e:16x16", "fsdp=2,ring=16,ulysses=8", 2, _MINUTE),
    ("wan_14b", "train", "v5p:4x4x4", "ring=8,ulysses=8", 1, _MINUTE | _COARSE),
    ("wan_14b", "train", "v6e:16x16", "fsdp=4,ring=8,ulysses=8", 4, _MINUTE | _COARSE),
    ("wan_14b", "sample", "v5p:2x2x1", "ulysses=4", 1, _720P),
    ("wan_14b", "sample", "v5p:4x4x4", "ring=8,ulysses=8", 1, _MINUTE),
    ("wan_14b", "sample", "v6e:16x16", "fsdp=2,ring=16,ulysses=8", 1, _MINUTE),
    ("wan_14b", "sample", "v5p:4x4x4", "ring=8,ulysses=8", 1, _MINUTE | _COARSE),
    ("wan_14b", "sample", "v6e:16x16", "fsdp=4,ring=8,ulysses=8", 1, _MINUTE | _COARSE),
]
_DEVICES_A_CHIP = {"tpu7x": 2}
GIB = 2**30


def arguments(row) -> list[str]:
    """The arguments of preflight for a row."""
    recipe, job, topology, mesh, rows, changes = row
    changes = {"data.batch_size": rows} | changes if job == "train" else changes
    flags = [
        f"--config=configs/{recipe}.py",
        f"--topology={topology}",
        f"--mesh={mesh}",
    ]
    flags += [f"--job={job}"] * (job != "train")
    return flags + [f"--config.{name}={value}" for name, value in changes.items()]


def run(flags: list[str]) -> dict:
    """Runs preflight; returns its report, or why the program does not fit.

    Raises:
      RuntimeError: it failed for another reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "found.json")
        command = [sys.executable, "-m", "sora_jax.preflight", *flags, f"--out={out}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if out.exists():
            return json.loads(out.read_text())
    message = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode != 1 or "does not fit" not in message[0]:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-2000:]}")
    return {"refused": message[0].removeprefix("preflight: ")}


def clip(row, report: dict) -> str:
    """The column of a row's clips."""
    changes = row[-1]
    names = ("sample.num_frames", "sample.height", "sample.width")
    size = " x ".join(str(changes[name]) for name in names) if changes else "recipe's"
    size += ", 4 x 16 x 16" * ("model.vae.latent_channels" in changes)
    return size + (f" ({report['tokens']:,} tokens)" if "tokens" in report else "")


def line(row, report: dict) -> str:
    """A row of the table."""
    recipe, job, topology, mesh, rows, _ = row
    cells = [f"`{recipe}`", job, clip(row, report), f"{topology}, {mesh}"]
    if "refused" in report:
        return (
            "| " + " | ".join([*cells, str(rows), report["refused"], *[""] * 6]) + " |"
        )
    used, hbm = sum(report["memory"].values()) / GIB, report["hbm"] / GIB
    chips = report["devices"] / _DEVICES_A_CHIP.get(report["kind"], 1)
    cells += [
        str(report["rows"]),
        f"{used:.1f} of {hbm:.2f} GiB ({report['used']:.0%})"
        + ", **too much**" * (report["used"] > 1),
        f"{report['recompute']:.2f}",
        f"{report['seconds']:.3g} s",
        f"{chips * report['seconds'] / report['rows']:.3g}",
        f"{report['seconds_per_clip']:.3g} s" if job == "sample" else "",
        f"{report['mfu']:.0%}",
        f"{report['compile_seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def table(reports: dict[str, dict]) -> str:
    """The whole file, for the rows that have been compiled.

    Args:
      reports: by the arguments of preflight, as one text.
    """
    done = [row for row in ROWS if shlex.join(arguments(row)) in reports]
    errors = next(
        (one["estimate_errors"] for one in reports.values() if "hbm" in one), {}
    )
    listed = "; ".join(f"{name}: {error:+.1%}" for name, error in errors.items())
    return "\n".join(
        [
            "# What the recipes need on TPU slices",
            "",
            "Written by `python launch/forecasts.py` from the reports of `preflight` in "
            "launch/forecasts.json.",
            "Compiled for these slices, and not run. Times and MFU are estimates. Where "
            "times are published, the errors of the estimates are: " + listed + ".",
            "A device of tpu7x is a core, and two cores are a chip. The job `train` is a "
            "train step; `sample` is a step of the sampler, and a clip takes all steps. "
            "The rows of a step are computed together; the time of a clip is divided by "
            "their number.",
            "",
            "| recipe | job | clips | slice, mesh | rows | memory of a device | operations: "
            "program / formula | time of a step | chip seconds per row | time of a clip | "
            "MFU | compile time |",
            "|" + "---|" * 12,
            *(line(row, reports[shlex.join(arguments(row))]) for row in done),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text that a command contains")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    reports = json.loads(REPORTS.read_text()) if REPORTS.exists() else {}
    commands = [arguments(row) for row in ROWS]
    if not any(args.only in shlex.join(flags) for flags in commands):
        parser.error(f"no row's command contains {args.only!r}")
    for flags in [] if args.table else commands:
        key = shlex.join(flags)
        if args.only not in key:
            continue
        print(key, file=sys.stderr, flush=True)
        reports[key] = run(flags)
        kept = {k: reports[k] for k in map(shlex.join, commands) if k in reports}
        REPORTS.write_text(json.dumps(kept, indent=1) + "\n")
    TABLE.write_text(table(reports))


if __name__ == "__main__":
    main()
