"""Rehearses a pod on one machine: several processes with virtual CPU devices each.

    python launch/local_pod.py --processes 2 --devices 4 -- \\
        python -m sora_jax.train --config=configs/toy.py --out=runs/toy ...

The same command runs in every process, with what `sora_jax/core/mesh.py` reads to join
them. Each line of output begins with the process's number. When one process fails the
others are ended, as the scheduler of a real pod does; the exit code is that of the
first that failed.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

# What a process that was told to end may take to save its state.
GRACE_SECONDS = 60.0


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Returns what process `index` runs with."""
    kept = re.sub(
        r"--xla_force_host_platform_device_count=\d+",
        "",
        os.environ.get("XLA_FLAGS", ""),
    )
    # Only process 0 would find its programs in a cache on disk; while the others compile
    # theirs it would wait for them at a first collective, whose time is 30 seconds.
    inherited = os.environ.keys() - {"JAX_COMPILATION_CACHE_DIR"}
    return {
        **{name: os.environ[name] for name in inherited},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{kept} --xla_force_host_platform_device_count={devices}".strip(),
        "SORA_COORDINATOR": f"127.0.0.1:{port}",
        "SORA_NUM_PROCESSES": str(processes),
        "SORA_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }


def pass_on(index: int, process: subprocess.Popen) -> None:
    """Copies a process's output, line by line, with its number before each."""
    for line in process.stdout:
        # One write for each line, or the lines of two processes could mix.
        sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\r\n") + b"\n")
        sys.stdout.buffer.flush()


def run(
    command: list[str], processes: int, devices: int, grace: float = GRACE_SECONDS
) -> int:
    """Runs the command in every process; returns the first failure's exit code.

    A process that a signal ended counts as 128 + the signal's number, as in a shell.
    """
    port = free_port()
    pod: list[subprocess.Popen] = []
    told: list[int] = []  # signals that were passed on

    def forward(number: int, frame: object) -> None:
        told.append(number)
        for process in pod:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        for index in range(processes):
            process = subprocess.Popen(
                command,
                env=environment(index, processes, devices, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches it through us, once
            )
            pod.append(process)
        readers = [
            threading.Thread(target=pass_on, args=(index, process), daemon=True)
            for index, process in enumerate(pod)
        ]
        for reader in readers:
            reader.start()
        return _wait(pod, readers, told, grace)
    finally:
        for process in pod:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _wait(
    pod: list[subprocess.Popen],
    readers: list[threading.Thread],
    told: list[int],
    grace: float,
) -> int:
    """Waits for all; after the first failure only as long as saving may take."""
    failure, deadline = 0, float("inf")
    running = dict(enumerate(pod))
    while running:
        for index, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[index]
            code = process.returncode
            code = 128 - code if code < 0 else code
            if code and not failure:
                failure, deadline = code, time.monotonic() + grace
                if running and not told:
                    print(f"process {index} ended with {code}: ending the others")
                    for other in running.values():
                        other.terminate()
        if time.monotonic() > deadline:
            for process in running.values():
                process.kill()
        time.sleep(0.02)
    for reader in readers:
        # A worker that outlived its process may still hold the output open.
        reader.join(timeout=1.0)
    return failure


def main() -> int:
    """Runs the command of this file's head; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        help="seconds that the others may save in after one has failed",
    )
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    if args.command[0] == "python":  # that of this process, whatever PATH says
        args.command[0] = sys.executable
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices are at least 1")
    return run(args.command, args.processes, args.devices, args.grace)


if __name__ == "__main__":
    sys.exit(main())
