"""Apache Beam writes the same bytes as worker processes, and goes on after failures.

Beam runs in an environment of its own, and what it writes is compared with what this one
writes, so older versions of NumPy, Pillow and protobuf are part of the comparison.
"""

import functools
import importlib.util
import pathlib
import pickle
import signal
import subprocess
import textwrap
import time
import types

import PIL.Image
import pytest

from sora_jax import prepare
from sora_jax.core import paths
from sora_jax.data import array_files, beam, shards, toy_clips, video_clips
from tests import conftest
from tests.data import clips
from tests.data.test_video_io import film, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIRECT = "--direct_num_workers=2 --direct_running_mode=multi_processing"
refusal = functools.partial(conftest.refusal, prepare)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != paths.LOCK
    }


def videos(folder):
    """A folder of eight videos, a folder of frames, captions and junk."""
    (folder / "frames").mkdir(parents=True)
    for index in range(8):
        write(folder / f"{index}.mp4", film(20 + index), crf=str(20 + index))
        (folder / f"{index}.txt").write_text(f"film {index}, é")
    for index, picture_hwc in enumerate(film(6)):
        PIL.Image.fromarray(picture_hwc).save(folder / "frames" / f"{index}.png")
    (folder / "junk.mov").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What this environment writes, without and with worker processes."""
    folder = tmp_path_factory.mktemp("expected")
    videos(folder / "in")
    source = video_clips.FolderClips(folder / "in", (24, 32), 5, 5.0, frames_fps=5.0)
    shards.write(folder / "videos", source)
    shards.write(folder / "pool", source, num_workers=2)
    assert contents(folder / "pool") == contents(folder / "videos")
    source = clips.Clips(kills=(2,), skipped=(5,))
    shards.write(folder / "clips", source, num_workers=2)
    return folder


@pytest.fixture
def dask_options(beam_python, tmp_path):
    """Options for a scheduler of Dask with two workers, which are stopped at the end."""
    file = tmp_path / "scheduler.json"
    shared = ["--scheduler-file", file, "--no-dashboard"]
    commands = [["dask_scheduler", "--host", "127.0.0.1", "--port", "0", *shared]]
    # A worker under a nanny may not start processes.
    worker = ["dask_worker", "--no-nanny", "--nthreads", "1", "--death-timeout", "60"]
    commands += [[*worker, "--local-directory", tmp_path, *shared]] * 2
    started = []
    try:
        for module, *arguments in commands:
            command = [beam_python, "-m", f"distributed.cli.{module}", *arguments]
            with open(tmp_path / f"{len(started)}.log", "w") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, stderr=log))
            until = time.monotonic() + 60
            while not file.exists() and time.monotonic() < until:
                time.sleep(0.1)
        yield f"--dask_scheduler_file={file}"
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def check_runner(python, runner, options, expected, tmp_path):
    (tmp_path / "in").symlink_to(expected / "in")
    done = subprocess.run(
        [python, "-m", "tests.data.beam_job", runner, options, str(tmp_path)],
        cwd=ROOT,
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("videos", "clips"):
        assert contents(tmp_path / name) == contents(expected / name)
    # The process of item 2 dies; the bundle does not fail, and only that item is lost.
    reason = b"the decoder died on it (exit code -9)"
    assert reason in contents(tmp_path / "clips")["report.json"]
    # What was written before the failure is not written again.
    said, stamps = done.stdout.splitlines()
    assert said.startswith(f"{runner} failed with ") and "interrupted here" in said
    stamps = {int(stamp) for stamp in stamps.split()}
    written = (tmp_path / "clips").glob("clips-train.array_record-*")
    assert stamps <= {path.stat().st_mtime_ns for path in written}
    return stamps, [*(tmp_path / "seen").iterdir()]


def test_two_processes_of_the_direct_runner(beam_python, expected, tmp_path):
    stamps, processes = check_runner(
        beam_python, "DirectRunner", DIRECT, expected, tmp_path
    )
    assert stamps and len(processes) in (3, 4)  # one or two of the second run


def test_two_workers_of_dask(beam_python, dask_options, expected, tmp_path):
    _, processes = check_runner(
        beam_python, "DaskRunner", dask_options, expected, tmp_path
    )
    assert len(processes) in (1, 2)  # the second worker may come late


@pytest.mark.slow
def test_a_killed_job_goes_on_and_gives_the_same_files(beam_python, tmp_path):
    """kill -9 of the command as soon as the first file is there."""
    out = tmp_path / "killed"
    command = [beam_python, "-m", "sora_jax.prepare", "--source", "toyworld:tw16"]
    command += ["--num_clips", "1000", "--out", str(out)]
    command += ["--runner", "DirectRunner", "--beam_options", DIRECT]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    first = out / ".partial" / "00000" / "part.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = [*out.glob(".partial/*/part.json")]
    stamps = {path.with_suffix(".array_record").stat().st_mtime_ns for path in made}
    assert 1 <= len(stamps) < 4
    subprocess.run(command, cwd=ROOT, check=True, timeout=180, **quiet)
    written = [*out.glob("clips-train.array_record-*")]
    assert stamps <= {path.stat().st_mtime_ns for path in written}
    shards.write(tmp_path / "whole", toy_clips.ToyClips("tw16", 1000))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_job_that_is_left_over_does_not_touch_the_next_ones(tmp_path, monkeypatch):
    """A runner may go on when its command was killed and another one has finished."""
    out, tasks = tmp_path / "out", {}

    class Left(beam.Engine):
        def __post_init__(self):
            pass

        def run(self, tasks_by_part, **options):
            tasks.update(tasks_by_part)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(out, clips.Clips(), engine=Left("none"))
    note = lambda item=None, finished=0: None  # noqa: E731
    pickle.loads(pickle.dumps(tasks[1]))(1, note, {})
    assert array_files.has_part(out, 1)
    shards.write(out, clips.Clips())
    before = contents(out)
    with pytest.raises(shards.ShardsError, match="finished or started anew"):
        tasks[2](2, note, {})
    # The same between the beginning and the end of a part.
    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "other", clips.Clips(num=4), engine=Left("none"))
    plan = tmp_path / "other" / ".partial" / "plan.json"
    with pytest.raises(shards.ShardsError, match="finished or started anew"):
        tasks[0](0, lambda **said: plan.write_text("{}"), {})
    assert not array_files.has_part(tmp_path / "other", 0)
    assert contents(out) == before


def test_a_part_of_a_folder_knows_its_own_videos_only(tmp_path, monkeypatch):
    monkeypatch.chdir(videos(tmp_path / "in").parent)
    source = video_clips.FolderClips(
        pathlib.Path("in"), (24, 32), 5, 5.0, frames_fps=5.0
    )
    parts, skipped = source.plan(source.items)
    assert sum(map(len, parts)) == 10
    note = lambda item=None, finished=0: None  # noqa: E731
    for part in parts:
        own = pickle.loads(pickle.dumps(source.only(part)))
        assert own.folder == tmp_path / "in"
        assert {*own.items} == {video for video, _, _ in part}
        assert all(own.items[video] == source.items[video] for video in own.items)
        assert own.plan(own.items)[1] == []
        assert [*own.clips(part, note, {})] == [*source.clips(part, note, {})]


def test_a_part_that_an_earlier_attempt_made_is_not_made_again():
    def task(part, note, avoid):
        raise AssertionError

    beam._make((3, task), clips.Clips.bounds, lambda part: part == 3)
    with pytest.raises((AttributeError, RuntimeError, pickle.PicklingError)):
        beam._make((4, task), clips.Clips.bounds, lambda part: part == 3)


def test_a_worker_that_may_not_start_processes_says_what_to_do(monkeypatch):
    daemon = types.SimpleNamespace(daemon=True)
    monkeypatch.setattr(beam.multiprocessing, "current_process", lambda: daemon)
    with pytest.raises(RuntimeError, match="--no-nanny"):
        beam._make((0, clips.modules), clips.Clips.bounds, lambda part: False)


_WRONG = """
    from sora_jax.data import beam

    for runner, *options in (
        ("Nope",),
        ("no.such.Runner",),
        ("DirectRunner", "--direct_num_workers=x"),
        ("DirectRunner", "--bogus=1"),
        ("DataflowRunner", "--temp_location=here"),
    ):
        try:
            beam.Engine(runner, tuple(options))
            print("taken")
        except beam.BeamError as error:
            print(str(error).replace(chr(10), "|"))
"""


def test_wrong_runners_and_options_are_refused_in_one_sentence(beam_python):
    said = subprocess.check_output(
        [beam_python, "-c", textwrap.dedent(_WRONG)],
        cwd=ROOT,
        text=True,
        stderr=subprocess.DEVNULL,
    ).splitlines()
    assert len(said) == 5
    for line, part in zip(
        said,
        (
            "--runner Nope: Unexpected pipeline runner",
            "--runner no.such.Runner: No module named 'no'",
            "--beam_options: argument --direct_num_workers: invalid int value: 'x'",
            "--beam_options: Beam has no option --bogus for DirectRunner",
            "--beam_options: Pipeline has validations errors: Invalid GCS path (here)",
        ),
        strict=True,
    ):
        assert line.startswith(part), line


def test_flags_of_runners_are_refused_where_they_mean_nothing(tmp_path):
    asked = {"source": "toyworld:tw16", "num_clips": 4, "out": tmp_path / "out"}
    if importlib.util.find_spec("apache_beam"):
        pytest.skip("Beam is installed beside the tests")
    said = refusal(**asked, runner="DirectRunner")
    assert "launch/requirements/beam.txt" in said and "\n" not in said
    said = refusal(**asked, runner="DirectRunner", workers=2)
    assert "--workers has no meaning with --runner" in said
    said = refusal(**asked, beam_options="--direct_num_workers=2")
    assert "--beam_options has no meaning without --runner" in said
    asked = {"source": "shards:x", "out": tmp_path / "out", "runner": "DirectRunner"}
    assert "--runner has no meaning for --source shards" in refusal(**asked)
    assert not (tmp_path / "out").exists()
