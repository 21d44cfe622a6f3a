"""Prepares training data: video shards, latents of the videos, states of the captions.

    python -m sora_jax.prepare --source toyworld:tw32 --num_clips 8000 --out shards
    python -m sora_jax.prepare --source folder:my_videos --size 64x64 --num_frames 17 \\
        --fps 8 --out shards
    python -m sora_jax.prepare --source folder:my_videos --size native --max_tokens 4096 \\
        --num_frames 49,17,5 --fps native --out shards
    python -m sora_jax.prepare --source webdataset:tars --size 64x64 --out shards
    python -m sora_jax.prepare --source list:train.csv --videos my_videos --out shards
    python -m sora_jax.prepare --source shards:shards --curate policy.toml --out curated
    python -m sora_jax.prepare --source shards:shards --vae runs/toy_vae --out latents
    python -m sora_jax.prepare --source latents:latents --text_encoder runs/toy_text

The source is a tier of the toy world, videos, video shards, or latents. A
folder may be at an address, such as folder:gs://bucket/videos. It holds videos, or
folders of numbered frames (clip/00001.jpg, with --frames_fps), and captions: clip.txt or
clip.json beside clip.mp4, or a list: captions.csv or .jsonl (file,caption), metadata.csv
or .jsonl (file_name,text), or prompts.txt with videos.txt. WebDataset's tar archives and
other projects' lists are read as well, with the flags of a folder; data/README.md has
their forms.

The same command resumes an interrupted job, and later adds new videos. Videos that are
left out are listed in the output and in OUT/report.json. --inspect looks at a folder of
videos without making clips. With --text_encoder, the states
of the captions are stored beside the latents. Several processes share the work; each uses
its first device.
"""

import functools
import os
import pathlib
import re
import shlex
import sys
import time

from absl import flags

from sora_jax.core import job
from sora_jax.core import mesh as meshes
from sora_jax.data import (
    beam,
    folders,
    inspection,
    remote,
    reports,
    shape_classes,
    shards,
    toy_clips,
    video_clips,
    video_lists,
    webdataset,
)
from sora_jax.data.curation import curated as curation
from sora_jax.data.curation import policy

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "What to read: toyworld:TIER, folder:DIR, folder:gs://BUCKET/DIR (or another "
    "address), webdataset:DIR, list:FILE, shards:DIR or latents:DIR. DIR of webdataset "
    "and FILE may be patterns, such as tars/*.tar.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Worker processes; default: one per core.", lower_bound=0
)
_RUNNER = flags.DEFINE_string(
    "runner",
    None,
    "Run on Apache Beam instead of worker processes: DirectRunner, DaskRunner, "
    "DataflowRunner, FlinkRunner, ...; see sora_jax/data/README.md.",
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options",
    "",
    "Options of Beam and its runner, such as '--direct_num_workers=2 "
    "--direct_running_mode=multi_processing'.",
)
_SPLIT = flags.DEFINE_string(
    "split", "train", "Toy world: split to draw. Folder: name of the split to write."
)
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 8000, "Toy world: number of clips.")
_FAMILIES = flags.DEFINE_string(
    "families", None, "Toy world: weights such as attribute:0.25,motion:0.75."
)
_KIND = flags.DEFINE_enum(
    "kind",
    "scenes",
    toy_clips.KINDS,
    "Toy world: scenes; groups of a clip, the same with an edit, and two others of its "
    "thing; loops; or rates, clips of 4, 8 and 16 frames a second.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Toy world: seed.")
_SIZE = flags.DEFINE_string(
    "size",
    "64x64",
    "Folder: WIDTHxHEIGHT of the clips; or native: each video keeps its aspect, and is "
    "scaled down where --max_tokens asks for it.",
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Folder, --size native: tokens of a clip, at most. A token is --multiple_of pixels a "
    "side, of one frame or of four.",
)
_MULTIPLE_OF = flags.DEFINE_integer(
    "multiple_of",
    16,
    "Folder, --size native: sides are multiples of this: the spatial stride of the video "
    "VAE times the patch of the denoiser.",
)
_NUM_FRAMES = flags.DEFINE_list(
    "num_frames",
    ["17"],
    "Folder: frames per clip, 1 + 4n. Of several numbers, such as 49,17,5, each clip has "
    "the largest that its video or shot fills.",
)
_FPS = flags.DEFINE_string(
    "fps",
    "8",
    "Folder: frames per second of the clips; or native: those of the video, or every "
    "second, third, ... frame where --max_fps asks for it.",
)
_MAX_FPS = flags.DEFINE_float(
    "max_fps", 30.0, "Folder, --fps native: frames per second, at most."
)
_FRAMES_FPS = flags.DEFINE_float(
    "frames_fps",
    None,
    "Folder: frames per second of folders of numbered frames; without it they are "
    "not read.",
)
_COLOUR = flags.DEFINE_enum(
    "colour",
    None,
    ["bt601", "bt709", "bt2020"],
    "Folder: colour matrix of videos that do not state theirs.",
)
_CAPTION_ENCODING = flags.DEFINE_string(
    "caption_encoding",
    None,
    "Folder: encoding of captions that are not UTF-8, such as cp1252; without it they "
    "are not read.",
)
_LOSSLESS = flags.DEFINE_boolean("lossless", False, "Folder: store frames losslessly.")
_FOLLOW_LINKS = flags.DEFINE_boolean(
    "follow_links", False, "Folder: follow links to files outside of it."
)
_ALLOW_HTTP = flags.DEFINE_boolean(
    "allow_http", False, "Folder: allow addresses of web servers, http and https."
)
_MAX_GIB = flags.DEFINE_float("max_gib", 64, "Folder: skip larger videos, in GiB.")
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 86400, "Folder: skip longer videos, in seconds."
)
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes",
    60,
    "Folder: give up on a video, or on 64 MiB of a larger one, after so many minutes "
    "of work; needs worker processes.",
)
_MAX_SIDE = flags.DEFINE_integer(
    "max_side",
    None,
    "Folder: skip videos that are wider or higher than this, in pixels, or have more "
    "pixels per frame than its square.",
    lower_bound=1,
    upper_bound=10**9,
)
_INSPECT = flags.DEFINE_string(
    "inspect",
    None,
    "Folder: write this contact sheet (.png or .jpg) instead of clips, and print what "
    "the videos are and which would be refused. --text_encoder also counts tokens.",
)
_VIDEOS = flags.DEFINE_string(
    "videos", None, "List: folder of its videos; default: the list's."
)
_SPLIT_SHOTS = flags.DEFINE_boolean(
    "split_shots",
    True,
    "Folder: begin clips anew where a video cuts to another shot, so that none holds a "
    "cut.",
)
_CURATE = flags.DEFINE_string(
    "curate",
    None,
    "Shards: a policy (TOML, see sora_jax/data/README.md). Scores the clips and writes "
    "those that it keeps. The source may be several folders, separated by commas.",
)
_VAE = flags.DEFINE_string("vae", None, "Shards: run or folder of a video VAE.")
_PICTURES = flags.DEFINE_integer(
    "pictures",
    0,
    "Video VAE: encode so many frames of each clip, and its last three, alone as well, "
    "which a denoiser may be given (known.probabilities: tail, both, keyframes and, with "
    "all frames, every).",
    lower_bound=0,
    upper_bound=10_000,
)
_REGIONS = flags.DEFINE_boolean(
    "regions",
    False,
    "Video VAE: encode a part of each clip with the rest in grey as well, which a "
    "denoiser may be given (known.probabilities: region).",
)
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Shards, latents: run or folder of a text encoder."
)
_TEXT_TIERS = flags.DEFINE_list(
    "text_tiers", None, "Text encoder: caption tiers to encode; default: all."
)
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", None, "Text encoder: tokens per caption; default: its run's, or 512."
)
_TEXT_CLEAN = flags.DEFINE_boolean(
    "text_clean", None, "Text encoder: clean captions; default: as its run, or true."
)
_TEXT_DTYPE = flags.DEFINE_enum(
    "text_dtype", "bfloat16", ["bfloat16", "float32"], "Text encoder: type of states."
)

# The flags of each source; the others are refused.
_OF_TEXT = {"text_tiers", "text_length", "text_clean", "text_dtype"}
_ENGINE = {"workers", "runner", "beam_options"}
_OF_VIDEOS = {"out", "size", "num_frames", "fps", "lossless", "split", *_ENGINE}
_OF_VIDEOS |= {"max_gib", "max_seconds", "max_side", "max_minutes", "colour"}
_OF_VIDEOS |= {"caption_encoding", "inspect", "text_encoder", "split_shots"}
_OF_NATIVE = {"max_tokens": _SIZE, "multiple_of": _SIZE, "max_fps": _FPS}
_OF_VIDEOS |= _OF_NATIVE.keys()
_BELONGS = {
    "toyworld": {"out", "num_clips", "families", "kind", "seed", "split", *_ENGINE},
    "folder": _OF_VIDEOS | {"follow_links", "frames_fps", "allow_http"},
    "webdataset": _OF_VIDEOS,
    "list": _OF_VIDEOS | {"follow_links", "videos"},
    "shards": {"out", "vae", "pictures", "regions", "text_encoder", *_OF_TEXT},
    "shards with --curate": {"out", "curate", "workers"},
    "latents": {"text_encoder", *_OF_TEXT},
}


def source_of(kind: str, name: str) -> shards.Source:
    """Returns the clips that --source names, with the settings of its flags."""
    if kind == "toyworld":
        return toy_clips.ToyClips(
            name,
            _NUM_CLIPS.value,
            _SPLIT.value,
            toy_clips.parse_families(_FAMILIES.value),
            _SEED.value,
            _KIND.value,
        )
    address = kind == "folder" and remote.is_address(name)
    for flag, means in (
        (_FOLLOW_LINKS, not address),
        (_ALLOW_HTTP, address and name.startswith("http")),
    ):
        if flag.value and not means:
            raise ValueError(f"--{flag.name} has no meaning for {name}")
    folder, make = pathlib.Path(name), video_clips.FolderClips
    if address:
        folder = remote.RemoteFolder(name, _ALLOW_HTTP.value)
    elif kind == "webdataset":
        folder, names = folders.matching(name, (webdataset.SUFFIX,))
        make = functools.partial(video_clips.TarClips, archives=tuple(names))
    elif kind == "list":
        root, names = folders.matching(name, video_lists.SUFFIXES)
        lists = {name: root / name for name in names}
        folder = pathlib.Path(_VIDEOS.value) if _VIDEOS.value else root
        make = functools.partial(video_clips.ListClips, lists=lists)
    flag, read = _INSPECT if _INSPECT.value else _OUT, pathlib.Path(name)
    out = pathlib.Path(flag.value).resolve()
    if not address and read.is_dir() and out.is_relative_to(read.resolve()):
        raise ValueError(
            f"--{flag.name} {flag.value} lies inside {read}; write elsewhere"
        )
    if not re.fullmatch(r"\w+", _SPLIT.value):
        raise ValueError(f"--split is one word, not {_SPLIT.value!r}")
    return make(
        folder,
        size_of_clips(),
        tuple(map(number, _NUM_FRAMES.value)),
        None if _FPS.value == "native" else number(_FPS.value, "fps", float),
        _LOSSLESS.value,
        _SPLIT.value,
        video_clips.limits(
            _MAX_GIB.value, _MAX_SECONDS.value, _MAX_SIDE.value, _MAX_MINUTES.value
        ),
        _FOLLOW_LINKS.value,
        colour=_COLOUR.value,
        frames_fps=_FRAMES_FPS.value,
        caption_encoding=_CAPTION_ENCODING.value,
        split_shots=_SPLIT_SHOTS.value,
        max_fps=_MAX_FPS.value,
    )


def size_of_clips() -> tuple[int, int] | shape_classes.Budget:
    """Returns the size or the budget that the flags ask for."""
    if _SIZE.value != "native":
        return job.parse_size(_SIZE.value)
    if _MAX_TOKENS.value is None:
        raise ValueError(
            "--size native needs --max_tokens, such as 32760 for 81 frames of 832x480"
        )
    return shape_classes.Budget(_MAX_TOKENS.value, _MULTIPLE_OF.value)


def number(text: str, flag: str = "num_frames", kind: type = int) -> float:
    """Reads a number of a flag."""
    try:
        return kind(text)
    except ValueError:
        what = {int: "numbers such as 49,17", float: "a number, or native"}[kind]
        raise ValueError(f"--{flag} is {what}, not {text!r}") from None


def curated(name: str, num_workers: int) -> curation.CuratedClips:
    """Returns the clips of folders of shards that the policy of --curate keeps."""
    out = pathlib.Path(_OUT.value)
    folders = [pathlib.Path(folder) for folder in name.split(",")]
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {out} lies inside {folder}; write elsewhere")
    opened = tuple(map(shards.open, folders))
    read = policy.read(_CURATE.value)
    return curation.CuratedClips(opened, read, out, num_workers)


def check_flags(kind: str, known: dict[str, set[str]]) -> None:
    """Refuses flags that the source does not use."""
    for name in sorted(set().union(*known.values()) - known[kind]):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} has no meaning for --source {kind}")
    for name, flag in _OF_NATIVE.items():
        if flags.FLAGS[name].present and flag.value != "native":
            raise ValueError(f"--{name} has no meaning without --{flag.name} native")
    if _INSPECT.value and _OUT.value:
        raise ValueError("--inspect writes no clips: give it or --out")
    if _RUNNER.value and (_INSPECT.value or flags.FLAGS["workers"].present):
        wrong = "inspect" if _INSPECT.value else "workers"
        raise ValueError(f"--{wrong} has no meaning with --runner, which has workers")
    if _BEAM_OPTIONS.value and not _RUNNER.value:
        raise ValueError("--beam_options has no meaning without --runner")
    if "out" in known[kind] and not (_OUT.value or _INSPECT.value):
        raise ValueError("give --out, the folder to write")
    if "inspect" in known[kind] and _TEXT_ENCODER.value and not _INSPECT.value:
        raise ValueError("--text_encoder has no meaning for videos without --inspect")
    for name in sorted(_OF_TEXT):
        if flags.FLAGS[name].present and not _TEXT_ENCODER.value:
            raise ValueError(f"--{name} has no meaning without --text_encoder")


def encode(kind: str, name: str) -> None:
    """Encodes shards to latents and, with --text_encoder, captions to states."""
    path, flag, what = {
        "shards": (_VAE.value, "vae", "a video VAE"),
        "latents": (_TEXT_ENCODER.value, "text_encoder", "a text encoder"),
    }[kind]
    if not path:
        raise ValueError(f"--source {kind}:DIR needs --{flag}, the run of {what}")
    from sora_jax.training import encode_latents, encode_text  # slow to import

    meshes.initialize()
    folder, began = name if kind == "latents" else _OUT.value, time.monotonic()
    job.lock_folder(folder)
    if kind == "shards":
        encode_latents.encode(
            name,
            _VAE.value,
            folder,
            pictures=_PICTURES.value,
            with_regions=_REGIONS.value,
        )
        print(f"{folder}: latents of {name}; {time.monotonic() - began:.1f} s")
    if encoder := _TEXT_ENCODER.value:
        length, clean, dtype = _TEXT_LENGTH.value, _TEXT_CLEAN.value, _TEXT_DTYPE.value
        encode_text.encode(
            folder, encoder, _TEXT_TIERS.value, length=length, clean=clean, dtype=dtype
        )
        where = encode_text.cache_folder(folder)
        print(f"{where}: states by {encoder}; {time.monotonic() - began:.1f} s")


def inspect(source: video_clips.FolderClips, num_workers: int) -> None:
    """Says what a folder of videos holds, and draws a contact sheet."""
    sheet = pathlib.Path(_INSPECT.value)
    if sheet.suffix.lower() not in (".png", ".jpg"):
        raise ValueError(f"--inspect is a file .png or .jpg to write, not {sheet}")
    job.check_writable(sheet)
    count_tokens = None
    if encoder := _TEXT_ENCODER.value:
        from sora_jax.training import initial  # slow to import

        _, tokenizer = initial.read_tokenizer(pathlib.Path(encoder), clean=False)
        count_tokens = lambda text: len(tokenizer.ids(text))  # noqa: E731
    seen = inspection.inspect(source, num_workers)
    for line in inspection.describe(source, seen, count_tokens):
        print(line)
    if seen:
        for line in inspection.write_sheet(sheet, seen):
            print(line)


def main() -> None:
    kind, _, name = _SOURCE.value.partition(":")
    if kind not in _BELONGS or not name:
        raise ValueError(
            "--source is toyworld:TIER, folder:DIR, webdataset:DIR, list:FILE, shards:DIR "
            f"or latents:DIR, not {_SOURCE.value!r}"
        )
    curates = kind == "shards" and _CURATE.value
    check_flags("shards with --curate" if curates else kind, _BELONGS)
    if kind in ("shards", "latents") and not curates:
        encode(kind, name)
        return
    began = time.monotonic()
    workers = _WORKERS.value
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)  # what Linux lets us use
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    engine = None
    if _RUNNER.value:
        engine = beam.Engine(_RUNNER.value, tuple(shlex.split(_BEAM_OPTIONS.value)))
    source = curated(name, workers) if curates else source_of(kind, name)
    if _INSPECT.value:
        inspect(source, workers)
        return
    out = pathlib.Path(_OUT.value)
    job.lock_folder(out)
    for line in reports.difference(out, source):
        print(line)
    try:
        manifest = shards.write(out, source, num_workers=workers, engine=engine)
    except KeyboardInterrupt:
        if engine is None:
            raise
        # Not in an orderly way, in which Python would wait for threads of the runner.
        print("\nprepare: interrupted; the same command resumes", file=sys.stderr)
        os._exit(130)
    lines = reports.summary(out, manifest, time.monotonic() - began)
    if isinstance(source, video_clips.FolderClips):
        lines += reports.accounts(out, source)
    if curates:
        from sora_jax.evals.videos import curation_page  # slow to import

        lines += curation_page.write(out / "curation.html", source)
    for line in lines:
        print(line)


if __name__ == "__main__":
    job.run(main, "prepare")
