"""Times the same work in our code and in a peer library, after comparing the results.

    python -m experiments.bench.side_by_side runs/denoiser.json

prints the table of a file that a bench wrote with `--json`. The peer runs in its own
process (`.peers`, or the Python of `SORA_PEERS_PYTHON`, with as many threads), which does
one operation per request: tests/oracle/timed.py. A ratio is the peer's time divided by
ours, the median over rounds. A row is noisy, and no result, if times differ by more than
15 % of their median.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORACLE = ROOT / "tests" / "oracle"
PEERS = os.environ.get("SORA_PEERS_PYTHON", str(ROOT / ".peers" / "bin" / "python"))
THREADS = len(os.sched_getaffinity(0))
NOISY = 0.15
PAUSE = 0.3  # seconds before a turn
TURN = 0.5  # shortest turn, in seconds
OURS = "ours"


class Refused(ValueError):
    """The peer cannot do an operation."""


def missing(python: str, modules: Sequence[str]) -> str | None:
    """Returns why the peer cannot run on the device that JAX uses; None if it can."""
    if not pathlib.Path(python).exists():
        return f"{python} does not exist; ./launch/test builds the peers' environment"
    program = f"import torch, {', '.join(modules)}; print(torch.cuda.is_available())"
    done = subprocess.run([python, "-c", program], text=True, capture_output=True)
    if done.returncode:
        return f"{python}: {done.stderr.strip().splitlines()[-1]}"
    if jax.default_backend() == "gpu" and done.stdout.strip() != "True":
        return f"torch of {python} has no GPU, but JAX has one"
    return None


class Peer:
    """The peer's process.

    Args:
      python: of its environment.
      script: in tests/oracle.
      folder: for files that both processes read and write.
      case: arrays by name.
      config: other inputs of the script.
    """

    def __init__(
        self,
        python: str,
        script: str,
        folder: pathlib.Path,
        case: Mapping[str, np.ndarray],
        config: Mapping,
    ):
        self._folder = folder
        case = {name: np.ascontiguousarray(array) for name, array in case.items()}
        save_file(case, folder / "case.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        self._process = subprocess.Popen(
            [python, ORACLE / script, folder, str(THREADS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ask(self, line: str) -> str:
        """Sends a line and returns the answer.

        Raises:
          Refused: the operation failed; the peer keeps running.
          RuntimeError: the peer has ended.
        """
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended with {self._process.wait()} at {line}")
        if answer.startswith("error "):
            raise Refused(answer.removeprefix("error ").strip())
        return answer

    def seconds(self, name: str, count: int = 1) -> float:
        """Returns the seconds that an operation takes, the mean over a number of runs."""
        return float(self.ask(f"{name} {count}"))

    def versions(self) -> dict[str, str]:
        """Returns the versions of the peer's libraries."""
        return json.loads(self.ask("versions"))

    def results(self) -> dict[str, np.ndarray]:
        """Returns the result of the first run of each operation."""
        self.ask("save")
        return load_file(self._folder / "peer.safetensors")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with self._process:  # closes its files, and waits for it
            self._process.stdin.close()


def seconds(operation: Callable, count: int = 1) -> float:
    """Returns the seconds that an operation takes, the mean over a number of runs."""
    began = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(operation())
    return (time.perf_counter() - began) / count


def take_turns(
    calls: Mapping[str, Callable[[int], float]], rounds: int
) -> dict[str, list[float]]:
    """Calls each function once per round, in reverse order in every other round.

    A pause before each turn lets idle worker threads of the previous one stop spinning.
    Short work is repeated for half a second per turn, since otherwise cold caches and
    sleeping threads would dominate its time.

    Args:
      calls: name -> function of the number of runs that returns the seconds per run.
      rounds: number of rounds.

    Returns:
      name -> seconds per run, for each round.
    """
    counts = {name: math.ceil(TURN / call(1)) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 - 2 * (turn % 2)]:
            time.sleep(PAUSE)
            times[name].append(calls[name](counts[name]))
    return times


def relative(a, b) -> float:
    """Returns |a - b| / |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(name: str, ours, theirs, tolerance: float) -> float:
    """Prints and returns the relative error of a result with respect to the peer's.

    Raises:
      ValueError: the error exceeds the tolerance.
    """
    error = relative(ours, theirs)
    print(f"{name}: relative error {error:.1e}")
    if not error <= tolerance:
        raise ValueError(f"{name} differs from the peer's by {error:.1e}")
    return error


def describe(times: Sequence[float]) -> str:
    """Returns median, lowest and highest time as text."""
    low, middle, high = (1e3 * np.quantile(times, q) for q in (0, 0.5, 1))
    return f"{middle:.4g} ms ({low:.4g}-{high:.4g})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns their time divided by ours, the median over rounds."""
    return float(np.median(np.asarray(theirs) / np.asarray(ours)))


def row(
    name: str,
    times: Mapping[str, list[float]],
    bars: Mapping[str, float] | None = None,
    **more,
) -> dict:
    """Prints a row and returns it as JSON values.

    Args:
      name: of the work.
      times: seconds by form, including `OURS`.
      bars: smallest ratio to reach, by form.
      more: further JSON values.
    """
    spreads = [np.ptp(found) / np.median(found) for found in times.values()]
    made = {
        "name": name,
        "times": {form: list(found) for form, found in times.items()},
        "ratios": {
            form: ratio(times[OURS], found)
            for form, found in times.items()
            if form != OURS
        },
        "bars": dict(bars or {}),
        "noisy": bool(max(spreads) > NOISY),
        "load": os.getloadavg()[0],
        **more,
    }
    print(line(made), flush=True)
    return made


def line(made: Mapping) -> str:
    """Returns a row as a line of the table."""
    cells = [made["name"]]
    for form, found in made["times"].items():
        cell = f"{form} {describe(found)}"
        if form in made["ratios"]:
            cell += f": {made['ratios'][form]:.2f} times"
        if form in made["bars"] and form in made["ratios"]:
            bar = made["bars"][form]
            said = "met" if made["ratios"][form] >= bar else "MISSED"
            cell += f" (bar {bar:g} {said})"
        cells.append(cell)
    if "utilisation" in made:
        cells.append(made["utilisation"])
    if "memory" in made:
        cells += [f"{form} {n / 1e6:.0f} MB" for form, n in made["memory"].items()]
    load = f"load {made['load']:.1f}"
    return " | ".join([*cells, f"NOISY, {load}" if made["noisy"] else load])


def write(path: str | None, rows: Sequence[Mapping], **about) -> None:
    """Writes rows, with device and versions, as JSON; does nothing without a path."""
    if path is None:
        return
    command = ["git", "rev-parse", "--short", "HEAD"]
    code = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout
    device = jax.devices()[0]
    found = {
        "code": code.strip(),
        "jax": jax.__version__,
        "device": device.device_kind,
        "threads": THREADS,
        **about,
        "rows": list(rows),
    }
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")


def table(path: str) -> str:
    """Returns the lines of a file that `write` wrote."""
    found = json.loads(pathlib.Path(path).read_text())
    about = ", ".join(
        f"{name} {value}" for name, value in found.items() if name != "rows"
    )
    return "\n".join([about, *map(line, found["rows"])])


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(table(given))
