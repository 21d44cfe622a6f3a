"""Runs the whole recipe on one machine; launch/quickstart starts it inside .venv.

    first videos -> shards -> latents -> text encoder -> denoiser -> videos -> scores, report

The first videos are those of the weights that are shipped. Then a text encoder and a
denoiser are trained from scratch, on latents of the shipped video VAE; --from_scratch
trains a video VAE as well. With --recaption the clips have poor captions, as videos of the
web do, and the shipped captioner writes those that the denoiser learns from. The denoiser
gets the time that --minutes leave: it measures its speed in its first steps, and takes as
many as fit. --steps makes a run that can be repeated exactly.

Each stage is a job of `sora_jax`; its command is printed, and its output is kept in
OUT/logs. The same command resumes: finished stages are skipped, and a stopped stage
continues. OUT/timing.json holds the time of each stage and the peak memory.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import pathlib
import pty
import resource
import select
import shlex
import signal
import subprocess
import sys
import termios
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = (
    "attribute:0.15,count:0.1,relation:0.25,motion:0.3,motion_binding:0.1,camera:0.1"
)
# The suites that sora_jax/evaluate.py scores for these families; each has a flag.
SUITES = (
    *("motion", "relation", "attribute"),
    *("motion_held_out", "relation_held_out", "attribute_held_out"),
    *("count", "motion_binding", "camera"),
)
PROMPTS = (
    "a red circle moves left",
    "a blue square moves right",
    "a green triangle moves up",
    "an orange cross moves down",
    "a magenta square moves up",
    "a cyan triangle moves left",
    "a red square left of a blue circle",
    "a green circle right of a yellow triangle",
)
CONFIG, VAE_CONFIG = "configs/toy.py", "configs/toy_vae.py"
TEXT_CONFIG = "configs/toy_text.py"
SHIPPED = "toy"  # the model whose video VAE makes the latents
# With --recaption: tiers that are read, and tokens of the longest caption.
RECAPTIONED = {
    "text__tiers__short": 0.0,
    "text__tiers__medium": 0.0,
    "text__tiers__structured": 0.0,
    "text__tiers__model_short": 0.5,
    "text__tiers__model_dense": 0.5,
    "text__target": "model_dense",
    "text__length": 112,
    "text__target_length": 112,
}
CLIPS, SCORED = 12000, 64
# In a command, the minutes that are left for its stage.
MINUTES = "{minutes}"
LEAST_MINUTES = 1.0  # of the denoiser
MOST_STEPS = 1_000_000  # of the denoiser, whatever the minutes
# Videos, scores and report: seconds on any machine, and a share of the time that the
# encoding of as many clips as CLIPS takes.
AFTER_SECONDS, AFTER_SHARE = 25.0, 2.0
# Huge pages for large arrays: otherwise a training step on CPU spends a fifth of its time
# on page faults. Other C libraries than glibc ignore the setting.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SMOKE = {
    "num_clips": 256,
    "vae_steps": 4,
    "text_steps": 4,
    "steps": 4,
    "num_scored": 4,
}
# Smaller networks for --smoke, whose time is mostly compilation of layers.
SMOKE_NETWORKS = {
    "config.model.vae.base_dim": 16,
    "config.model.text_encoder.num_layers": 1,
    "config.model.dit.num_layers": 1,
}
SAMPLE_SECONDS = 0.5  # between two measurements of the memory


@dataclasses.dataclass(frozen=True)
class Stage:
    """One job of the recipe.

    Attributes:
      name: shown to the user.
      command: the arguments of Python; MINUTES in them stands for the time that is left.
      product: the file that the job writes last.
    """

    name: str
    command: list[str]
    product: pathlib.Path

    def command_with(self, minutes: float) -> list[str]:
        """The command with the minutes that are left for it."""
        return [part.replace(MINUTES, f"{minutes:.2f}") for part in self.command]


class Stopped(Exception):
    """A signal asked to stop."""


def stages(args: argparse.Namespace) -> list[Stage]:
    """Returns the recipe for the given sizes."""
    out = args.out
    networks = SMOKE_NETWORKS if args.smoke else {}
    vae = out / "vae" if args.from_scratch else SHIPPED

    def job(name: str, **flags: object) -> list[str]:
        return ["-m", f"sora_jax.{name}"] + [
            f"--{flag}={value}" for flag, value in flags.items() if value is not None
        ]

    def videos(name: str, model: object, folder: str) -> Stage:
        command = job(
            "generate",
            model=model,
            prompts=out / "prompts.txt",
            out=out / folder,
            sheet=out / f"{folder}.png",
        )
        return Stage(name, command, out / f"{folder}.png")

    def training(name, config, folder, steps, product, **fields: object) -> Stage:
        values = {
            f"config.{field.replace('__', '.')}": v for field, v in fields.items()
        }
        values |= {"config.loop.num_steps": steps} | networks
        command = job("train", config=config, out=folder, **values)
        return Stage(name, command, folder / product)

    shards = out / "recaptioned" if args.recaption else out / "shards"
    of_text = RECAPTIONED if args.recaption else {}
    of_denoiser = {
        "data__latents": out / "latents",
        "data__sample_prompts": out / "prompts.txt",
        "text__encoder": out / "text",
        **of_text,
    }
    if args.steps is None:
        of_denoiser["loop__minutes"] = MINUTES
    return [
        videos("first videos", SHIPPED, "first_videos"),
        Stage(
            "shards",
            job(
                "prepare",
                source="toyworld:tw32",
                families=FAMILIES,
                num_clips=args.num_clips,
                workers=args.workers,
                out=out / "shards",
            ),
            out / "shards" / "manifest.json",
        ),
        *(
            [
                training(
                    "video VAE",
                    VAE_CONFIG,
                    out / "vae",
                    args.vae_steps,
                    "vae/weights.safetensors",
                    data__shards=out / "shards",
                )
            ]
            * args.from_scratch
        ),
        *(
            [
                Stage(
                    "captions",
                    job(
                        "recaption",
                        shards=out / "shards",
                        captioner="network",
                        model=SHIPPED,
                        out=shards,
                    ),
                    shards / "manifest.json",
                )
            ]
            * args.recaption
        ),
        Stage(
            "latents",
            job(
                "prepare",
                source=f"shards:{shards}",
                vae=vae,
                out=out / "latents",
            ),
            out / "latents" / "latents.json",
        ),
        training(
            "text encoder",
            TEXT_CONFIG,
            out / "text",
            args.text_steps,
            "text_encoder/weights.safetensors",
            data__latents=out / "latents",
            **of_text,
        ),
        training(
            "denoiser",
            CONFIG,
            out / "model",
            MOST_STEPS if args.steps is None else args.steps,
            "metrics.jsonl",
            **of_denoiser,
        ),
        videos("videos", out / "model", "videos"),
        Stage(
            "scores and report",
            job(
                "evaluate",
                model=out / "model",
                shards=out / "shards",
                also=out / "vae" if args.from_scratch else None,
                out=out / "scores",
                **dict.fromkeys(SUITES, args.num_scored),
            ),
            out / "scores" / "report.html",
        ),
    ]


class Record:
    """Times and memory, written to timing.json after each stage and interruption."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.data = {"stages": {}, "install_seconds": 0, "peak_bytes": {}}
        if path.exists():
            self.data = json.loads(path.read_text())

    def begin(self, stages: list[Stage]) -> list[dict]:
        """Returns an entry for each stage; a new one where its command has changed.

        The job itself checks whether it can resume what other settings have made.
        """
        before, self.data["stages"] = self.data["stages"], {}
        for stage in stages:
            new = {"command": stage.command, "seconds": 0.0, "finished": False}
            entry = before.get(stage.name, new)
            same = entry["command"] == stage.command
            self.data["stages"][stage.name] = entry if same else new
        return list(self.data["stages"].values())

    def count_memory(self, sampled: int) -> None:
        """Updates the peaks of memory."""
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        peaks = self.data["peak_bytes"]
        for name, value in (
            ("all_processes_sampled", sampled),
            ("largest_process", largest),
        ):
            peaks[name] = max(peaks.get(name, 0), value)

    def total_seconds(self) -> float:
        """Returns the seconds that the installation and all stages took."""
        stages = self.data["stages"].values()
        return self.data["install_seconds"] + sum(entry["seconds"] for entry in stages)

    def minutes_left(self, args: argparse.Namespace) -> float:
        """What is left of args.minutes for the denoiser, from all that is done so far.

        What comes after it is estimated by the time that the latents took.
        """
        latents = self.data["stages"].get("latents", {}).get("seconds", 0.0)
        share = AFTER_SHARE * CLIPS / args.num_clips
        # The denoiser itself may be resumed: its time is not over.
        spent = self.total_seconds()
        spent -= self.data["stages"].get("denoiser", {}).get("seconds", 0.0)
        left = args.minutes - (spent + AFTER_SECONDS + share * latents) / 60
        return max(LEAST_MINUTES, left)

    def write(self) -> None:
        """Writes the file atomically."""
        self.data["total_seconds"] = round(self.total_seconds(), 1)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.data, indent=2) + "\n")
        temporary.replace(self.path)


class Child:
    """A job whose output is shown and logged, and whose memory is measured.

    It has its own process group, so that Ctrl-C reaches this process alone, which then
    asks the job to save and exit. If the output is a terminal, the job gets a terminal
    too, so that its progress line is rewritten in place.
    """

    def __init__(self, command: list[str], log: pathlib.Path):
        self.peak_bytes = 0
        self.log = open(log, "ab")
        self._line = b""
        terminal = sys.stderr.isatty()
        if terminal:
            self.output, theirs = pty.openpty()
            self._copy_terminal(theirs)
        else:
            self.output, theirs = os.pipe()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT | os.environ | {"PYTHONUNBUFFERED": "1"},
            process_group=0,
        )
        os.close(theirs)

    def wait(self) -> int:
        """Passes output on until the job ends; returns its exit code."""
        sampled = 0.0
        while True:
            ended = self.process.poll() is not None
            if time.monotonic() - sampled >= SAMPLE_SECONDS:
                self.peak_bytes = max(self.peak_bytes, resident_bytes(os.getpid()))
                sampled = time.monotonic()
            # After the job has ended, read what is left, but do not wait for a worker
            # that outlives the job and holds its output open.
            ready, _, _ = select.select([self.output], [], [], 0 if ended else 0.2)
            data = self._read() if ready else b""
            if data:
                self._pass_on(data)
            elif ended:
                return self.process.returncode
            elif ready:  # the job has closed its output but is still running
                time.sleep(0.05)

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the job, which stops its own workers."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Kills what is left of the job."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self.output)
        self.log.close()

    def _copy_terminal(self, theirs: int) -> None:
        size = fcntl.ioctl(sys.stderr, termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)

    def _read(self) -> bytes:
        try:
            return os.read(self.output, 65536)
        except OSError:  # raised by a terminal whose other end is closed
            return b""

    def _pass_on(self, data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:  # of a line that was rewritten in place, the last text
            self.log.write(line.rstrip(b"\r").split(b"\r")[-1].removeprefix(b"\x1b[K"))
            self.log.write(b"\n")
        self.log.flush()


def resident_bytes(root: int) -> int:
    """Returns the memory of a process and its descendants.

    It is the sum of their resident sets, so shared memory counts twice; 0 without /proc.
    """
    parents, sizes = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
        parents[int(folder.name)], sizes[int(folder.name)] = parent, pages
    family = {root}
    while new := {p for p, parent in parents.items() if parent in family} - family:
        family |= new
    return sum(sizes.get(p, 0) for p in family) * os.sysconf("SC_PAGE_SIZE")


def run_stage(
    command: list[str], product: pathlib.Path, entry: dict, record: Record, log
) -> int:
    """Runs a stage's command and records it; returns its exit code.

    Raises:
      Stopped: it was asked to stop, and has saved its state or finished.
    """
    began = time.monotonic()
    child = Child([sys.executable, *command], log)
    asked = []

    def stop(number, frame):
        if asked:  # the second signal
            child.process.kill()
        asked.append(number)
        say("stopping; the job saves its state (repeat to kill it)")
        child.ask_to_stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        code = child.wait()
    finally:
        child.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
        record.count_memory(child.peak_bytes)
        record.write()
    entry["finished"] = code == 0 and product.exists()
    record.write()
    if asked:
        raise Stopped
    return code


def say(sentence: str) -> None:
    """Prints a line with the name of this program."""
    print(f"quickstart: {sentence}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Formats a duration as 3m05s."""
    return f"{round(seconds) // 60}m{round(seconds) % 60:02d}s"


def run(args: argparse.Namespace) -> int:
    """Locks the folder and runs the remaining stages; returns the exit code."""
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"--out {args.out} cannot be written: {error.strerror}")
        return 2
    with open(args.out / "logs" / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another quickstart is running in {args.out}; wait for it or stop it")
            return 2
        return run_recipe(args)


def run_recipe(args: argparse.Namespace) -> int:
    """Runs the stages that have not finished; returns the exit code."""
    (args.out / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    record = Record(args.out / "timing.json")
    record.data["install_seconds"] += int(os.environ.get("SORA_SETUP_SECONDS") or 0)
    again = f"./launch/quickstart {shlex.join(sys.argv[1:])}".rstrip()
    todo = stages(args)
    entries = record.begin(todo)
    if args.steps is None:
        say(
            f"{args.minutes:g} minutes in all, of which set-up took "
            f"{clock(record.data['install_seconds'])}; the denoiser learns in those that "
            "data and scores leave, and says how many steps that is"
        )
    for index, (stage, entry) in enumerate(zip(todo, entries, strict=True)):
        title = f"{index + 1}/{len(todo)} {stage.name}"
        if entry["finished"] and stage.product.exists():
            say(f"{title}: skipped, finished earlier in {clock(entry['seconds'])}")
            continue
        for later in entries[index:]:
            later["finished"] = False
        log = args.out / "logs" / f"{stage.name.replace(' ', '_')}.log"
        command = stage.command_with(record.minutes_left(args))
        say(f"{title}: python {shlex.join(command)}")
        try:
            code = run_stage(command, stage.product, entry, record, log)
        except Stopped:
            say(f"stopped during '{stage.name}'; to resume, run {again}")
            return 130
        if not entry["finished"]:
            what = f"exit code {code}" if code else f"it did not write {stage.product}"
            say(f"'{stage.name}' failed ({what}); its output is in {log}")
            return code or 1
        say(f"{title}: done in {clock(entry['seconds'])}")
        if stage.name == "first videos":
            say(f"what the shipped weights make: {stage.product}")
    print_summary(record, args.out)
    return 0


def print_summary(record: Record, out: pathlib.Path) -> None:
    """Prints the times, the peak memory and where the results are."""
    rows = {"install": record.data["install_seconds"]}
    rows |= {name: entry["seconds"] for name, entry in record.data["stages"].items()}
    peaks = {name: v / 2**30 for name, v in record.data["peak_bytes"].items()}
    for name, seconds in rows.items():
        print(f"  {name:<18} {clock(seconds):>7}")
    print(f"  {'total':<18} {clock(record.total_seconds()):>7}")
    # The sampled sum may miss a short peak; the other is of a single process.
    print(f"peak memory: {max(peaks.values()):.2f} GiB over all processes")
    print(f"videos: {out / 'videos'}, {out / 'videos.png'}")
    for sheet in sorted((out / "model" / "samples").glob("*.png"))[:1]:
        print(f"how it learned: {sheet.parent}")
    print(f"report: {out / 'scores' / 'report.html'}")
    print(f"timing: {record.path}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="launch/quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "quickstart"
    size = {"type": int, "metavar": "N"}
    config = "; default: as in %s"
    parser.add_argument("--out", type=pathlib.Path, default=default, help="run folder")
    parser.add_argument(
        "--minutes",
        type=float,
        default=20,
        help="time in all, set-up included; default: 20",
    )
    parser.add_argument(
        "--from_scratch", action="store_true", help="train the video VAE as well"
    )
    parser.add_argument(
        "--recaption",
        action="store_true",
        help="learn from captions that the shipped captioner writes",
    )
    parser.add_argument("--num_clips", **size, help=f"training clips; default: {CLIPS}")
    parser.add_argument(
        "--vae_steps", **size, help="steps of the video VAE" + config % VAE_CONFIG
    )
    parser.add_argument(
        "--text_steps", **size, help="steps of the text encoder" + config % TEXT_CONFIG
    )
    parser.add_argument(
        "--steps", **size, help="steps of the denoiser; default: as --minutes allow"
    )
    parser.add_argument(
        "--num_scored", **size, help=f"prompts per suite; default: {SCORED}"
    )
    parser.add_argument(
        "--workers", **size, help="processes that write shards; default: one per core"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run every stage briefly; nothing is learned",
    )
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    full = {"num_clips": CLIPS, "num_scored": SCORED}
    for name, number in (SMOKE if args.smoke else full).items():
        if getattr(args, name) is None:
            setattr(args, name, number)
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
