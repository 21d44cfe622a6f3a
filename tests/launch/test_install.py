"""Finding a Python and making an environment: offline, with a package made here."""

import base64
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from launch import install

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = pathlib.Path(sys._base_executable)
MINOR = sys.version_info[1]


def make_wheel(folder: pathlib.Path, version: str) -> None:
    """Writes a wheel of a package `tiny` that has nothing but a version."""
    folder.mkdir(exist_ok=True)
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record += f"{name},sha256={digest.decode().rstrip('=')},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture(scope="module")
def fresh_environment(tmp_path_factory):
    """A new environment; making one takes seconds, so the tests copy it."""
    folder = tmp_path_factory.mktemp("fresh") / ".venv"
    install.create(folder)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, fresh_environment):
    """A folder with a requirements file; what it needs lies beside it."""

    def create(folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh_environment, folder, symlinks=True)
        print("made")

    monkeypatch.setattr(install, "create", create)
    folder = tmp_path / "a project"
    for version in ("1.0", "2.0"):
        make_wheel(folder.parent / "wheels", version)
    folder.mkdir()
    (folder / "constraints.txt").write_text("tiny==1.0\n")
    (folder / "requirements.txt").write_text(
        f"--no-index\n--find-links {tmp_path / 'wheels'}\n-c constraints.txt\ntiny\n"
    )
    monkeypatch.setattr(install, "ATTEMPTS", 1)
    # A machine's own constraints or indices would be read even without an index.
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def version(venv: pathlib.Path) -> str:
    program = "import tiny; print(tiny.version)"
    return subprocess.check_output([venv / "bin/python", "-c", program], text=True)


def test_an_environment_is_made_once_and_remade_when_it_must_be(project, capsys):
    venv, files = project / ".venv", [project / "requirements.txt"]
    assert not install.is_finished(venv, install.stamp(files, "cpu"))
    install.install(venv, files, "cpu")
    assert install.is_finished(venv, install.stamp(files, "cpu"))
    assert version(venv) == "1.0\n"
    assert "made" in capsys.readouterr().out

    # Finished: nothing is run.
    install.install(venv, files, "cpu")
    assert capsys.readouterr() == ("", "")

    # A changed pin, in a file that the requirements name, is installed into it.
    (project / "constraints.txt").write_text("tiny==2.0\n")
    assert not install.is_finished(venv, install.stamp(files, "cpu"))
    install.install(venv, files, "cpu")
    assert version(venv) == "2.0\n"
    assert "made" not in capsys.readouterr().out

    # An installation that was killed leaves a package half there, and the marker.
    (venv / ".installed").unlink()
    (venv / ".installing").touch()
    (installed,) = venv.glob("lib/python*/site-packages/tiny.py")
    installed.write_text("")
    install.install(venv, files, "cpu")
    assert version(venv) == "2.0\n"
    assert "made" in capsys.readouterr().out

    # A Python that has gone, or was never one.
    (venv / ".installed").unlink()
    (venv / "bin" / "python").unlink()
    install.install(venv, files, "cpu")
    assert version(venv) == "2.0\n"


def test_what_cannot_be_installed_is_named_and_not_stamped(project, capsys):
    (project / "requirements.txt").write_text("--no-index\nno-such-package==1\n")
    files = [project / "requirements.txt"]
    with pytest.raises(install.Failed, match="no-such-package.*install.log"):
        install.install(project / ".venv", files, "cpu")
    assert not install.is_finished(project / ".venv", install.stamp(files, "cpu"))
    assert (project / ".venv" / ".installing").exists()


def test_the_command_line_checks_quickly_and_explains(project):
    def run(*arguments, **environment):
        return subprocess.run(
            [BASE, "-I", ROOT / "launch" / "install.py", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )

    venv, file = project / ".venv", project / "requirements.txt"
    arguments = ["--accelerator", venv, file]
    cpu = {"SORA_ACCELERATOR": "cpu"}
    assert run("--check", *arguments, **cpu).returncode == 1
    venv.mkdir()
    (venv / ".installed").write_text(install.stamp([file], "cpu"))
    assert run("--check", *arguments, **cpu).returncode == 0
    assert run(*arguments, **cpu).returncode == 0
    # For another accelerator the same requirements mean other packages.
    assert run("--check", *arguments, SORA_ACCELERATOR="tpu").returncode == 1
    wrong = run("--check", *arguments, SORA_ACCELERATOR="gpu")
    assert wrong.returncode == 1 and "cpu, cuda or tpu" in wrong.stderr


@pytest.mark.parametrize(
    "devices, kind",
    [
        ({}, "cpu"),
        ({"dev/accel0": ""}, "tpu"),
        ({"dev/accel/accel0": ""}, "cpu"),  # a laptop's neural unit
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, "cuda"),
        ({"dev/nvidiactl": ""}, "cpu"),  # a driver without a device
        ({"dev/dxg": ""}, "cuda"),
        (
            {
                "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n",
                "sys/bus/pci/devices/0000:00:05.0/device": "0x006f\n",
            },
            "tpu",
        ),
        (
            {  # Google's network card
                "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n",
                "sys/bus/pci/devices/0000:00:05.0/device": "0x0042\n",
            },
            "cpu",
        ),
    ],
)
def test_the_accelerator_is_seen(tmp_path, monkeypatch, devices, kind):
    monkeypatch.delenv("SORA_ACCELERATOR", raising=False)
    for name, text in devices.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert install.accelerator(tmp_path) == kind


@pytest.mark.parametrize(
    "answer, names",
    [
        ("echo 595.10.01; echo 595.10.01", ["cuda.txt"]),
        ("echo 580.65", ["cuda.txt"]),
        ("echo 535.104.05", ["cuda12.txt"]),
        ("echo no devices were found; exit 6", []),
    ],
)
def test_the_driver_decides_the_cuda_version(tmp_path, monkeypatch, answer, names):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{answer}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [file.name for file in install.fitting_files("cuda")] == names
    assert [file.name for file in install.fitting_files("tpu")] == ["tpu.txt"]
    assert install.fitting_files("cpu") == []


def find_python(home: pathlib.Path, *minors: int, pyenv: str = ".pyenv"):
    """Runs find_python of launch/environment.sh on a machine with nothing but `home`.

    Everything on PATH is in home/bin.
    """
    (home / "bin").mkdir(parents=True, exist_ok=True)
    for tool in ("bash", "dirname", "sed"):
        if not (home / "bin" / tool).exists():
            (home / "bin" / tool).symlink_to(shutil.which(tool))
    script = (
        f". '{ROOT}/launch/environment.sh'\n"
        f"find_python '{home}/none' {' '.join(map(str, minors))}\n"
    )
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        env={
            "PATH": str(home / "bin"),
            "HOME": str(home),
            "PYENV_ROOT": str(home / pyenv),
        },
    )


def script(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def test_a_python_is_found_on_path(tmp_path):
    home = tmp_path / "a home"
    # What pyenv leaves on PATH for a version that is not chosen fails when it is run.
    script(home / "bin" / f"python3.{MINOR}", "echo 'pyenv: not found' >&2; exit 127")
    script(home / "bin" / "python3", f'exec "{BASE}" "$@"')
    found = find_python(home, MINOR)
    assert found.returncode == 0
    assert pathlib.Path(found.stdout.strip()).resolve() == BASE.resolve()
    assert find_python(home, MINOR + 1).returncode != 0


def test_a_python_is_found_in_pyenv(tmp_path):
    script(
        tmp_path / "my pyenv/versions" / f"3.{MINOR}.9/bin/python",
        f'exec "{BASE}" "$@"',
    )
    found = find_python(tmp_path, MINOR + 1, MINOR, pyenv="my pyenv")
    assert pathlib.Path(found.stdout.strip()).resolve() == BASE.resolve()


def test_a_python_is_found_or_fetched_through_uv(tmp_path):
    # uv finds nothing until it has installed a Python.
    script(
        tmp_path / "bin" / "uv",
        f'case "$*" in\n"python install 3.{MINOR}") : >"$HOME/has"; echo fetching;;\n'
        f'"python find 3.{MINOR}") [ -e "$HOME/has" ] && echo "{BASE}";;\nesac',
    )
    found = find_python(tmp_path, MINOR)
    assert (found.stdout, found.stderr) == (f"{BASE}\n", "fetching\n")


def test_the_base_is_found_behind_a_virtual_environment(tmp_path):
    # Remaking .venv with its own Python would saw off the branch it sits on.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    script(tmp_path / "bin" / "python", f'exec "{sys.executable}" "$@"')
    (tmp_path / "bin" / "python3").unlink()
    found = find_python(tmp_path, MINOR).stdout.strip()
    assert found and ".venv" not in found


def test_no_python_is_one_sentence(tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "readlink"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copytree(ROOT / "launch", tmp_path / "clone" / "launch")
    shutil.copy(ROOT / "requirements.txt", tmp_path / "clone")
    for command in ("quickstart", "test"):
        ended = subprocess.run(
            ["bash", tmp_path / "clone" / "launch" / command],
            capture_output=True,
            text=True,
            env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)},
        )
        assert ended.returncode == 1
        assert ended.stderr.startswith("Found no Python of version 3.12 3.13 3.14")
        assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "clone" / ".venv").exists()
