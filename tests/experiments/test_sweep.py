"""Sweeps: their points, what runs and runs again, the table. Jobs are stand-ins."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from experiments.sweeping import index as indices
from experiments.sweeping import points, results, runner
from experiments.sweeping.points import axis, chain, product, prompts, zipped
from sora_jax.evals import protocol, statistics
from tests import conftest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "experiments" / "sweeps").glob("*.py"))
GIVEN = {"model": "run", "shards": "shards"}
SWEEP = """
from experiments.sweeping.points import Sweep, axis, product

def get_sweep():
    return Sweep(
        job="evaluate",
        points=product(axis("guidance_scale", [1, 2]), axis("num_inference_steps", {steps})),
        quality="motion/colour",
    )
"""


class Bench:
    """A folder with a sweep of six points, jobs that are stand-ins, and its results."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.out = folder, folder / "out"
        shutil.copy(ROOT / "tests" / "experiments" / "fake_job.py", folder)
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\nexec {sys.executable} {folder}/fake_job.py "$@"'
        )
        self.python.chmod(0o755)
        self.behave()
        self.write_sweep([5, 10, 20])

    def write_sweep(self, steps: list[int]) -> None:
        (self.folder / "sweep.py").write_text(SWEEP.format(steps=steps))

    def behave(self, **behaviour) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def start(self, *arguments: str) -> subprocess.Popen:
        """Starts the sweep in a process group of its own."""
        command = [
            *(sys.executable, "-m", "experiments.sweep"),
            *("--sweep", f"{self.folder}/sweep.py", "--out", str(self.out)),
            *("--set", "model=run", "--set", "shards=shards"),
            *("--python", str(self.python), *arguments),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Returns exit code, output and errors of a whole sweep."""
        process = self.start(*arguments)
        printed, said = process.communicate(timeout=120)
        return process.returncode, printed, said

    def run_here(self, resolved=None) -> indices.Index:
        """Runs points, by default the sweep's, in this process and without a table."""
        if resolved is None:
            resolved = points.resolve(points.load(self.folder / "sweep.py"), GIVEN)
        index = indices.Index(self.out, resolved, str(self.python))
        with runner.locked(self.out) as lock:
            runner.run(index, index.entries, 2, lock)
        return index

    def calls(self) -> list[str]:
        file = self.folder / "calls.txt"
        return file.read_text().splitlines() if file.exists() else []

    def states(self) -> list[str]:
        return [entry.state for entry in indices.read(self.out / "index.jsonl")]

    def wait_for(self, state: str) -> None:
        """Waits until a point is in a state."""
        deadline = time.monotonic() + 60
        while state not in self.states():
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.01)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


# -- points ------------------------------------------------------------------------


def test_points_are_those_of_the_lists():
    a, b = axis("a", [1, 2]), axis("b", ["x", "y"])
    assert a == [{"a": 1}, {"a": 2}]
    assert product(a, b) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert product(zipped(a, b), [{"c": 0}]) == [
        {"a": 1, "b": "x", "c": 0},
        {"a": 2, "b": "y", "c": 0},
    ]
    with pytest.raises(ValueError, match=r"2, 1\] points"):
        zipped(a, axis("c", [1]))
    with pytest.raises(ValueError, match="a is set by two parts"):
        product(a, b, a)


def evaluation(*settings: points.Point, **more) -> points.Sweep:
    return points.Sweep(job="evaluate", points=settings, quality="motion/pass", **more)


def test_the_id_follows_from_all_settings_and_nothing_else():
    one, two = points.resolve(
        evaluation({"shift": 4}, {"shift": 5}, {"shift": 4.0}), GIVEN
    )
    assert (one.name, two.name) == ("shift=4", "shift=5")
    again = points.resolve(evaluation({"shift": 4}), dict(reversed(GIVEN.items())))
    assert again[0].id == one.id != two.id
    other = points.resolve(evaluation({"shift": 4}), GIVEN | {"motion": 8})
    assert other[0].id != one.id


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"guidance_scal": 2}, "'guidance_scal' is not a setting.*'guidance_scale'"),
        ({"prompt_seed": 1}, "prompt_seed decides what is measured"),
        ({"motion": 8}, "motion decides what is measured"),
        ({"model": "other"}, "model: varied by the sweep"),
    ],
)
def test_evaluations_that_would_not_work_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        points.resolve(evaluation(settings), GIVEN)


def test_unknown_fields_of_a_config_are_refused_with_the_nearest():
    def resolve(settings, **given):
        sweep = points.Sweep(job="train", points=[settings], quality="loss")
        return points.resolve(sweep, {"config": str(ROOT / "configs/toy.py")} | given)

    with pytest.raises(ValueError, match="did you mean 'loop.num_steps'"):
        resolve({"loop.num_stesp": 3})
    with pytest.raises(ValueError, match="did you mean 'loop.log_every'"):
        resolve({"log_every": 3})
    with pytest.raises(ValueError, match="evaluate.shards is missing"):
        resolve({"seed": 3}, **{"evaluate.motion": 8})
    with pytest.raises(ValueError, match="evaluate.motion decides"):
        resolve({"evaluate.motion": 3}, **{"evaluate.shards": "s"})
    with pytest.raises(FileNotFoundError, match="absent.py does not exist"):
        resolve({"seed": 3}, config="absent.py")
    given = {"evaluate.shards": "s", "evaluate.seeds": (0, 1)}
    found = resolve({"optim.not_muon": ("a", "b"), "seed": 3}, **given)[0]
    folder = pathlib.Path("p")
    train, evaluate = found.commands(folder)
    assert train[1] == "sora_jax.train" and "--out=p/run" in train
    assert "--config.optim.not_muon=('a', 'b')" in train and "--config.seed=3" in train
    assert evaluate[1:] == [
        *("sora_jax.evaluate", "--model=p/run", "--out=p", "--shards=s", "--seeds=0,1")
    ]


def test_settings_are_flags_of_the_job():
    """The names that points may use, against the flags that the job defines."""
    with conftest.lone_job("evaluate") as job:
        modules = flags.FLAGS.flags_by_module_dict()
        defined = {flag.name for flag in modules[job.__name__]}
    sizes = set(prompts())
    assert {*points.VARIED, *points.SHARED} - sizes <= defined
    assert sizes <= set(points.SHARED) and sizes <= defined


def test_the_newest_checkpoint_is_filled_in(tmp_path):
    for step in (250, 1000, 500):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    given = {"model": str(tmp_path), "shards": "shards"}
    newest = points.resolve(evaluation({"shift": 4}), given)
    assert [point.settings["checkpoints"] for point in newest] == [1000]
    older = points.resolve(evaluation({"checkpoints": 500}), given)
    assert [point.settings["checkpoints"] for point in older] == [500]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_sweeps_can_be_run(file, tmp_path):
    (tmp_path / "checkpoints" / "500").mkdir(parents=True)
    sweep = points.load(file)
    found = points.resolve(sweep, {"model": str(tmp_path), "shards": "shards"})
    assert len(found) == 9
    suite, _ = sweep.quality.split("/")
    assert found[0].settings[suite] > 0
    assert f"experiments/sweeps/{file.name}" in file.read_text()


# -- running -----------------------------------------------------------------------


def test_a_sweep_runs_all_its_points_once(bench):
    code, printed, said = bench.run("--slots=2")
    assert code == 0, said
    assert bench.states() == ["finished"] * 6 and len(bench.calls()) == 6
    first = indices.read(bench.out / "index.jsonl")[0]
    assert first.settings == GIVEN | {"guidance_scale": 1, "num_inference_steps": 5}
    assert first.seconds > 0 and first.exit_code == 0 and first.pid is None
    assert pathlib.Path(first.log).read_text() == "at work\n"
    table = json.loads((bench.out / "table.json").read_text())
    assert [row["cost"] for row in table["rows"]] == [5, 10, 20, 10, 20, 40]
    assert [row["quality"]["value"] for row in table["rows"]] == [
        *(0.125, 0.25, 0.5, 0.25, 0.5, 1.0)
    ]
    assert all(row["pareto"] for row in table["rows"])
    assert table["differs"] == ["guidance_scale", "num_inference_steps"]
    assert (bench.out / "table.md").read_text() in printed
    assert "<svg" in (bench.out / "report.html").read_text()

    bench.write_sweep([5, 10, 20, 40])  # a sweep may grow
    assert bench.run()[0] == 0
    assert len(bench.calls()) == 8 and len(bench.states()) == 8
    bench.write_sweep([5, 10, 30])  # not become another
    code, _, said = bench.run()
    assert code == 2 and len(bench.calls()) == 8
    assert "holds another sweep" in said and "num_inference_steps: 20, now 30" in said


def test_a_failed_point_is_run_again_and_stops_no_other(bench):
    bench.behave(fail=["--num_inference_steps=10"])
    code, printed, said = bench.run()
    assert code == 1 and len(bench.calls()) == 6
    assert bench.states() == ["finished", "failed", "finished"] * 2
    *_, last = said.splitlines()
    assert "guidance_scale=2 num_inference_steps=10: failed (exit code 3)" in last
    assert "4 of 6 finished" in printed
    bench.behave()
    assert bench.run()[0] == 0
    assert len(bench.calls()) == 8 and bench.states() == ["finished"] * 6


def test_a_job_without_scores_has_failed(bench):
    bench.behave(silent=["--num_inference_steps=10"])
    index = bench.run_here()
    assert bench.states() == ["finished", "failed", "finished"] * 2
    assert "no scores.json" in runner.describe(index.entries[1])


def test_a_training_run_is_evaluated_afterwards_if_it_succeeds(bench):
    bench.behave(fail=["--config.seed=1"])
    recipe = {"config": str(ROOT / "configs" / "toy.py")}
    sweep = points.Sweep(job="train", points=axis("seed", [0, 1]), quality="loss")
    index = bench.run_here(points.resolve(sweep, recipe | {"evaluate.shards": "s"}))
    assert bench.states() == ["finished", "failed"]
    jobs = [line.split()[0] for line in bench.calls()]
    assert sorted(jobs) == ["sora_jax.evaluate", "sora_jax.train", "sora_jax.train"]
    assert "motion/colour" in results.measure(index.entries[0]).measures

    bench.out = bench.folder / "trained"  # and without an evaluation
    bench.behave()
    entry = bench.run_here(points.resolve(sweep, recipe)).entries[0]
    loss = results.quality_of(results.measure(entry), "loss")
    assert (loss.value, loss.low) == (0.5, None) and entry.state == "finished"


def test_ctrl_c_ends_the_jobs_and_the_sweep_goes_on_later(bench):
    bench.behave(wait=60)
    process = bench.start()
    bench.wait_for(indices.RUNNING)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues it" in said
    assert bench.states() == ["stopped", *["waiting"] * 5]
    bench.behave()
    assert bench.run()[0] == 0 and bench.states() == ["finished"] * 6


def test_a_sweep_that_was_killed_goes_on_when_its_jobs_have_ended(bench):
    bench.behave(wait=60)
    process = bench.start()
    bench.wait_for(indices.RUNNING)
    process.kill()
    process.communicate()
    pid = indices.read(bench.out / "index.jsonl")[0].pid
    code, _, said = bench.run("--collect")
    assert code == 2 and f"runs in {bench.out} (jobs: {pid})" in said
    os.kill(pid, signal.SIGKILL)
    bench.behave()
    assert bench.run()[0] == 0 and bench.states() == ["finished"] * 6
    assert len(bench.calls()) == 7  # the first point twice


def test_points_are_submitted_and_collected(bench):
    later = bench.folder / "later.sh"
    launcher = ["--launcher", f"sh -c 'echo \"{{command}}\" >> {later}'"]
    bench.behave(fail=["--num_inference_steps=20"])
    code, _, said = bench.run(*launcher)
    assert code == 0 and bench.states() == ["submitted"] * 6, said
    assert not bench.calls()
    bench.run(*launcher)  # submitted points are not submitted again
    todo = later.read_text().splitlines()
    assert len(todo) == 6

    for line in todo[:3]:
        subprocess.run(line, shell=True, cwd=ROOT, check=False)
    code, printed, said = bench.run("--collect")
    assert bench.states() == ["finished", "finished", "failed", *["submitted"] * 3]
    assert code == 1 and "exit code 3" in said and "2 of 6 finished" in printed
    bench.run(*launcher, "--again")
    assert len(later.read_text().splitlines()) == 6 + 4


def test_placeholders_of_a_launcher():
    entry = indices.Entry("id5", "", {}, "waiting", [], "out/points/id5/log.txt")
    words = ["sh", "out/points/id5/job.sh"]
    assert runner.launch_words("srun -n 1 {command}", entry) == [
        "srun",
        "-n",
        "1",
        *words,
    ]
    assert runner.launch_words("sbatch --job-name={id} '--wrap={command}'", entry) == [
        *("sbatch", "--job-name=id5", "--wrap=sh out/points/id5/job.sh")
    ]
    with pytest.raises(ValueError, match="has no {command}"):
        runner.launch_words("srun", entry)


# -- results -----------------------------------------------------------------------


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_pareto_front(lower_is_better):
    rng = random.Random(0)
    sign = -1 if lower_is_better else 1
    for _ in range(200):
        found = [
            (rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 9))
        ]

        expected = [
            not any(
                other != one and other[0] <= one[0] and sign * other[1] >= sign * one[1]
                for other in found
            )
            for one in found
        ]
        assert results.pareto(found, lower_is_better=lower_is_better) == expected


def test_points_that_were_measured_differently_are_not_compared(bench):
    bench.behave(other=["--num_inference_steps=20"])
    index, sweep = bench.run_here(), points.load(bench.folder / "sweep.py")
    sentence = r"cannot be compared: feature_weights of \w+ .* 'these', of"
    with pytest.raises(protocol.UnequalProtocols, match=sentence):
        results.write(bench.out, sweep, index, {})
    assert not (bench.out / "table.md").exists()


def test_seeds_may_differ_only_where_they_are_varied():
    entry = indices.Entry("a", "", {}, "finished", [], "log")
    found = [results.Measured(entry, {}, {"seeds": [seed]}) for seed in (0, 1)]
    assert results.differing(found, ["seeds"]) == ["seeds"]
    with pytest.raises(protocol.UnequalProtocols, match="seeds of a"):
        results.differing(found, ["shift"])


def test_shares_are_pooled_over_seeds_and_cost_counts_the_network(bench):
    entry = bench.run_here().entries[3]  # guidance 2, 5 steps
    one = results.measure(entry)
    colour = one.measures["motion/colour"]
    assert colour == statistics.proportion(20, 80) and colour.value == 0.25
    assert results.cost_of(one, "evaluations") == 10
    heun = dict(one.protocol) | {"sampler": "heun", "guidance_scale": 1}
    heun = dataclasses.replace(one, protocol=heun)
    assert results.cost_of(heun, "evaluations") == 9
    assert results.cost_of(one, "seconds") == entry.seconds
    spared = dataclasses.replace(one, protocol=dict(one.protocol) | {"step_cache": 0.1})
    with pytest.raises(ValueError, match="skips evaluations, which are not counted"):
        results.cost_of(spared, "evaluations")
    assert results.cost_of(one, "guidance_scale") == 2
    with pytest.raises(ValueError, match="'evaluations', 'seconds' or a setting"):
        results.cost_of(one, "model")
    with pytest.raises(ValueError, match="did you mean 'motion/colour'"):
        results.quality_of(one, "motion/color")
    scores = entry.folder / "scores.json"
    scores.write_text(scores.read_text().replace("these", "those"))
    with pytest.raises(ValueError, match="digest"):
        results.measure(entry)
