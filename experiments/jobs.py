"""Runs jobs of the package, for experiments that need several."""

import shlex
import subprocess
import sys


def run(job: str, **given) -> None:
    """Runs a job of the package and prints its command.

    Args:
      job: such as "train".
      given: its flags; two underscores stand for a dot.

    Raises:
      CalledProcessError: it failed.
    """
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in given.items()]
    command = ["-m", f"sora_jax.{job}", *flags]
    print(f"python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)
