"""Runs a sweep: many points of settings, one table and one plot.

    python -m experiments.sweep --sweep experiments/sweeps/guidance_by_steps.py \\
        --out runs/sweep --set model=runs/quickstart/model \\
        --set shards=runs/quickstart/shards --slots 2

A sweep is a Python file whose `get_sweep()` says what is varied: settings of
sora_jax.evaluate, or fields of a config (`experiments/sweeping/points.py`). Every point
has an id that follows from its settings and a folder OUT/points/ID. Started again, the
points that have finished are not run again, those that failed are.

With --launcher the points run elsewhere: a command is started for each, which hands it
on and ends, from the repository root, with OUT on a file system that both can see:

    --launcher "sbatch --job-name={id} --wrap={command}"
    --launcher "srun {command}"

and `--collect` looks what has arrived. OUT/index.jsonl lists the points and their states;
OUT/table.md, table.json and report.html compare those that have finished. The exit code
is 1 where a point failed, and 130 after Ctrl-C.
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
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, for all points.")
_SLOTS = flags.DEFINE_integer("slots", 1, "Points at a time.", lower_bound=1)
_LAUNCHER = flags.DEFINE_string("launcher", None, 'Such as "srun {command}".')
_COLLECT = flags.DEFINE_bool("collect", False, "Only look what has arrived.")
_AGAIN = flags.DEFINE_bool("again", False, "Hand over once more what has not arrived.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the points.")
_PYTHON = flags.DEFINE_string("python", sys.executable, "What starts a point's jobs.")
_QUALITY = flags.DEFINE_string("quality", None, "Another measure to compare by.")
_LOWER = flags.DEFINE_bool("lower_is_better", None, "Whether less of it is better.")
_COST = flags.DEFINE_string("cost", None, "evaluations, seconds, or a setting's key.")


def settings(words: list[str]) -> dict[str, object]:
    """KEY=VALUE words; a value that is a Python literal is read as one.

    Raises:
      ValueError: a word has no `=`, or a key comes twice.
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
    """The sweep with what the flags say of quality and cost.

    Raises:
      ValueError: another quality is given, but not which way is better.
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
    """Runs or hands over what is left, and collects what was handed over.

    Raises:
      runner.Stopped: it was asked to stop.
      ValueError: the launcher's command says nothing of the point.
    """
    for entry in index.in_state(indices.HANDED_OVER):
        runner.collect(entry)
    # A job that was running when the sweep was killed has ended: the lock was free.
    for entry in index.in_state(indices.RUNNING):
        entry.state, entry.pid = indices.STOPPED, None
    index.write()
    if _COLLECT.value:
        return
    left = [indices.WAITING, indices.FAILED, indices.STOPPED]
    todo = index.in_state(*left, *[indices.HANDED_OVER] * _AGAIN.value)
    runner.say(f"{len(todo)} of {len(index.entries)} points to run")
    if _LAUNCHER.value:
        runner.hand_over(index, todo, _SLOTS.value, _LAUNCHER.value)
    else:
        runner.run(index, todo, _SLOTS.value, lock)


def finish(out: pathlib.Path, sweep: points.Sweep, index: indices.Index) -> int:
    """Writes and prints the table, names what failed; returns the exit code.

    Raises:
      ValueError: the points that have finished cannot be compared.
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
        for state in (indices.HANDED_OVER, indices.WAITING, indices.STOPPED):
            if number := len(index.in_state(state)):
                runner.say(f"{number} points are {state}")
        for entry in failed:
            runner.say(f"{entry.id} {entry.name}: {runner.describe(entry)}")
    return 1 if failed else 0


def main() -> None:
    """Runs the sweep that the flags name."""
    out = pathlib.Path(_OUT.value)
    try:
        sweep = compared_by(points.load(_SWEEP.value))
        resolved = points.resolve(sweep, settings(_SET.value))
        if _DRY_RUN.value:
            show(indices.Index(out, resolved, _PYTHON.value))
            return
        with runner.alone_in(out) as lock:
            index = indices.Index(out, resolved, _PYTHON.value)
            work(index, lock)
            code = finish(out, sweep, index)
    except runner.Stopped:
        print("sweep: stopped; the same command goes on here", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["sweep", "out"])
    job.run(main, "sweep")
