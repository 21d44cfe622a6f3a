"""What the peer libraries compute, as files: one process of theirs for all tests."""

import dataclasses
import fcntl
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sora_jax.core import sharding

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A case of tests/oracle/cases.json with the peer's weights, inputs and outputs."""

    case: dict
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def goldens(peers_python, tmp_path_factory) -> dict[str, Golden]:
    out = tmp_path_factory.getbasetemp()
    out = (out.parent if "PYTEST_XDIST_WORKER" in os.environ else out) / "golden"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first of a session's processes computes
        if not out.exists():
            made = tmp_path_factory.mktemp("golden")
            subprocess.run([peers_python, ORACLE / "golden.py", made], check=True)
            made.rename(out)
    loaded = {}
    for name, case in json.loads((ORACLE / "cases.json").read_text()).items():
        groups = {"weight": {}, "in": {}, "out": {}}
        for key, array in load_file(out / f"{name}.safetensors").items():
            group, _, rest = key.partition("/")
            groups[group][rest] = array
        loaded[name] = Golden(case, *groups.values())
    return loaded


@pytest.fixture(scope="session")
def build():
    """Returns a function that makes a network with given or with random parameters.

    Random ones are drawn by numpy: to compile an initializer for each of a hundred
    arrays takes longer than the tests. None is left at zero or one, as some would be
    at first, so that each of them matters.
    """

    def make(constructor, params=None, seed: int = 0) -> nnx.Module:
        graph, state = nnx.split(nnx.eval_shape(constructor))
        rng = np.random.default_rng(seed)

        def draw(path, shape):
            noise = rng.standard_normal(shape.shape, np.float32)
            name = jax.tree_util.keystr(path)
            if "kernel" in name:
                return noise / np.sqrt(np.prod(shape.shape[:-1]))
            return 0.1 * noise + ("scale" in name)

        if params is None:
            params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
        return nnx.merge(graph, state)

    return make


@pytest.fixture(scope="session")
def spread():
    """Returns a function that lays a network out over the mesh that is set."""

    def one(parameter: nnx.Param) -> nnx.Param:
        layout = sharding.parameter_spec(
            parameter.get_metadata("axes"), parameter.shape
        )
        return parameter.replace(jax.reshard(parameter[...], layout))

    return lambda module: jax.tree.map(
        one, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )


@pytest.fixture
def close():
    """Returns a check of the relative error per output, which prints it."""

    def check(name: str, ours, theirs, tolerance: float = 1e-4) -> None:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, name
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        largest = np.max(np.abs(ours - theirs))
        print(f"{name}: relative error {error:.1e}, largest difference {largest:.1e}")
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"

    return check
