"""Several processes on one machine: they find each other, and end together."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

JOIN = """
import os
import jax
from sora_jax.core import mesh
mesh.initialize()
from jax.experimental import multihost_utils
ids = multihost_utils.process_allgather(jax.numpy.array([jax.process_index()]))
# A shorter text in the second process, which is not the one that counts.
text = mesh.broadcast_text("ü0ü" if jax.process_index() == 0 else "1")
assert text == "ü0ü", text
assert mesh.broadcast_text("" if jax.process_index() == 0 else "1") == ""
counts = [jax.process_count(), jax.device_count(), jax.local_device_count()]
# One write, for the collectives' library prints from a thread of its own.
os.write(1, f"\\n{counts} {ids.tolist()}\\n".encode())
"""
INDEX = "import os; index = int(os.environ['SORA_PROCESS_ID'])\n"


def pod(program, processes=2, devices=1, **kwargs):
    command = [sys.executable, ROOT / "launch" / "local_pod.py"]
    command += ["--processes", str(processes), "--devices", str(devices), "--"]
    return subprocess.Popen(
        [*command, sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_processes_find_each_other():
    process = pod(JOIN, processes=2, devices=3)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert sorted(line for line in lines if "6, 3" in line) == [
        "[0] [2, 6, 3] [[0], [1]]",
        "[1] [2, 6, 3] [[0], [1]]",
    ]


def test_one_failure_ends_all():
    program = INDEX + (
        "import sys, time\nif index == 1: sys.exit(7)\ntime.sleep(50); print('late')"
    )
    began = time.monotonic()
    process = pod(program, processes=3)
    output = process.communicate(timeout=40)[0]
    assert process.returncode == 7
    assert "process 1 ended with 7" in output and "late" not in output
    assert time.monotonic() - began < 20


def test_a_process_that_fails_does_not_wait_for_the_others():
    program = INDEX + (
        "import sys, time\n"
        "from sora_jax.core import job, mesh\n"
        "def main():\n"
        "    mesh.initialize()\n"
        "    if index == 0: raise RuntimeError('lost the disk')\n"
        "    time.sleep(100)\n"
        "job.run(main, 'failing')\n"
    )
    began = time.monotonic()
    process = pod(program)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 1
    assert "RuntimeError: lost the disk" in output
    assert "process 0 ended with 1" in output
    assert time.monotonic() - began < 60


def test_a_killed_process_counts_as_a_shell_counts_it():
    program = INDEX + "import signal\nif index == 0: os.kill(os.getpid(), 9)"
    process = pod(program)
    process.communicate(timeout=40)
    assert process.returncode == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once(number):
    program = INDEX + (
        "import signal, sys, time\n"
        "def stop(number, frame):\n"
        "    print('saved', number, flush=True); sys.exit(75)\n"
        f"signal.signal({int(number)}, stop)\n"
        "print('ready', flush=True)\n"
        "time.sleep(50)\n"
    )
    # A process that the test harness starts in the background ignores SIGINT.
    process = pod(program, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[0] ready\n", "[1] ready\n"]
    os.kill(process.pid, number)
    rest = process.communicate(timeout=40)[0].splitlines()
    assert process.returncode == 75
    assert sorted(rest) == [f"[{i}] saved {int(number)}" for i in range(2)]
