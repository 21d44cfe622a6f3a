"""I3D beside a rendering of it in torch, on random weights under both ports' names."""

import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sora_jax.models import i3d, i3d_exchange

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle"
LAYOUTS = ("piergiaj", "hassony2")


@pytest.fixture(scope="module")
def golden(peers_python, tmp_path_factory):
    """The oracle's files: see tests/oracle/i3d.py."""
    out = tmp_path_factory.mktemp("i3d")
    subprocess.run([peers_python, ORACLE / "i3d.py", out], check=True)
    return out


@pytest.fixture(scope="module")
def weights(golden):
    return {name: load_file(golden / f"{name}.safetensors") for name in LAYOUTS}


@pytest.fixture(scope="module")
def features(golden):
    return load_file(golden / "features.safetensors")


@pytest.fixture(scope="module")
def network(build):
    """Builds the network from a file's tensors."""

    def make(tensors, eps: float = 1e-3) -> i3d.I3D:
        config = i3d.Config(eps=eps)
        params = i3d_exchange.read_i3d(tensors, config)
        return build(lambda: i3d.I3D(config, nnx.Rngs(0)), params)

    return make


_run = jax.jit(lambda network, video: network(video))


def clip(features, name) -> np.ndarray:
    return (
        np.moveaxis(features[f"clips/{name}"], 1, -1).astype(np.float32) * 2 / 255 - 1
    )


@pytest.mark.peers
@pytest.mark.parametrize("frames", [16, pytest.param(32, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ports_features(weights, features, network, close, layout, frames):
    """Odd lengths are padded unevenly, and a frame more in front would show."""
    for eps in (1e-3, 1e-5) if frames in (16, 32) else (1e-3,):
        found = _run(network(weights[layout], eps), clip(features, frames))
        for name, array in found.items():
            where = f"{layout}/{eps}/{frames}/{name}"
            close(where, array, features[where], 1e-5)


@pytest.mark.peers
def test_the_epsilon_counts(weights, features, network):
    wanted = features["piergiaj/1e-05/16/pooled"]
    other = _run(network(weights["piergiaj"], 1e-3), clip(features, 16))["pooled"]
    assert np.linalg.norm(other - wanted) > 1e-3 * np.linalg.norm(wanted)


def test_every_platform_computes_the_same(close):
    """The stock forms, which accelerators get, beside those for CPU."""
    rng = np.random.default_rng(0)
    x_bthwc = rng.standard_normal((1, 5, 9, 10, 4), np.float32)
    for size, stride in (((3, 3, 3), 1), ((1, 1, 1), 1), ((7, 7, 7), 2)):
        kernel = rng.standard_normal((*size, 4, 6), np.float32)
        close(
            f"convolution {size}, stride {stride}",
            i3d.convolve(x_bthwc, kernel, stride),
            i3d._conv_direct(x_bthwc, kernel, stride),
            1e-6,
        )


def test_padding_is_tensorflows():
    """The odd one behind; nothing where a window ends at the border."""
    assert i3d.same_padding(224, 7, 2) == (2, 3)
    assert i3d.same_padding(9, 7, 2) == (3, 3)
    assert i3d.same_padding(112, 3, 2) == (0, 1)
    assert i3d.same_padding(4, 2, 2) == (0, 0)
    assert i3d.same_padding(5, 2, 2) == (0, 1)


@pytest.mark.parametrize("t, h, w", [(4, 6, 6), (5, 7, 6)])
def test_pools_take_the_maximum_of_what_is_there(t, h, w):
    """Below zero as well: what is padded is no value."""
    rng = np.random.default_rng(1)
    x_bthwc = -1 - rng.random((1, t, h, w, 2), np.float32)
    for taps, strides in (((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2))):
        found = np.asarray(i3d.max_pool(x_bthwc, taps, strides))
        counts = [-(-n // s) for n, s in zip((t, h, w), strides, strict=True)]
        wanted = np.empty((1, *counts, 2), np.float32)
        for at in np.ndindex(*counts):
            window = [slice(None)]
            for i, n, k, s in zip(at, (t, h, w), taps, strides, strict=True):
                start = i * s - i3d.same_padding(n, k, s)[0]
                window.append(slice(max(start, 0), start + k))
            wanted[(0, *at)] = x_bthwc[tuple(window)].max(axis=(0, 1, 2, 3))
        np.testing.assert_array_equal(found, wanted)


def test_clips_that_it_cannot_take():
    network = nnx.eval_shape(lambda: i3d.I3D(i3d.Config(), nnx.Rngs(0)))
    for shape, got in (((1, 8, 224, 224, 3), "8 of 224"), ((1, 16, 64, 64, 3), "64 x")):
        with pytest.raises(ValueError, match=f"9 or more frames of 224 .* got .*{got}"):
            network(np.zeros(shape, np.float32))


def tensorflow_names(params) -> dict[str, np.ndarray]:
    """A network's arrays as TF-Hub's variables; batch norms have no scale there."""
    flat = i3d_exchange.TF.export(params, i3d.Config())
    return {f"{n}:0": np.asarray(a) for n, a in flat.items() if "gamma" not in n}


@pytest.fixture(scope="module")
def params(build):
    network = build(lambda: i3d.I3D(i3d.Config(), nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(network))

    def one(path, leaf):
        unscaled = "scale" in jax.tree_util.keystr(path)
        return np.ones_like(leaf) if unscaled else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def test_tensorflows_variables(params):
    tensors = tensorflow_names(params)
    name = "RGB/inception_i3d/Mixed_5b/Branch_2/Conv3d_0a_3x3/batch_norm/beta:0"
    assert tensors[name].shape == (1, 1, 1, 1, 128)
    found = i3d_exchange.read_i3d(tensors, i3d.Config())
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_tensors_without_a_place_are_named(params):
    flat = i3d_exchange.PIERGIAJ.export(params, i3d.Config())
    tensors = {name: np.asarray(array) for name, array in flat.items()}
    name = "Mixed_4d.b2b.conv3d.weight"
    assert tensors[name].shape == (64, 24, 3, 3, 3)

    def read(**changes):
        changed = {n: a for n, a in (tensors | changes).items() if a is not None}
        return i3d_exchange.read_i3d(changed, i3d.Config())

    read(**{"Mixed_4d.b2b.bn.num_batches_tracked": np.zeros(())})
    for changes, message in (
        ({name: None}, f"missing: {re.escape(name)}"),
        ({"Mixed_4d.b2c.bias": np.zeros(3)}, "unexpected: Mixed_4d.b2c.bias"),
        ({name: np.zeros((64, 24, 1, 1, 1))}, r"\(64, 24, 1, 1, 1\) instead of \(64"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)
    with pytest.raises(ValueError, match="not the names of a known I3D.* not a.weight"):
        i3d_exchange.read_i3d({"a.weight": np.zeros(2)}, i3d.Config())
