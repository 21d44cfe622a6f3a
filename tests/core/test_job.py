"""How a job ends: one sentence for what a file can do, and no process waits."""

import errno
import logging as std_logging
import os
import pathlib
import sys

import jax
import pytest
from absl import flags, logging
from ml_collections import config_flags

from sora_jax.core import digests, job, paths, versions

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "toy.py"


@pytest.fixture(autouse=True)
def hooks(monkeypatch, logging_of_jobs):
    """Puts back what a job sets for its process."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(job.app, "run", lambda main, flags_parser: main([]))


class Ended(BaseException):
    """In place of os._exit."""


def raised(error):
    def main():
        raise error

    return main


TOO_LARGE = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")

MISSING = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.png")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (FULL, 1, "x: run/metrics.jsonl: No space left on device\n"),
        (paths.InUse("run is in use"), 1, "x: run is in use\n"),
        (SystemExit("x: wrong config"), 1, "x: wrong config\n"),
        (ValueError("--size is wrong"), 2, "x: --size is wrong\n"),
        (MISSING, 2, "x: a.png: No such file or directory\n"),
        (PermissionError("a.mp4 cannot be written"), 2, "x: a.mp4 cannot be written\n"),
        (digests.Damaged("a.zarr is damaged"), 1, "x: a.zarr is damaged\n"),
        (FloatingPointError("nan"), 1, "x: nan\n"),
        (KeyboardInterrupt(), 130, "x: interrupted; the same command resumes\n"),
        (TOO_LARGE, 1, f"or more devices ({TOO_LARGE})\n"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug\n"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_process_that_fails_ends_and_says_why(
    error, code, said, several, monkeypatch, capsys
):
    """One of several ends at once: else it would wait for the others."""

    def at_once(code):
        raise Ended(code)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(job.os, "_exit", at_once)
    if "a bug" in said and not several:
        with pytest.raises(RuntimeError):  # Python shows it
            job.run(raised(error), "x")
        return
    with pytest.raises(Ended if several else SystemExit) as end:
        job.run(raised(error), "x")
    assert end.value.args == (code,)
    found = capsys.readouterr().err
    assert found.endswith(said)
    assert ("Traceback" in found) == ("a bug" in said)


def test_processes_that_agree_on_an_exit_leave_in_order(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(SystemExit) as end:
        job.run(raised(SystemExit(75)), "x")
    assert end.value.code == 75


def test_a_job_holds_its_folder_until_it_ends(tmp_path):
    def main():
        job.lock_folder(tmp_path / "run")
        job.lock_folder(tmp_path / "run")
        with pytest.raises(paths.InUse), paths.lock(tmp_path / "run"):
            pass

    for _ in range(2):
        job.run(main, "x")
        assert not (tmp_path / "run").exists()


def test_the_first_process_tries_whether_files_can_be_written(tmp_path, monkeypatch):
    """The others would find its folders, which it removes again, and then miss them."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    job.check_writable(tmp_path / "file" / "out.json", None)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(OSError, match="file is a file, not a folder"):
        job.check_writable(tmp_path / "file" / "out.json", None)


def test_warnings_are_shown_but_not_what_orbax_logs(logging_of_jobs, caplog):
    job.log_warnings()
    std_logging.warning("a field is not known")
    logging.error("a thread's traceback")
    assert caplog.messages == ["a field is not known"]


def test_numbers_that_are_not_finite_are_refused_for_every_flag(monkeypatch, capsys):
    given = flags.FlagValues()
    flags.DEFINE_float("rate", 1.0, "x", lower_bound=0.01, flag_values=given)
    monkeypatch.setattr(job.flags, "FLAGS", given)
    monkeypatch.setattr(
        job.app, "run", lambda main, flags_parser: flags_parser(["x", "--rate=nan"])
    )
    with pytest.raises(SystemExit) as end:
        job.run(lambda: None, "x")
    assert end.value.code == 2
    assert "x: flag --rate=nan: it is not a finite number" in capsys.readouterr().err


def test_help_is_no_failure(monkeypatch):
    given = flags.FlagValues()
    flags.DEFINE_flag(job.app.HelpFlag(), given)
    monkeypatch.setattr(job.flags, "FLAGS", given)
    monkeypatch.setattr(
        job.app, "run", lambda main, flags_parser: flags_parser(["x", "--help"])
    )
    monkeypatch.setattr(job.app, "usage", lambda **_: None)
    with pytest.raises(SystemExit) as end:
        job.run(lambda: None, "x")
    assert end.value.code == 0


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_mesh_flag_fills_the_config(monkeypatch):
    def filled(mesh, *arguments):
        arguments = ["x", f"--config={CONFIG}", *arguments]
        given = flags.FlagValues()
        monkeypatch.setattr(job.flags, "FLAGS", given)
        config_flags.DEFINE_config_file("config", flag_values=given, sys_argv=arguments)
        given(arguments)
        job.fill_mesh(given.config, mesh)
        return dict(given.config.mesh)

    one = {"replica": 1, "fsdp": 1, "ring": 1, "ulysses": 1, "tensor": 1}
    assert filled("fsdp=4,tensor=2") == one | {"fsdp": 4, "tensor": 2}
    assert filled("tensor=2", "--config.mesh.ring=3") == one | {"tensor": 2, "ring": 3}
    with pytest.raises(
        ValueError, match="either --mesh=fsdp=... or --config.mesh.fsdp"
    ):
        filled("fsdp=4", "--config.mesh.fsdp=4")
    with pytest.raises(ValueError, match="'fdsp' is unknown; choose from .*, fsdp"):
        filled("fdsp=4")


def test_arguments_that_are_not_flags_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(job.flags, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(
        job.app, "run", lambda main, flags_parser: flags_parser(["x", "clip.mp4"])
    )
    with pytest.raises(SystemExit) as end:
        job.run(lambda: None, "x")
    assert end.value.code == 2
    assert "x: unknown argument 'clip.mp4'; --help lists" in capsys.readouterr().err


def test_a_run_starts_where_git_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.describe()["source"] == "unknown"
