"""Settings that hold for every test; they must stand before JAX starts a backend.

The tests run on eight virtual CPU devices, wherever they run, so that meshes are real
and results do not depend on the machine. Processes that a test starts inherit this; a
test that wants another number of devices sets `XLA_FLAGS` for its process.
"""

import os
import pathlib
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Equal programs are compiled once a session; the cache is new each time, so that none
# can hide that a program no longer compiles.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sora_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Model hubs are never asked; a peer library that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers and lets library code read absl's flags."""
    from absl import flags

    config.addinivalue_line(
        "markers", "peers: compares with a peer library, run in .peers"
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def peers_python() -> str:
    """Returns the Python of the peer libraries' environment.

    It is `.peers` of this tree, which `./launch/test` builds, or the one that
    `SORA_PEERS_PYTHON` names. Without it a parity test is skipped, except in CI.
    """
    named = os.environ.get("SORA_PEERS_PYTHON")
    python = pathlib.Path(named) if named else ROOT / ".peers" / "bin" / "python"
    if not python.exists():
        reason = f"{python} does not exist; ./launch/test builds the peers' environment"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(python)
