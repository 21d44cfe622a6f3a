"""Simulates a pod on one machine: several processes, each with virtual CPU devices.

    python launch/local_pod.py --processes 2 --devices 4 -- \\
        python -m sora_jax.train --config=configs/toy.py --out=runs/toy ...

Every process runs the same command, with the environment variables by which
`sora_jax/core/mesh.py` joins them. Each line of output begins with the process's number.
When one process fails, the others are terminated, as the scheduler of a real pod does;
the exit code is that of the first that failed.
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

# Time for a terminated process to save its state.
GRACE_SECONDS = 60.0


def free_port() -> int:
    """Returns a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Returns the environment variables of process `index`."""
    kept = re.sub(
        r"--xla_force_host_platform_device_count=\d+",
        "",
        os.environ.get("XLA_FLAGS", ""),
    )
    # Only process 0 would find its programs in a cache on disk, and would wait at the
    # first collective, which times out after 30 seconds, while the others compile.
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
    """Copies a process's output, with the process's number before each line."""
    for line in process.stdout:
        # One write per line, so that lines of two processes do not mix.
        sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\r\n") + b"\n")
        sys.stdout.buffer.flush()


def run(
    command: list[str], processes: int, devices: int, grace: float = GRACE_SECONDS
) -> int:
    """Runs the command in every process; returns the exit code of the first failure.

    For a process that a signal killed it is 128 + the signal's number, as in a shell.
    """
    port = free_port()
    pod: list[subprocess.Popen] = []
    forwarded: list[int] = []  # signals

    def forward(number: int, frame: object) -> None:
        forwarded.append(number)
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
                process_group=0,  # it gets Ctrl-C from this process, once
            )
            pod.append(process)
        readers = [
            threading.Thread(target=pass_on, args=(index, process), daemon=True)
            for index, process in enumerate(pod)
        ]
        for reader in readers:
            reader.start()
        return _wait(pod, readers, forwarded, grace)
    finally:
        for process in pod:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _wait(
    pod: list[subprocess.Popen],
    readers: list[threading.Thread],
    forwarded: list[int],
    grace: float,
) -> int:
    """Waits for all processes; after the first failure, for the time of grace only."""
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
                if running and not forwarded:
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
    """Parses the command line and runs it; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--devices", type=int, default=4, help="of each process; default: 4"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        help="seconds for the others to save their state after one has failed",
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    args = parser.parse_args()
    if args.command[0] == "python":  # the Python of this process
        args.command[0] = sys.executable
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices are at least 1")
    return run(args.command, args.processes, args.devices, args.grace)


if __name__ == "__main__":
    sys.exit(main())
