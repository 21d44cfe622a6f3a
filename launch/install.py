"""Installs requirements files into a virtual environment, if they are not in it yet.

    python launch/install.py [--check] [--accelerator] FOLDER FILE...

A finished environment holds a stamp, the hash of its requirements files. An interrupted
installation leaves a marker, and the environment is created again, since pip takes a
half-written package for an installed one; downloads come from pip's cache.
"""

import argparse
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
ATTEMPTS = 3

# PCI device numbers of Google's TPUs, as in jax/_src/hardware_utils.py.
_TPU_DEVICES = "27 56 5e 62 63 6f 76 83 7c".split()


class Failed(Exception):
    """Why there is no environment, in one sentence."""


def accelerator(machine: pathlib.Path = pathlib.Path("/")) -> str:
    """Returns cpu, cuda or tpu, by this machine's device files.

    Args:
      machine: the root of the file system.

    Raises:
      Failed: SORA_ACCELERATOR names something else.
    """
    named = os.environ.get("SORA_ACCELERATOR")
    if named:
        if named not in ("cpu", "cuda", "tpu"):
            raise Failed(f"SORA_ACCELERATOR is {named!r}; it is cpu, cuda or tpu.")
        return named
    if any(machine.glob("dev/accel[0-9]*")):
        return "tpu"
    for vendor in machine.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == "0x1ae0":
            device = vendor.with_name("device").read_text().strip()
            if device.removeprefix("0x00") in _TPU_DEVICES:
                return "tpu"
    if any(machine.glob("dev/nvidia[0-9]*")) or (machine / "dev/dxg").exists():
        return "cuda"
    return "cpu"


def accelerator_files(kind: str) -> list[pathlib.Path]:
    """Returns the requirements files of a kind of accelerator, the newest first."""
    return sorted((ROOT / "launch" / "requirements").glob(f"{kind}*.txt"))


def fitting_files(kind: str) -> list[pathlib.Path]:
    """Returns the requirements files that fit this machine's driver."""
    files = accelerator_files(kind)
    if kind != "cuda":
        return files
    driver = nvidia_driver()
    if driver is None:
        say("there is an NVIDIA device, but nvidia-smi fails: installing for CPU")
        return []
    return [file for file in files if (file.stem == "cuda12") == (driver < 580)]


def nvidia_driver() -> int | None:
    """Returns the major version of the NVIDIA driver, None if it does not work."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.match(r"\d+", answer.stdout)
    return int(version[0]) if answer.returncode == 0 and version else None


def with_constraints(files: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the files and those that they include with -c or -r."""
    found = []
    for file in files:
        found.append(file)
        named = re.findall(r"(?m)^-[cr]\s+(\S+)", file.read_text())
        found += with_constraints(file.parent / name for name in named)
    return found


def stamp(files: list[pathlib.Path], kind: str) -> str:
    """Returns the stamp of a finished environment."""
    digest = hashlib.sha256(kind.encode())
    for file in with_constraints(files + accelerator_files(kind)):
        digest.update(b"\0" + file.read_bytes())
    return digest.hexdigest()


def is_finished(folder: pathlib.Path, wanted: str) -> bool:
    """Returns whether the environment exists and has this stamp."""
    try:
        return (folder / ".installed").read_text() == wanted
    except FileNotFoundError:
        return False


def install(folder: pathlib.Path, files: list[pathlib.Path], kind: str) -> None:
    """Creates or completes the environment.

    Args:
      folder: the virtual environment.
      files: requirements files.
      kind: the accelerator that it is for.

    Raises:
      Failed: with the reason.
    """
    wanted = stamp(files, kind)
    with open(files[0]) as lock:
        # A second command that starts at the same time waits. pip holds the lock too,
        # so that it lasts until pip has ended, even if this process is killed.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_finished(folder, wanted):
            return
        marker = folder / ".installing"
        if marker.exists() or not _works(folder):
            create(folder)
        (folder / ".installed").unlink(missing_ok=True)
        marker.touch()
        _pip_install(folder, files + fitting_files(kind), lock.fileno())
        (folder / ".installed").write_text(wanted)
        marker.unlink()


def _works(folder: pathlib.Path) -> bool:
    """Returns whether there is an environment with this Python version and pip."""
    program = "import pip, sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run(
            [folder / "bin" / "python", "-I", "-c", program],
            capture_output=True,
            text=True,
        )
    except OSError:
        return False
    return answer.stdout == f"{sys.version_info[0]}.{sys.version_info[1]}"


def create(folder: pathlib.Path) -> None:
    """Creates an empty virtual environment of this Python.

    Raises:
      Failed: with the message of venv.
    """
    again = "again " if folder.exists() else ""
    say(f"creating {folder} {again}with Python {sys.version.split()[0]}")
    command = [sys.executable, "-m", "venv", "--clear", os.fspath(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        last = (made.stdout + made.stderr).strip().splitlines() or ["no output"]
        raise Failed(f"{sys.executable} could not create {folder}: {last[-1]}")


def _pip_install(folder: pathlib.Path, files: list[pathlib.Path], lock: int) -> None:
    command = [folder / "bin" / "python", "-I", "-m", "pip", "install", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off"]
    for file in files:
        command += ["-r", file]
    # Settings of the user that would install somewhere else.
    elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")
    environment = {k: v for k, v in os.environ.items() if k not in elsewhere}
    environment.setdefault("PIP_DEFAULT_TIMEOUT", "60")
    log = folder / "install.log"
    for attempt in range(1, ATTEMPTS + 1):
        with open(log, "wb") as output:
            pip = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
            )
            try:
                _show_progress(pip, folder, files, log)
            except BaseException:
                pip.terminate()
                pip.wait()
                raise
        if pip.returncode == 0:
            return
        errors = re.findall(r"(?m)^ERROR: (.*)", log.read_text(errors="replace"))
        reason = errors[-1] if errors else f"pip's exit code was {pip.returncode}"
        if attempt < ATTEMPTS:
            say(f"pip failed ({reason}); trying again")
            time.sleep(5 * attempt)
    raise Failed(
        f"pip could not install {', '.join(str(file) for file in files)}: {reason}; "
        f"its output is in {log}."
    )


def _show_progress(
    pip: subprocess.Popen,
    folder: pathlib.Path,
    files: list[pathlib.Path],
    log: pathlib.Path,
) -> None:
    """Shows pip's progress in one line until it ends.

    Each package counts twice: once when it is fetched, once when it is unpacked.
    """
    pins = "".join(file.read_text() for file in with_constraints(files))
    total = len(re.findall(r"(?m)^[\w.\[\]-]+==", pins))
    tty = sys.stderr.isatty()
    began = printed = time.monotonic()
    while True:
        try:
            pip.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        ended = pip.returncode is not None
        if ended or now - printed >= (0.2 if tty else 15):
            printed = now
            words = r"(?m)^(?:Collecting|Processing|Requirement already satisfied:) "
            fetched = len(re.findall(words, log.read_text(errors="replace")))
            unpacked = len([*folder.glob("lib/python*/site-packages/*.dist-info")])
            total = max(total, fetched, unpacked)
            line = (
                f"installing: {fetched}/{total} packages fetched, {unpacked} unpacked, "
                f"{now - began:.0f}s so far"
            )
            if not ended and fetched + unpacked > 4:
                rest = (now - began) * (2 * total / (fetched + unpacked) - 1)
                line += f", about {rest:.0f}s left"
            columns = shutil.get_terminal_size().columns
            end = "\n" if ended or not tty else ""
            sys.stderr.write(
                f"\r\x1b[K{line[: columns - 1]}{end}" if tty else line + end
            )
            sys.stderr.flush()
        if ended:
            return


def say(sentence: str) -> None:
    """Prints a line with the name of this program."""
    print(f"install: {sentence}", file=sys.stderr, flush=True)


def main() -> int:
    """Parses the command line and runs it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="exit code 0 if all is installed, else 1"
    )
    parser.add_argument(
        "--accelerator",
        action="store_true",
        help="also install the packages of this machine's accelerator",
    )
    parser.add_argument("folder", type=pathlib.Path, help="virtual environment")
    parser.add_argument("files", type=pathlib.Path, nargs="+", help="requirements")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        kind = accelerator() if args.accelerator else "cpu"
        if args.check:
            return 0 if is_finished(args.folder, stamp(args.files, kind)) else 1
        install(args.folder, args.files, kind)
    except Failed as failure:
        say(str(failure))
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
