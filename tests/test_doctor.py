"""What the machine is said to be able to do."""

import json
import os
import pathlib

import numpy as np
import pytest

from configs import toy
from tests import conftest

# ml_collections loads a config file in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def doctor():
    with conftest.lone_job("doctor") as job:
        yield job


def test_the_processor_is_that_of_this_machine(doctor):
    found = doctor.processor()
    assert found["cores"] == len(os.sched_getaffinity(0))
    text = pathlib.Path("/proc/meminfo").read_text()
    total = int(text.split("MemTotal:")[1].split()[0]) / 2**20
    assert found["memory_gib"] == pytest.approx(total, abs=0.1)
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    assert ("AVX2" in found["instructions"]) == ("avx2" in flags)
    assert ("AVX-512" in found["instructions"]) == ("avx512f" in flags)


def test_a_rate_leaves_the_first_call_out(doctor, monkeypatch):
    clock, lengths = [0.0], iter([100.0] + [0.5] * 20)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += next(lengths)
        return np.zeros(1)

    assert doctor.rate(work, seconds=2.0) == pytest.approx(2.0)


def test_a_faster_machine_takes_more_than_so_many_times_the_steps(doctor):
    here = doctor.quickstart_steps(3.4)
    assert here == pytest.approx((1200 - 433) * 3.4, abs=1)
    assert doctor.quickstart_steps(6.8) > 2.3 * here
    assert doctor.quickstart_steps(0.5) == 0


def test_the_disk_and_the_decoder_have_a_rate(doctor, tmp_path, monkeypatch):
    assert 1e6 < doctor.disk_rate(tmp_path) < 1e11
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    assert doctor.decoded_frames() > 10


def test_a_second_process_finds_the_compiled_program(doctor):
    assert doctor.compile_cache_works()


def test_what_is_not_installed_is_named_with_what_needs_it(doctor, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.missing()["ffmpeg"] == "tests of video files"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert "ffmpeg" not in doctor.missing() and "chromium" not in doctor.missing()
    assert doctor.version_of("no-such-package") == "missing"


def test_the_job_prints_and_stores_what_it_found(doctor, tmp_path, capsys, monkeypatch):
    def found(*arguments):
        yield "versions", {"jax": "1", "python": "3"}
        yield "training", {"steps_per_second": 6.3, "compile_cache_works": True}
        yield "missing", {}

    monkeypatch.setattr(doctor, "examine", found)
    conftest.run_with_flags(doctor, out=tmp_path / "found.json", folder=tmp_path)
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored == dict(found(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert "  compile cache works  yes" in lines and lines[-2:] == [
        "missing",
        "  nothing",
    ]
    assert conftest.refusal(doctor, folder=tmp_path / "no") == (
        f"doctor: --folder {tmp_path / 'no'} is not a folder"
    )


def test_a_package_that_every_job_needs_is_asked_for(doctor, tmp_path, monkeypatch):
    sections = [("versions", {"jax": "1", "av": "missing"})]
    monkeypatch.setattr(doctor, "examine", lambda *arguments: iter(sections))
    assert "av not installed" in conftest.refusal(doctor, folder=tmp_path)


@pytest.mark.slow
def test_steps_of_the_toy_are_timed(doctor):
    per_second, compiling = doctor.training_rate(toy.get_config(), 0.5)
    assert 0.05 < per_second < 1000 and compiling > 0.5
