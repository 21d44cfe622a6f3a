"""Makes training data: the toy world or a folder of videos to shards, shards to latents.

    python -m sora_jax.prepare --source toyworld:tw32 --num_clips 8000 --out shards
    python -m sora_jax.prepare --source folder:my_videos --size 64x64 --num_frames 17 \\
        --fps 8 --out shards
    python -m sora_jax.prepare --source shards:shards --vae runs/toy_vae --out latents

A folder holds mp4, mov, m4v, webm, mkv or gif files, and captions beside them: clip.txt,
clip.json, or one captions.jsonl or captions.csv. The same command again goes on where it
was interrupted, and does nothing once it is finished. What is left out is listed with
the reason, here and in OUT/report.json.
"""

import json
import math
import os
import pathlib
import re
import sys
import time

from absl import app, flags, logging

from sora_jax.core import job
from sora_jax.data import curate, shards, toy_clips

_SOURCE = flags.DEFINE_string(
    "source", None, "toyworld:TIER, folder:DIR or shards:DIR.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes; default: one for each core.", lower_bound=0
)
_SPLIT = flags.DEFINE_string("split", "train", "Split of the toy world; name of ours.")
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 8000, "Toy world: clips.")
_FAMILIES = flags.DEFINE_string(
    "families", None, "Toy world: weights such as attribute:0.25,motion:0.75."
)
_SEED = flags.DEFINE_integer("seed", 0, "Toy world: seed.")
_SIZE = flags.DEFINE_string("size", "64x64", "Folder: height x width of the clips.")
_NUM_FRAMES = flags.DEFINE_integer(
    "num_frames", 17, "Folder: frames of a clip, 1 + 4n."
)
_FPS = flags.DEFINE_float("fps", 8.0, "Folder: frames a second of the clips.")
_LOSSLESS = flags.DEFINE_boolean("lossless", False, "Folder: keep frames exactly.")
_VAE = flags.DEFINE_string("vae", None, "Shards: run or folder of the video VAE.")

# Which flags belong to which source; one that is given in vain is a mistake.
_BELONGS = {
    "toyworld": {"num_clips", "families", "seed", "split", "workers"},
    "folder": {"size", "num_frames", "fps", "lossless", "split", "workers"},
    "shards": {"vae"},
}
_LISTED = 20


def parse_families(text: str | None) -> dict[str, float] | None:
    """Reads `motion:0.6,count:0.4`; raises ValueError where it is something else."""
    if text is None:
        return None
    families = {}
    for entry in text.split(","):
        name, colon, weight = entry.strip().partition(":")
        try:
            families[name] = float(weight) if colon else math.nan
        except ValueError:
            families[name] = math.nan
        if not 0 <= families[name] < math.inf:
            raise ValueError(f"--families has {entry!r}; write motion:0.6,count:0.4")
    return families


def parse_size(text: str) -> tuple[int, int]:
    """Reads `64x96` as (64, 96); raises ValueError where it is something else."""
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise ValueError(f"--size is height x width, such as 64x96, not {text!r}")
    return int(match[1]), int(match[2])


def source_of(kind: str, name: str) -> shards.Source:
    """Returns what --source names, with the flags that belong to it."""
    if kind == "toyworld":
        return toy_clips.ToyClips(
            name,
            _NUM_CLIPS.value,
            _SPLIT.value,
            parse_families(_FAMILIES.value),
            _SEED.value,
        )
    folder = pathlib.Path(name)
    if pathlib.Path(_OUT.value).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {_OUT.value} lies inside {folder}; write elsewhere")
    if not re.fullmatch(r"\w+", _SPLIT.value):
        raise ValueError(f"--split is one word, not {_SPLIT.value!r}")
    return curate.FolderClips(
        folder,
        parse_size(_SIZE.value),
        _NUM_FRAMES.value,
        _FPS.value,
        _LOSSLESS.value,
        _SPLIT.value,
    )


def check_flags(kind: str, known: dict[str, set[str]]) -> None:
    """Refuses flags that the source does not use."""
    for name in sorted(set().union(*known.values()) - known[kind]):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} has no meaning for --source {kind}:...")


def print_report(out: pathlib.Path, manifest: dict, seconds: float) -> None:
    """Prints what has been made and what was left out."""
    report = json.loads((out / "report.json").read_text())
    for skipped in report["skipped"][:_LISTED]:
        print(f"skipped {skipped['file']}: {skipped['reason']}")
    if len(report["skipped"]) > _LISTED:
        more = len(report["skipped"]) - _LISTED
        print(f"skipped {more} more; all are listed in {out / 'report.json'}")
    if manifest["without_caption"]:
        print(f"{manifest['without_caption']} clips have no caption")
    captions = ", ".join(f"{n} {tier}" for tier, n in manifest["captions"].items())
    print(
        f"{out}: {manifest['num_clips']} clips of {manifest['num_frames']} frames, "
        f"{manifest['height']}x{manifest['width']}, {manifest['fps']:g} fps; captions: "
        f"{captions or 'none'}; {len(report['skipped'])} skipped; {seconds:.1f} s"
    )


def run() -> None:
    """Does what the flags say."""
    kind, _, name = _SOURCE.value.partition(":")
    if kind not in _BELONGS or not name:
        raise ValueError(
            f"--source is toyworld:TIER, folder:DIR or shards:DIR, not {_SOURCE.value!r}"
        )
    check_flags(kind, _BELONGS)
    out = pathlib.Path(_OUT.value)
    began = time.monotonic()
    if kind == "shards":
        if not _VAE.value:
            raise ValueError("--source shards:DIR needs --vae, the run of a video VAE")
        from sora_jax.core import mesh as meshes  # brings in JAX
        from sora_jax.training import latents

        meshes.initialize()
        latents.encode(name, _VAE.value, out)
        print(f"{out}: latents of {name}; {time.monotonic() - began:.1f} s")
        return
    workers = _WORKERS.value
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)  # what Linux lets us use
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    manifest = shards.write(out, source_of(kind, name), num_workers=workers)
    print_report(out, manifest, time.monotonic() - began)


def main(arguments):
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}")
    try:
        run()
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: {error}")


if __name__ == "__main__":
    job.run(main, "prepare")
