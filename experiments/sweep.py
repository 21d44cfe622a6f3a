"""Runs a sweep: many points of settings, compared in one table and one plot.

    python -m experiments.sweep --sweep experiments/sweeps/guidance_by_steps.py \\
        --out runs/sweep --set model=runs/quickstart/model \\
        --set shards=runs/quickstart/shards --slots 2

A sweep is a Python file whose `get_sweep()` lists what is varied: settings of
sora_jax.evaluate, or fields of a config (`experiments/sweeping/points.py`). Every point
has an id that follows from its settings, and a folder OUT/points/ID. The same command run
again skips finished points and repeats failed ones.

With --launcher the points run elsewhere: for each point the command is run from the
repository root, with OUT on a shared file system:

    --launcher "sbatch --job-name={id} --wrap={command}"
    --launcher "srun {command}"

and `--collect` reads the results that have arrived. OUT/index.jsonl lists the points and
their states; OUT/table.md, table.json and report.html compare the finished ones. The exit
code is 1 if a point failed, and 130 after Ctrl-C.
"""

import ast
import dataclasses
import pathlib
import shlex
import sys

from absl import flags

from experiments.sweeping import index as indices
from experiments.sweeping import points, results, runner
from sora_jax.core import job

_SWEEP = flags.DEFINE_string("sweep", None, "Python file with get_sweep().")
_OUT = flags.DEFINE_string("out", None, "Folder of the sweep.")
_SET = flags.DEFINE_multi_string(
    "set", [], "KEY=VALUE setting of all points; may be repeated."
)
_SLOTS = flags.DEFINE_integer(
    "slots", 1, "Points that run at the same time.", lower_bound=1
)
_LAUNCHER = flags.DEFINE_string(
    "launcher", None, 'Command that runs a point elsewhere, such as "srun {command}".'
)
_COLLECT = flags.DEFINE_bool(
    "collect", False, "Only read results that have arrived; run nothing."
)
_AGAIN = flags.DEFINE_bool(
    "again", False, "Submit points again whose results have not arrived."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the points and their commands; run nothing."
)
_PYTHON = flags.DEFINE_string(
    "python", sys.executable, "Python interpreter of the jobs."
)
_QUALITY = flags.DEFINE_string(
    "quality", None, "Measure to compare by, in place of the sweep's."
)
_LOWER = flags.DEFINE_bool(
    "lower_is_better", None, "Whether lower quality values are better."
)
_COST = flags.DEFINE_string(
    "cost", None, "Cost: evaluations, seconds, or the key of a setting."
)


def settings(words: list[str]) -> dict[str, object]:
    """Parses KEY=VALUE words; values that are Python literals are read as such.

    Raises:
      ValueError: a word has no `=`, or a key occurs twice.
    """
    found: dict[str, object] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ValueError(f"--set takes KEY=VALUE, not {word!r}")
        if key in found:
            raise ValueError(f"--set {key} is given twice")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def compared_by(sweep: points.Sweep) -> points.Sweep:
    """Returns the sweep with quality and cost of the flags.

    Raises:
      ValueError: --quality is given without its direction.
    """
    if _QUALITY.value and _LOWER.value is None:
        raise ValueError("--quality needs --lower_is_better or --nolower_is_better")
    given = {"quality": _QUALITY, "lower_is_better": _LOWER, "cost": _COST}
    changes = {n: flag.value for n, flag in given.items() if flag.value is not None}
    return dataclasses.replace(sweep, **changes)


def show(index: indices.Index) -> None:
    """Prints every point, its state and its commands."""
    for entry in index.entries:
        print(f"{entry.id}  {entry.state:<11}  {entry.name}")
        for command in entry.commands:
            words = command
            if _LAUNCHER.value:
                words = runner.launch_words(_LAUNCHER.value, entry)
            print(f"    {shlex.join(words)}")


def work(index: indices.Index, lock: int) -> None:
    """Runs or submits the points that are left, and collects submitted ones.

    Raises:
      runner.Stopped: by a signal.
      ValueError: the launcher's command has no placeholder for the point.
    """
    for entry in index.in_state(indices.SUBMITTED):
        runner.collect(entry)
    # Jobs that ran when the sweep was killed have ended, since the lock was free.
    for entry in index.in_state(indices.RUNNING):
        entry.state, entry.pid = indices.STOPPED, None
    index.write()
    if _COLLECT.value:
        return
    left = [indices.WAITING, indices.FAILED, indices.STOPPED]
    todo = index.in_state(*left, *[indices.SUBMITTED] * _AGAIN.value)
    runner.say(f"{len(todo)} of {len(index.entries)} points to run")
    if _LAUNCHER.value:
        runner.submit(index, todo, _SLOTS.value, _LAUNCHER.value)
    else:
        runner.run(index, todo, _SLOTS.value, lock)


def finish(out: pathlib.Path, sweep: points.Sweep, index: indices.Index) -> int:
    """Writes and prints the table, names failed points; returns the exit code.

    Raises:
      ValueError: the finished points cannot be compared.
    """
    failed = index.in_state(indices.FAILED)
    facts = {
        "Sweep": _SWEEP.value,
        "Command": "python -m experiments.sweep " + shlex.join(sys.argv[1:]),
    }
    try:
        if index.in_state(indices.FINISHED):
            print(results.write(out, sweep, index, facts))
            print(f"{out / 'table.md'}, {out / 'table.json'}, {out / 'report.html'}")
    finally:
        for state in (indices.SUBMITTED, indices.WAITING, indices.STOPPED):
            if number := len(index.in_state(state)):
                runner.say(f"{number} points are {state}")
        for entry in failed:
            runner.say(f"{entry.id} {entry.name}: {runner.describe(entry)}")
    return 1 if failed else 0


def main() -> None:
    """Runs the sweep of the flags."""
    out = pathlib.Path(_OUT.value)
    try:
        sweep = compared_by(points.load(_SWEEP.value))
        resolved = points.resolve(sweep, settings(_SET.value))
        if _DRY_RUN.value:
            show(indices.Index(out, resolved, _PYTHON.value))
            return
        with runner.locked(out) as lock:
            index = indices.Index(out, resolved, _PYTHON.value)
            work(index, lock)
            code = finish(out, sweep, index)
    except runner.Stopped:
        print("sweep: stopped; the same command continues it", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["sweep", "out"])
    job.run(main, "sweep")
