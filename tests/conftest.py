"""Settings that hold for every test; they must stand before JAX starts a backend.

The tests run on eight virtual CPU devices, wherever they run, so that meshes are real
and results do not depend on the machine. Processes that a test starts inherit this; a
test that wants another number of devices sets `XLA_FLAGS` for its process.
"""

import contextlib
import gc
import importlib
import importlib.util
import logging
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("SORA_CHAT_KEY", None)  # of whoever runs the tests
# LLVM's costlier passes are left out: they take a third of a session, which compiles far
# more than it runs, and XLA's own passes, which could change what is computed, stay.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# Equal programs are compiled once a session; the cache is new each time, so that none
# can hide that a program no longer compiles. The processes of a session share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sora_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Threads of torch that wait for each other spin, which other tests' processes pay for.
os.environ["OMP_NUM_THREADS"] = "1"
# What JAX traces is long-lived: fewer searches for garbage take a few percent less time.
gc.set_threshold(50_000)
# Model hubs are never asked; a peer library that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the session's compiled programs, when its last process ends."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers and lets library code read absl's flags."""
    from absl import flags

    config.addinivalue_line(
        "markers", "peers: compares with a peer library, run in .peers"
    )
    config.addinivalue_line("markers", "tpu: compiles for a TPU that is not there")
    config.addinivalue_line("markers", "slow: run by ./launch/test --all only")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


# Files of tests that take minutes; they begin first, so that none is left alone at the
# end of a session of several processes.
_LONG = (
    "tests/training/test_train_job.py",
    "tests/launch/test_smoke.py",
    "tests/training/test_damage.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files in front."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


# Of the 65,530 memory maps that Linux gives a process; compiled programs take some each.
_MOST_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
    """Frees compiled programs after a file where the process holds too many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def logging_of_jobs():
    """Sets up logging as absl does before a job's main function."""
    from absl import logging as absl_logging

    root, absl = logging.getLogger(), absl_logging.get_absl_logger()
    handlers, levels = [*root.handlers], (root.level, absl.level)
    absl_logging.use_absl_handler()
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    absl.setLevel(levels[1])


@pytest.fixture(scope="session")
def peers_python() -> str:
    """Returns the Python of the peer libraries' environment.

    It is `.peers` of this tree, which `./launch/test` builds, or the one that
    `SORA_PEERS_PYTHON` names. Without it a parity test is skipped, except in CI.
    """
    return _python_of("peers")


@pytest.fixture(scope="session")
def beam_python() -> str:
    """Returns the Python of Apache Beam's environment, as `peers_python` does.

    It is `.beam` of this tree, or the one that `SORA_BEAM_PYTHON` names.
    """
    return _python_of("beam")


def _python_of(environment: str) -> str:
    named = os.environ.get(f"SORA_{environment.upper()}_PYTHON")
    python = pathlib.Path(named or ROOT / f".{environment}" / "bin" / "python")
    if not python.exists():
        reason = f"{python} does not exist; ./launch/test builds this environment"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(python)


@pytest.fixture(scope="session")
def libtpu() -> str:
    """Returns the file of XLA's compiler for TPUs, which needs no TPU.

    It is the one that `TPU_LIBRARY_PATH` names, that of our own environment on a TPU VM,
    or that of the peers' environment. Without it a test is skipped, except in CI.
    """
    own = importlib.util.find_spec("libtpu")
    folders = [pathlib.Path(own.origin).parent] if own else []
    folders += (ROOT / ".peers" / "lib").glob("python*/site-packages/libtpu")
    files = [folder / "libtpu.so" for folder in folders]
    named = os.environ.get("TPU_LIBRARY_PATH")
    for file in [pathlib.Path(named)] if named else files:
        if file.is_file():
            return str(file)
    reason = "there is no libtpu; ./launch/test installs it into .peers"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def run_job(module) -> None:
    """Calls the main function of a job as `job.run` does, with the flags as they are."""
    from sora_jax.core import job

    with job.concise_errors(module.__name__.rpartition(".")[2]), job._locks:
        module.main()


def run_with_flags(module, **flags) -> None:
    """Runs a job in this process with these flags."""
    from absl.testing import flagsaver

    with flagsaver.flagsaver():
        for name, value in flags.items():
            module.flags.FLAGS[name].parse(str(value))
            module.flags.FLAGS[name].using_default_value = False
        run_job(module)


def refusal(module, **flags) -> str:
    """Runs a job in this process, which must refuse these flags; returns its message."""
    with pytest.raises(SystemExit) as caught:
        run_with_flags(module, **flags)
    return str(caught.value)


@contextlib.contextmanager
def lone_job(name: str):
    """Imports the job `sora_jax.<name>` while no other job's flags are defined.

    Jobs share flag names, since each runs in a process of its own; tests that call
    their `main` share one process.
    """
    from absl import flags

    def own() -> dict[str, list]:
        by_module = flags.FLAGS.flags_by_module_dict()
        return {name: list(f) for name, f in by_module.items() if "sora_jax" in name}

    def remove() -> dict[str, list]:
        found = own()
        for flag in (flag for found_flags in found.values() for flag in found_flags):
            delattr(flags.FLAGS, flag.name)
        return found

    before = remove()
    sys.modules.pop(f"sora_jax.{name}", None)
    try:
        yield importlib.import_module(f"sora_jax.{name}")
    finally:
        remove()
        for module, found in before.items():
            for flag in found:
                flags.FLAGS[flag.name] = flag
                flags.FLAGS.register_flag_by_module(module, flag)
