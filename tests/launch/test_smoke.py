"""The whole recipe for real, at sizes at which nothing is learned."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import readmes

ROOT = pathlib.Path(__file__).resolve().parents[2]
# As a user's jobs run: on one device, and with LLVM's passes, which these sizes are
# worth.
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}


def quickstart(out):
    return subprocess.run(
        [sys.executable, "launch/quickstart.py", "--smoke", "--out", out],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_recipe_runs_from_shards_to_report(tmp_path):
    out = tmp_path / "a run"
    ended = quickstart(out)
    assert ended.returncode == 0, ended.stdout[-4000:]
    videos = sorted((out / "videos").glob("*.mp4"))
    assert len(videos) == len((out / "prompts.txt").read_text().splitlines())
    assert "<html" in (out / "scores" / "report.html").read_text()
    assert json.loads((out / "scores" / "scores.json").read_text())
    timing = json.loads((out / "timing.json").read_text())
    assert all(stage["finished"] for stage in timing["stages"].values())
    assert timing["total_seconds"] > 0
    assert timing["peak_bytes"]["all_processes_sampled"] < 6 << 30

    # Run again, it has nothing to do.
    again = quickstart(out).stdout
    assert again.count("skipped, finished earlier") == len(timing["stages"])

    # The bench that reads a run.
    bench = [sys.executable, "-m", "experiments.bench.loader", "--rounds=1"]
    bench += ["--steps=2", "--model", out / "model", "--latents", out / "latents"]
    said = subprocess.check_output(bench, cwd=ROOT, env=ENVIRONMENT, text=True)
    assert "ratio of the medians" in said

    # What the README files do with a trained run.
    generate, stream = (
        example.replace("runs/quickstart/model", str(out / "model"))
        for example in readmes.blocks("python")
        if "runs/quickstart/model" in example
    )
    generate += "print(frames.shape, frames.min() >= 0, frames.max() <= 1)\n"
    assert run(generate) == "(1, 9, 32, 32, 3) True True\n"
    shapes = [f"(1, {frames}, 32, 32, 3)\n" for frames in (29, 32, 32, 28)]
    assert run(stream) == "".join(shapes)


def run(example: str) -> str:
    program = [sys.executable, "-W", "error", "-c", example]
    return subprocess.check_output(program, cwd=ROOT, env=ENVIRONMENT, text=True)
