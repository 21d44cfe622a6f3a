"""What a result came from: versions, devices and the state of the source tree."""

import platform
import subprocess
import sys

import jax

import sora_jax


def describe() -> dict:
    """Returns JSON values that say what runs here."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "sora_jax": sora_jax.__version__,
        "source": git.stdout.strip() if git.returncode == 0 else "unknown",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }
