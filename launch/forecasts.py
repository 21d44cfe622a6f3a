"""What the shipped recipes need on TPU slices: preflight of each, and one table of them.

    python launch/forecasts.py [--only wan_14b] [--table]

Runs `preflight` for the rows below, a few minutes each, keeps what it found in
launch/forecasts.json after every row, and writes the table launch/forecasts.md. `--only`
runs those whose command contains the text; `--table` runs none. Needs libtpu.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOUND, TABLE = ROOT / "launch" / "forecasts.json", ROOT / "launch" / "forecasts.md"

_720P = {"sample.height": 720, "sample.width": 1280, "sample.num_frames": 81}
_480P = {"sample.height": 480, "sample.width": 832, "sample.num_frames": 81}
_MINUTE = _480P | {"sample.num_frames": 961}  # at 16 frames a second
# What every block begins with lies in the host's memory.
_OFFLOAD = {"model.dit.remat": "offload"}
# On latents of Wan 2.2's video VAE, 4 x 16 x 16 with 48 channels.
_COARSE = {"model.dit.in_channels": 48, "model.dit.out_channels": 48}
_COARSE |= {
    "model.vae.latent_channels": 48, "model.vae.patch_size": 2, "model.vae.base_dim": 160,
    "model.vae.residual_shortcuts": True,
    "model.vae.temporal_downsample": "(False,True,True)",
}  # fmt: skip
# Recipe, job, slice, mesh, rows of a step, what else is changed.
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
    """What preflight is given for a row."""
    recipe, job, topology, mesh, rows, changes = row
    changes = {"data.batch_size": rows} | changes if job == "train" else changes
    given = [
        f"--config=configs/{recipe}.py",
        f"--topology={topology}",
        f"--mesh={mesh}",
    ]
    given += [f"--job={job}"] * (job != "train")
    return given + [f"--config.{name}={value}" for name, value in changes.items()]


def run(given: list[str]) -> dict:
    """What preflight says: its values, or why it does not fit.

    Raises:
      RuntimeError: it failed for another reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "found.json")
        command = [sys.executable, "-m", "sora_jax.preflight", *given, f"--out={out}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if out.exists():
            return json.loads(out.read_text())
    said = done.stderr.strip().splitlines()[-1:] or ["no word"]
    if done.returncode != 1 or "does not fit" not in said[0]:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-2000:]}")
    return {"refused": said[0].removeprefix("preflight: ")}


def clip(row, found: dict) -> str:
    """A row's clips, as the table says them."""
    changes = row[-1]
    names = ("sample.num_frames", "sample.height", "sample.width")
    size = " x ".join(str(changes[name]) for name in names) if changes else "own size"
    size += ", 4 x 16 x 16" * ("model.vae.latent_channels" in changes)
    return size + (f" ({found['tokens']:,} tokens)" if "tokens" in found else "")


def line(row, found: dict) -> str:
    """A row of the table."""
    recipe, job, topology, mesh, rows, _ = row
    cells = [f"`{recipe}`", job, clip(row, found), f"{topology}, {mesh}"]
    if "refused" in found:
        return (
            "| " + " | ".join([*cells, str(rows), found["refused"], *[""] * 5]) + " |"
        )
    used, hbm = sum(found["memory"].values()) / GIB, found["hbm"] / GIB
    chips = found["devices"] / _DEVICES_A_CHIP.get(found["kind"], 1)
    cells += [
        str(found["rows"]),
        f"{used:.1f} of {hbm:.2f} GiB ({found['used']:.0%})"
        + ", **too much**" * (found["used"] > 1),
        f"{found['recompute']:.2f}",
        f"{found['seconds']:.3g} s, {chips * found['seconds'] / found['rows']:.3g}",
        f"{found['seconds_per_clip']:.3g} s" if job == "sample" else "",
        f"{found['mfu']:.0%}",
        f"{found['compile_seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def table(found: dict[str, dict]) -> str:
    """The whole file, of the rows that have been compiled."""
    done = [row for row in ROWS if shlex.join(arguments(row)) in found]
    errors = next(
        (one["estimate_errors"] for one in found.values() if "hbm" in one), {}
    )
    said = "; ".join(f"{name}: {error:+.1%}" for name, error in errors.items())
    return "\n".join(
        [
            "# What the recipes need on TPU slices",
            "",
            "Written by `python launch/forecasts.py` from launch/forecasts.json, which "
            "holds what `preflight` said.",
            "Compiled for these slices and run on none of them; seconds and MFU are "
            "estimates, whose errors where times are published are: " + said + ".",
            "A device of tpu7x is a core, two of which are a chip; chip seconds count "
            "chips. A sampler's step is one of the sampler, a clip all of them; rows run "
            "at the same time, so each takes as many times as long as there are rows.",
            "",
            "| recipe | job | clips | slice, mesh | rows | a device holds | program's "
            "operations / formula's | a step, chip seconds a row | a clip | MFU | "
            "compiled in |",
            "|" + "---|" * 11,
            *(line(row, found[shlex.join(arguments(row))]) for row in done),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text that a command contains")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    commands = [arguments(row) for row in ROWS]
    if not any(args.only in shlex.join(given) for given in commands):
        parser.error(f"no row's command contains {args.only!r}")
    for given in [] if args.table else commands:
        key = shlex.join(given)
        if args.only not in key:
            continue
        print(key, file=sys.stderr, flush=True)
        found[key] = run(given)
        kept = {k: found[k] for k in map(shlex.join, commands) if k in found}
        FOUND.write_text(json.dumps(kept, indent=1) + "\n")
    TABLE.write_text(table(found))


if __name__ == "__main__":
    main()
