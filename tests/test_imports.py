"""The shape of the tree: which package may import which.

The rules are read from the source with `ast`, so nothing has to be run to break one.
"""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Lowest first; a room imports itself and the rooms before it.
ROOMS = (
    "core",
    "toyworld",
    "data",
    "models",
    "diffusion",
    "training",
    "captioning",
    "generation",
    "forecast",
    "evals",
)
# The same within evals: its own files first, and vae_report.py last.
EVALS = ("", "features", "metrics", "html", "videos", "prompts", "vae_report")
# Allowed by the order, refused all the same: diffusion is handed a velocity function.
SEPARATE = {("diffusion", "models"), ("diffusion", "data"), ("prompts", "videos")}

# An interface that changes between releases has one file that knows it; PyAV's has one
# that opens and decodes files, and one that encodes them.
ONE_IMPORTER = {
    "orbax": "sora_jax/training/checkpoint.py",
    "grain": "sora_jax/data/loader.py",
    "tensorflow_datasets": "sora_jax/data/shards.py",
    "array_record": "sora_jax/data/array_files.py",
    "pyarrow": "sora_jax/data/tables.py",
    "apache_beam": "sora_jax/data/beam.py",
    "fsspec": "sora_jax/data/remote.py",
    "av": ("sora_jax/data/containers.py", "sora_jax/data/video_io.py"),
    "qwix": "sora_jax/models/quantization.py",
    "jax.experimental.topologies": "sora_jax/core/mesh.py",
    "jax.experimental.pallas": "sora_jax/models/splash_attention.py",
}
# TensorFlow and torch would double the installation; the rest runs code out of data.
FORBIDDEN = ("tensorflow", "torch", "pickle", "cloudpickle", "dill", "joblib", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "compile")

# Run by the peers' Python, in a process of its own; nobody imports it.
PEERS_RUN = "sora_jax/training/torch_reader.py"


def sources(*folders: str) -> list[pathlib.Path]:
    """Returns the Python files under the named folders, as paths from the root."""
    return sorted(
        path.relative_to(ROOT)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    )


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything that is imported, at any depth.

    `from a import b` yields `a.b`, since b may be a module; a relative import yields
    a name that begins with a dot.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else None
            name = called.id if isinstance(called, ast.Name) else name
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield node.lineno, str(first.value)


def under(name: str, package: str) -> bool:
    """Returns whether a dotted name is a package or inside it."""
    return name == package or name.startswith(package + ".")


def is_job(name: str) -> bool:
    """Returns whether a dotted name is in a job file such as `sora_jax.train`."""
    parts = name.split(".")
    return (
        len(parts) > 1
        and parts[0] == "sora_jax"
        and (ROOT / "sora_jax" / f"{parts[1]}.py").exists()
    )


def violations(path: pathlib.PurePath, source: str) -> list[str]:
    """Returns what a file does that its place forbids, one sentence each."""
    tree = ast.parse(source)
    place = path.as_posix()
    room = path.parts[1] if place.startswith("sora_jax/") else None
    room = room if room in ROOMS else None
    found = []

    def refuse(line: int, what: str) -> None:
        found.append(f"{place}:{line}: {what}")

    for line, name in imports(tree):
        if name.startswith("."):
            refuse(line, "a relative import; write the module's full name")
        for package in FORBIDDEN:
            if under(name, package) and (package != "torch" or place != PEERS_RUN):
                refuse(line, f"{name} is never imported")
        if name == PEERS_RUN.removesuffix(".py").replace("/", "."):
            refuse(line, f"{name} is run by the peers' Python, and never imported")
        for package, owner in ONE_IMPORTER.items():
            owners = (owner,) if isinstance(owner, str) else owner
            if under(name, package) and path.parts[0] == "sora_jax":
                if place not in owners:
                    refuse(line, f"only {' and '.join(owners)} imports {package}")
        if is_job(name):
            refuse(line, f"{name} is a job; nobody imports a job")
        if path.parts[0] == "launch":
            if name.split(".")[0] not in sys.stdlib_module_names:
                refuse(line, f"launch/ imports the standard library only, not {name}")
        if path.parts[0] in ("sora_jax", "configs") and under(name, "experiments"):
            refuse(line, "nothing imports experiments")
        if path.parts[0] == "sora_jax" and (
            under(name, "configs") or under(name, "tests") or under(name, "launch")
        ):
            refuse(line, f"the library does not import {name}")
        if room and under(name, "sora_jax") and name.count("."):
            other = name.split(".")[1]
            if other in ROOMS and (
                ROOMS.index(other) > ROOMS.index(room) or (room, other) in SEPARATE
            ):
                refuse(line, f"{room} does not import {other}")
        if room == "evals" and under(name, "sora_jax.evals"):
            inner, other = (
                next((part for part in parts if part in EVALS), "")
                for parts in (
                    path.with_suffix("").parts[2:],
                    name.split(".")[2:],
                )
            )
            if EVALS.index(other) > EVALS.index(inner) or (inner, other) in SEPARATE:
                refuse(line, f"evals/{inner} does not import evals/{other}")
        if room == "toyworld":
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("numpy", "sora_jax"):
                refuse(line, f"toyworld needs numpy only, not {name}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                refuse(node.lineno, f"{node.func.id}() runs code out of data")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant)
                    and keyword.value.value is False
                ):
                    refuse(node.lineno, "allow_pickle runs code out of data")
    return found


def test_imports_go_downwards():
    found = []
    for path in sources("sora_jax", "configs", "experiments", "launch"):
        found += violations(path, (ROOT / path).read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "place, source",
    [
        ("sora_jax/models/dit.py", "from sora_jax.training import state"),
        ("sora_jax/models/dit.py", "import sora_jax.training.state"),
        ("sora_jax/models/dit.py", "from sora_jax import diffusion"),
        ("sora_jax/diffusion/flow.py", "from sora_jax.models import dit"),
        ("sora_jax/diffusion/flow.py", "def f():\n  from sora_jax.data import shards"),
        ("sora_jax/core/rng.py", "from sora_jax.toyworld.scene import Scene"),
        ("sora_jax/core/rng.py", "from . import paths"),
        ("sora_jax/toyworld/scene.py", "import jax"),
        ("sora_jax/training/loop.py", "import orbax.checkpoint as ocp"),
        ("sora_jax/training/loop.py", "from grain import python"),
        ("sora_jax/evals/metrics/cuts.py", "from sora_jax.evals.html import page"),
        ("sora_jax/evals/pixels.py", "from sora_jax.evals.metrics import temporal"),
        (
            "sora_jax/evals/prompts/make_clips.py",
            "from sora_jax.evals.videos import published",
        ),
        ("sora_jax/data/records.py", "import av"),
        ("sora_jax/data/records.py", "import tensorflow_datasets as tfds"),
        ("sora_jax/data/records.py", "import importlib\nimportlib.import_module('av')"),
        ("sora_jax/models/dit.py", "from jax.experimental import pallas as pl"),
        ("sora_jax/training/cost.py", "from jax.experimental import topologies"),
        ("sora_jax/training/cost.py", "import configs.toy"),
        ("sora_jax/train.py", "import torch"),
        ("sora_jax/training/torch_reader.py", "import tensorflow"),
        (
            "sora_jax/evals/features/networks.py",
            "from sora_jax.training import torch_reader",
        ),
        ("configs/toy.py", "import tensorflow as tf"),
        ("experiments/sweep.py", "import pickle"),
        ("launch/local_pod.py", "import numpy as np"),
        ("launch/local_pod.py", "from sora_jax import core"),
        ("sora_jax/data/shards.py", "x = eval('1')"),
        (
            "sora_jax/data/shards.py",
            "import numpy as np\nnp.load(f, allow_pickle=True)",
        ),
    ],
)
def test_a_forbidden_import_is_found(place, source):
    assert len(violations(pathlib.PurePosixPath(place), source)) == 1


@pytest.mark.parametrize(
    "place, source",
    [
        ("sora_jax/training/step.py", "from sora_jax.diffusion import flow"),
        ("sora_jax/training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("sora_jax/data/video_io.py", "import av"),
        ("sora_jax/toyworld/scene.py", "import json\nimport numpy as np"),
        ("sora_jax/train.py", "from sora_jax.training import loop"),
        ("sora_jax/models/dit.py", "model.eval()"),
        ("launch/local_pod.py", "import subprocess"),
        ("sora_jax/training/torch_reader.py", "import torch"),
        ("sora_jax/data/shards.py", "np.load(f, allow_pickle=False)"),
    ],
)
def test_an_allowed_import_passes(place, source):
    assert violations(pathlib.PurePosixPath(place), source) == []


def test_nobody_imports_a_job(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "sora_jax").mkdir()
    (tmp_path / "sora_jax" / "train.py").touch()
    for source in ("from sora_jax import train", "from sora_jax.train import main"):
        for place in ("sora_jax/generate.py", "sora_jax/evals/html/page.py"):
            assert violations(pathlib.PurePosixPath(place), source)


def test_rooms_are_known():
    folders = {
        path.name
        for path in (ROOT / "sora_jax").iterdir()
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert folders <= set(ROOMS)


def test_no_file_is_a_dump():
    names = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [path for path in sources("sora_jax", "configs") if path.name in names]


_IMPORT_ALL = """
    import importlib
    import sys
    from absl import flags

    for name in sys.argv[1:]:
        known = set(flags.FLAGS)
        importlib.import_module(name)
        for flag in set(flags.FLAGS) - known:  # two jobs may name a flag alike
            delattr(flags.FLAGS, flag)

    from jax._src import xla_bridge

    if "jax" in sys.modules and xla_bridge._backends:
        raise SystemExit("an import has started a JAX backend")
    for name in ("tensorflow", "torch"):
        if name in sys.modules:
            raise SystemExit(f"an import has brought in {name}")
"""


def test_imports_have_no_effects():
    """Importing every module starts no backend, and brings in no TensorFlow."""
    names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in sources("sora_jax", "configs")
        if path.as_posix() != PEERS_RUN
    ]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_IMPORT_ALL), *names],
        cwd=ROOT,
        check=True,
    )


def test_toyworld_runs_without_jax():
    names = [
        ".".join(path.with_suffix("").parts) for path in sources("sora_jax/toyworld")
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "assert 'jax' not in sys.modules, 'toyworld has imported jax'\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, *names], cwd=ROOT, check=True, env=os.environ
    )
