"""The quickstart's stages: skipped, resumed, stopped and failed, with small jobs."""

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from launch import quickstart
from sora_jax.toyworld import captions, families

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Stands for a training job: saves its step when it is told to end, and goes on there.
JOB = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
state = folder / "state"
step = int(state.read_text()) if state.exists() else 0
def stop(number, frame):
    state.write_text(str(step)); print("saved"); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: print("Ctrl-C reached the job"))
print("starting at", step)
while step < int(sys.argv[2]):
    step += 1
    time.sleep(0.1)
(folder / "product").touch()
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Replaces the recipe; the test fills the list with (name, steps)."""
    recipe = []

    def stages(args):
        return [
            quickstart.Stage(
                name,
                ["-c", program, str(args.out / name), str(steps)],
                args.out / name / "product",
            )
            for name, program, steps in recipe
        ]

    monkeypatch.setattr(quickstart, "stages", stages)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", "my runs"])
    monkeypatch.setenv("SORA_SETUP_SECONDS", "0")
    return recipe


def run(tmp_path):
    return quickstart.run(quickstart.parse(["--out", str(tmp_path / "my runs")]))


def test_finished_stages_are_skipped_and_later_ones_follow(jobs, tmp_path, capfd):
    jobs += [("a", JOB, 1), ("b", JOB, 1)]
    assert run(tmp_path) == 0
    first = capfd.readouterr()
    assert first.err.count("starting at 0") == 2
    assert re.search(r"report: .*my runs/scores/report\.html", first.out)
    assert run(tmp_path) == 0
    again = capfd.readouterr()
    assert (
        "starting" not in again.err
        and again.err.count("skipped, finished earlier") == 2
    )
    # What a removed product was made into is made again as well.
    (tmp_path / "my runs" / "a" / "product").unlink()
    assert run(tmp_path) == 0
    assert capfd.readouterr().err.count("starting at 0") == 2

    timing = json.loads((tmp_path / "my runs" / "timing.json").read_text())
    seconds = [timing["stages"][name]["seconds"] for name in "ab"]
    assert all(0.2 <= s < 30 for s in seconds)  # two runs of each
    assert timing["total_seconds"] == pytest.approx(sum(seconds), abs=0.11)
    assert "starting at 0" in (tmp_path / "my runs/logs/a.log").read_text()


def test_a_stage_that_ends_when_it_is_stopped_is_the_last(jobs, tmp_path, capfd):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (folder / 'product').touch())\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while not (folder / 'product').exists(): time.sleep(0.05)\n"
    )
    jobs += [("a", program, 1), ("b", JOB, 1)]
    assert run(tmp_path) == 130
    assert "2/2 b" not in capfd.readouterr().err
    timing = json.loads((tmp_path / "my runs" / "timing.json").read_text())
    assert timing["stages"]["a"]["finished"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_stage_saves_and_goes_on(jobs, tmp_path, number):
    """Run in a process of its own, which is sent the signal."""
    program = (
        "import sys; sys.argv[0] = 'quickstart.py'\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from launch import quickstart\n"
        "args = quickstart.parse()\n"
        "quickstart.stages = lambda args: [quickstart.Stage('a', ['-c', "
        f"{JOB!r}, str(args.out / 'a'), '20'], args.out / 'a' / 'product')]\n"
        "sys.exit(quickstart.run(args))\n"
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", program, "--out", tmp_path / "my runs"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    process = start()
    lines = []
    while "starting at 0" not in (lines[-1:] or [""])[0]:
        lines.append(process.stderr.readline())
    time.sleep(0.5)
    # A terminal sends Ctrl-C to the whole group.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "saved" in rest and "Ctrl-C reached the job" not in rest
    assert "stopped during 'a'; to resume, run ./launch/quickstart --out '" in rest
    step = int((tmp_path / "my runs" / "a" / "state").read_text())
    assert 0 < step < 20

    process = start()
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert f"starting at {step}" in rest


def test_a_failure_is_one_sentence_with_the_log(jobs, tmp_path, capfd):
    jobs += [("a", "print('the reason'); raise SystemExit(3)", 1), ("b", JOB, 1)]
    assert run(tmp_path) == 3
    log = tmp_path / "my runs" / "logs" / "a.log"
    sentence = f"quickstart: 'a' failed (exit code 3); its output is in {log}"
    assert capfd.readouterr().err.splitlines()[-1] == sentence
    assert log.read_text() == "the reason\n"
    assert not (tmp_path / "my runs" / "b").exists()
    # A job that ends well without its product has not finished either.
    jobs[0] = ("c", "pass", 1)
    assert run(tmp_path) == 1
    assert "did not write" in capfd.readouterr().err


def test_other_settings_are_put_to_the_job(jobs, tmp_path, capfd):
    jobs += [("a", JOB, 1), ("b", JOB, 1), ("c", JOB, 1)]
    assert run(tmp_path) == 0
    capfd.readouterr()
    jobs[1] = ("b", JOB, 2)
    assert run(tmp_path) == 0
    printed = capfd.readouterr().err
    assert (
        printed.count("skipped, finished earlier") == 1
        and printed.count("starting at 0") == 2
    )
    jobs[0] = ("a", "raise SystemExit('this was made with other settings')", 1)
    assert run(tmp_path) == 1
    assert "this was made with other settings" in capfd.readouterr().err


def test_two_do_not_work_in_one_folder(jobs, tmp_path, capfd):
    jobs += [("a", JOB, 1)]
    (tmp_path / "my runs" / "logs").mkdir(parents=True)
    with open(tmp_path / "my runs" / "logs" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(tmp_path) == 2
    assert "another quickstart is running" in capfd.readouterr().err
    assert run(tmp_path) == 0


def test_a_folder_that_cannot_be_is_refused(tmp_path, capfd):
    (tmp_path / "file").touch()
    args = quickstart.parse(["--out", str(tmp_path / "file" / "run")])
    assert quickstart.run(args) == 2
    told = capfd.readouterr().err
    assert told.endswith("cannot be written: Not a directory\n")
    assert told.count("\n") == 1


def test_memory_of_all_descendants_is_measured(jobs, tmp_path):
    grab = "import sys, time; x = bytearray(80 << 20); time.sleep(1.5)"
    program = (
        "import subprocess, sys, pathlib\n"
        f"two = [subprocess.Popen([sys.executable, '-c', {grab!r}]) for _ in 'ab']\n"
        "[process.wait() for process in two]\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(); (folder / 'product').touch()"
    )
    jobs += [("a", program, 1)]
    assert run(tmp_path) == 0
    peaks = json.loads((tmp_path / "my runs/timing.json").read_text())["peak_bytes"]
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # the tests' own
    assert 160 << 20 < peaks["all_processes_sampled"] < (1 << 30) + mine
    assert peaks["largest_process"] > 80 << 20


def test_a_workers_open_output_is_not_waited_for(jobs, tmp_path):
    left = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, pathlib\n"
        f"subprocess.Popen([sys.executable, '-c', {left!r}])\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(); (folder / 'product').touch()"
    )
    jobs += [("a", program, 1)]
    began = time.monotonic()
    assert run(tmp_path) == 0
    assert time.monotonic() - began < 20


def test_a_job_on_a_terminal_sees_one(tmp_path):
    """A rewritten progress line reaches the terminal; the log keeps its last form."""
    program = (
        "import pathlib, sys\n"
        "from launch import quickstart\n"
        "job = 'import os, sys; print(sys.stderr.isatty(), os.get_terminal_size(2)."
        'columns); sys.stderr.write(chr(13) + chr(27) + "[K1/2" + chr(13) + chr(27) + '
        '"[K2/2" + chr(10))\'\n'
        "log = pathlib.Path(sys.argv[1])\n"
        "child = quickstart.Child([sys.executable, '-c', job], log)\n"
        "code = child.wait(); child.close(); sys.exit(code)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "log"], cwd=ROOT, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(ours, 1024):
            seen += data
    os.close(ours)
    assert process.wait(timeout=20) == 0
    assert b"True" in seen and b"1/2" in seen
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("True") and lines[1] == "2/2"


def test_the_denoiser_gets_the_minutes_that_are_left(tmp_path):
    record = quickstart.Record(tmp_path / "timing.json")
    record.data["install_seconds"] = 60
    seconds = {"shards": 50.0, "latents": 100.0, "denoiser": 30.0}  # 30 of it so far
    record.data["stages"] = {name: {"seconds": s} for name, s in seconds.items()}
    args = quickstart.parse(["--minutes", "20"])
    after = quickstart.AFTER_SECONDS + quickstart.AFTER_SHARE * 100
    left = 20 - (60 + 50 + 100 + after) / 60
    assert record.minutes_left(args) == pytest.approx(left)
    half = quickstart.parse(["--num_clips", str(quickstart.CLIPS // 2)])
    after += quickstart.AFTER_SHARE * 100  # half as many clips took as long
    assert record.minutes_left(half) == pytest.approx(20 - (210 + after) / 60)
    few = quickstart.parse(["--minutes", "2"])
    assert record.minutes_left(few) == quickstart.LEAST_MINUTES


def test_a_resumed_stage_may_have_other_minutes_left(jobs, tmp_path, capfd):
    program = (
        "import pathlib, sys; print('minutes', float(sys.argv[2]))\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)\n"
        "(folder / 'product').touch()"
    )
    jobs += [("denoiser", program, quickstart.MINUTES)]
    assert run(tmp_path) == 0
    first = capfd.readouterr().err
    assert "20 minutes in all, of which set-up took 0m00s" in first
    assert float(re.search(r"minutes ([0-9.]+)\n", first)[1]) == pytest.approx(
        20 - quickstart.AFTER_SECONDS / 60, abs=0.1
    )
    assert run(tmp_path) == 0
    assert "skipped, finished earlier" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags", [[], ["--from_scratch"], ["--steps", "7"], ["--recaption"]]
)
def test_the_recipe_trains_what_is_asked_for(flags, tmp_path):
    recipe = quickstart.stages(quickstart.parse(["--out", str(tmp_path), *flags]))
    by_name = {stage.name: stage.command for stage in recipe}
    assert ("video VAE" in by_name) == ("--from_scratch" in flags)
    vae = tmp_path / "vae" if "--from_scratch" in flags else quickstart.SHIPPED
    assert f"--vae={vae}" in by_name["latents"]
    minutes = f"--config.loop.minutes={quickstart.MINUTES}"
    assert (minutes in by_name["denoiser"]) == ("--steps" not in flags)
    assert ("--config.loop.num_steps=7" in by_name["denoiser"]) == ("--steps" in flags)
    assert "--model=toy" in by_name["first videos"]
    assert ("captions" in by_name) == ("--recaption" in flags)
    if "--recaption" in flags:
        shards = tmp_path / "recaptioned"
        assert f"--out={shards}" in by_name["captions"]
        assert f"--source=shards:{shards}" in by_name["latents"]
        for stage in ("text encoder", "denoiser"):
            weights = [
                a for a in by_name[stage] if a.startswith("--config.text.tiers.")
            ]
            read = {
                a.split(".")[3].split("=")[0]
                for a in weights
                if a[-2:] != "=0" and a[-2:] != ".0"
            }
            assert read == {"model_short", "model_dense"}


def test_the_recipe_runs_jobs_and_configs_that_exist(tmp_path):
    args = quickstart.parse(["--out", str(tmp_path), "--smoke"])
    recipe = quickstart.stages(args)
    assert len({stage.name for stage in recipe}) == len(recipe)
    for stage in recipe:
        module = stage.command[1].replace(".", "/") + ".py"
        assert (ROOT / module).is_file(), module
        for argument in stage.command:
            if argument.startswith("--config="):
                assert (ROOT / argument.partition("=")[2]).is_file()


def test_the_prompts_are_in_the_words_that_are_learned():
    for prompt in quickstart.PROMPTS:
        stated = captions.parse(prompt)
        for subject in stated.subjects:
            assert subject.colour and subject.shape, prompt
        assert stated.relation or stated.subjects[0].direction, prompt
    learned = [entry.partition(":")[0] for entry in quickstart.FAMILIES.split(",")]
    assert set(learned) <= set(families.FAMILIES)
    assert sorted({name.removesuffix("_held_out") for name in quickstart.SUITES}) == (
        sorted(learned)
    )
