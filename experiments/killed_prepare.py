"""Kills `prepare` at random moments: are the files those of a run that nobody disturbed?

    python -m experiments.killed_prepare [--files 500] [--kills 10] [--seed 0]

Makes a folder of so many files: videos of twelve kinds with names in several scripts and
captions in all forms, folders of frames, damaged and hostile files, pictures, captions of
nothing, and others. `prepare` reads it once undisturbed. Then the same command is started
again and again into another folder; each time its whole process group gets kill -9 at a
random moment of the work, and after the last kill it may finish. All files of both folders must be
equal, byte for byte, and every input must have clips or a reason. Exits with 1 otherwise.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import PIL.Image

from sora_jax.core import digests, paths
from sora_jax.data import shards
from tests.data import hostile_files
from tests.data.test_video_io import film

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = (
    "a red film {}", "猫が寝ている {}", "кошка спит {}", "قطة نائمة {}", "बिल्ली {}",
    "고양이 {}", "mačka spí {}", "🎬 {}", "γάτα {}", "it's 100% (copy) {}",
)  # fmt: skip
FORMS = ("txt", "utf16", "json", "tiers", "csv", "jsonl", "lines", "none")


@dataclasses.dataclass
class Inputs:
    """What a folder holds, by names relative to it.

    Attributes:
      whole: videos that must give clips, and the captions that these must have.
      damaged: what may give clips, or else must have a reason.
      useless: what must have a reason: no video, nor a caption of one.
      files: number of all files.
    """

    whole: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    damaged: list[str] = dataclasses.field(default_factory=list)
    useless: list[str] = dataclasses.field(default_factory=list)
    files: int = 0


# -- the folder -----------------------------------------------------------------------


def make(folder: pathlib.Path, count: int, seed: int) -> Inputs:
    """Writes `count` files: about a third damaged, the others videos with captions."""
    inputs, draw = Inputs(), random.Random(seed)
    (folder / "found").mkdir(parents=True)
    names = hostile_files.make(folder / "found", count // 3, heavy=False)
    inputs.damaged = [f"found/{name}" for name in names]
    whole = hostile_files.sources(folder)
    for number in range(max(1, count // 100)):
        _frames(folder, inputs, f"{draw.choice(NAMES).format(f'frames {number}')}")
    for number in range(count // 25):
        _useless(folder, inputs, number)
    number = 0
    while count_files(folder) + 3 <= count:  # a video has two files besides at most
        kind, form = list(whole)[number % len(whole)], FORMS[number % len(FORMS)]
        name = f"{NAMES[number % len(NAMES)].format(number)}.{kind[2:]}"
        _video(folder, inputs, name, whole[kind], form, f"a film, number {number}")
        number += 1
    for number in range(count - count_files(folder)):
        (folder / f"notes {number}.doc").write_bytes(b"no video")
        inputs.useless.append(f"notes {number}.doc")
    inputs.files = count_files(folder)
    return inputs


def count_files(folder: pathlib.Path) -> int:
    """Returns the number of files at any depth, pipes, sockets and links included."""
    return sum(len(names) for _, _, names in os.walk(folder))


def _frames(folder: pathlib.Path, inputs: Inputs, name: str) -> None:
    (folder / name).mkdir()
    for number, frame in enumerate(film(16)):
        PIL.Image.fromarray(frame).save(folder / name / f"{number:04d}.png")
    (folder / f"{name}.txt").write_text("frames of a film")
    inputs.whole[name] = {"alt": "frames of a film"}


def _useless(folder: pathlib.Path, inputs: Inputs, number: int) -> None:
    """A picture, a caption of no video, or captions that cannot be read."""
    kind = number % 4
    name = f"useless {number}." + ("png", "jpg", "txt", "json")[kind]
    if kind < 2:
        PIL.Image.fromarray(film(1)[0]).save(folder / name)
    else:
        (folder / name).write_bytes((b"of no video", b'{"caption": ')[kind - 2])
    inputs.useless.append(name)


def _video(
    folder: pathlib.Path,
    inputs: Inputs,
    name: str,
    content: bytes,
    form: str,
    text: str,
) -> None:
    """Writes a video, and its caption in one of the forms."""
    listed = form in ("csv", "jsonl", "lines")
    place = folder / form if listed else folder
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    captions = {"alt": text}
    beside = (place / name).with_suffix(
        ".json" if form in ("json", "tiers") else ".txt"
    )
    if form == "txt":
        beside.write_text(text)
    elif form == "utf16":
        beside.write_text(text, "utf-16")
    elif form == "json":
        beside.write_text(json.dumps({"caption": text}))
    elif form == "tiers":
        captions = {"short": text, "dense": f"{text}. It is red."}
        beside.write_text(json.dumps(captions))
    elif form == "csv":
        new = not (place / "captions.csv").exists()
        with (place / "captions.csv").open("a") as file:
            file.write("file,caption\n" * new + f'"{name}","{text}"\n')
    elif form == "jsonl":
        with (place / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    elif form == "lines":
        for list_name, line in (("videos.txt", name), ("prompts.txt", text)):
            with (place / list_name).open("a") as file:
                file.write(f"{line}\n")
    else:
        captions = {}
    inputs.whole[f"{form}/{name}" if listed else name] = captions


# -- the runs -------------------------------------------------------------------------


def start(folder: pathlib.Path, out: pathlib.Path, log: pathlib.Path):
    """Starts `prepare` in a process group of its own."""
    command = [sys.executable, "-m", "sora_jax.prepare", "--source", f"folder:{folder}"]
    command += ["--size", "64x48", "--num_frames", "5", "--fps", "4", "--workers", "2"]
    command += ["--frames_fps", "8", "--out", str(out)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(folder: pathlib.Path, out: pathlib.Path, log: pathlib.Path) -> float:
    """Runs `prepare` to its end and returns the seconds; raises RuntimeError."""
    began = time.monotonic()
    process = start(folder, out, log)
    if code := process.wait():
        raise RuntimeError(f"prepare ended with {code}: {log.read_text()[-2000:]}")
    return time.monotonic() - began


def kill(
    folder: pathlib.Path,
    out: pathlib.Path,
    log: pathlib.Path,
    moment: float,
    pace: float,
) -> str:
    """Starts `prepare`, kills its group at a moment, and says what there was then.

    Args:
      folder, out, log: see `start`.
      moment: parts that must be finished; its fraction is a share of `pace` to wait then.
      pace: seconds a part.
    """
    process, began = start(folder, out, log), time.monotonic()
    while process.poll() is None and parts_of(out) < int(moment):
        time.sleep(0.01)
    try:
        code = process.wait(moment % 1 * pace)
        return f"ended with {code} before the kill"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - began
    return f"killed after {seconds:5.2f} s, {parts_of(out)} parts of the clips finished"


def parts_of(out: pathlib.Path) -> int:
    """Returns the number of finished parts of an unfinished folder."""
    return len([*out.glob(".partial/*/part.json")])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns all files of a folder, apart from the lock of a job."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != paths.LOCK
    }


# -- the accounts ---------------------------------------------------------------------


def faults(inputs: Inputs, out: pathlib.Path, log: pathlib.Path) -> list[str]:
    """Returns which inputs are not accounted for as they must be, a sentence each."""
    made = collections.defaultdict(list)
    for clip in shards.open(out):
        made[clip.id.rpartition("#")[0]].append(dict(clip.captions))
    reasons = collections.defaultdict(list)
    for one in json.loads(digests.read(out / "report.json"))["skipped"]:
        # A part of a video is named "a.mp4 from 3.00 s on".
        reasons[one["file"].partition(" from ")[0]].append(one["reason"])
    found = [
        f"{name}: clips with {made[name]}, not {captions}"
        for name, captions in inputs.whole.items()
        if not made[name] or any(given != captions for given in made[name])
    ]
    for name in inputs.damaged:
        if not made[name] and not any(reasons[name]):
            found.append(f"{name}: neither clips nor a reason")
    for name in inputs.useless:
        if made[name] or not any(reasons[name]):
            found.append(f"{name}: no reason, or clips")
    known = {*inputs.whole, *inputs.damaged}
    found += [
        f"{name}: clips of no input"
        for name in made
        if made[name] and name not in known
    ]
    counted = re.search(
        r"(\d+) files: (\d+) of videos, (\d+) of captions, (\d+) others",
        log.read_text(),
    )
    total, *kinds = map(int, counted.groups())
    if not total == sum(kinds) == inputs.files:
        found.append(f"prepare counts {total} files, {kinds}, not {inputs.files}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as base:
        base = pathlib.Path(base)
        folder, clean, killed = (base / name for name in ("in", "clean", "killed"))
        folder.mkdir()
        inputs = make(folder, args.files, args.seed)
        print(
            f"{inputs.files} files: {len(inputs.whole)} whole videos, "
            f"{len(inputs.damaged)} damaged or hostile inputs, {len(inputs.useless)} "
            "that are no video, and captions",
            flush=True,
        )
        seconds = finish(folder, clean, base / "clean.log")
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        print(*(base / "clean.log").read_text().splitlines()[-2:], sep="\n")
        # A file of records for each part.
        parts = len([*clean.glob("*.array_record-*")])
        moments = sorted(draw.uniform(0, parts) for _ in range(args.kills))
        ended = 0
        for moment in moments:
            said = kill(folder, killed, base / "killed.log", moment, seconds / parts)
            ended += said.startswith("ended")
            print(said, flush=True)
        seconds = finish(folder, killed, base / "killed.log")
        print(f"then to its end: {seconds:.1f} s")
        a, b = contents(clean), contents(killed)
        different = sorted(
            name for name in a.keys() | b.keys() if a.get(name) != b.get(name)
        )
        size = sum(map(len, a.values()))
        print(f"{len(a)} files, {size} bytes; different: {different or 'none'}")
        wrong = [
            f"{out.name}: {fault}"
            for out in (clean, killed)
            for fault in faults(inputs, out, base / f"{out.name}.log")
        ]
        print(f"inputs that are not accounted for: {len(wrong)}", *wrong[:20], sep="\n")
        print(f"kills that hit a running job: {args.kills - ended} of {args.kills}")
    if different or wrong or ended:
        sys.exit(1)


if __name__ == "__main__":
    main()
