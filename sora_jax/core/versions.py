"""Versions, devices and the commit that a run uses, for its `env.json`."""

import platform
import subprocess
import sys

import jax

import sora_jax


def _source() -> str:
    """The commit, as `git describe` names it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def describe() -> dict:
    """Returns the JSON values of `env.json`."""
    return {
        "sora_jax": sora_jax.__version__,
        "source": _source(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }
