"""LPIPS against plain torch on random weights, and what a gradient needs of it."""

import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sora_jax.models import lpips
from sora_jax.training import perceptual

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "perceptual.py"


@pytest.mark.peers
@pytest.mark.parametrize("network", lpips.NETWORKS)
def test_distances_are_those_of_torch(network, peers_python, tmp_path, close):
    subprocess.run([peers_python, str(ORACLE), network, str(tmp_path)], check=True)
    case = safetensors.numpy.load_file(tmp_path / "case.safetensors")
    weights = perceptual.convert(
        tmp_path / "trunk.pth", tmp_path / "heads.pth",
        tmp_path / "lpips.safetensors", peers_python,
    )  # fmt: skip
    assert weights.config.network == network
    networks = perceptual.networks_of(weights.config)

    @jax.jit
    def distance(params, *videos):
        return networks.bind({"lpips": params})["lpips"](*videos)

    # The three pictures as frames of clips, and as clips of one frame.
    first, second = (case[n].transpose(0, 2, 3, 1) for n in ("first", "second"))
    params = weights.load()
    alone = distance(params, first[:, None], second[:, None])
    close(network, alone, case["distance"])
    joined = distance(params, first[None], second[None])
    np.testing.assert_allclose(joined, [case["distance"].mean()], rtol=1e-4)


@pytest.fixture(scope="module")
def small():
    """AlexNet's, the smaller one, with random weights."""
    return nnx.jit(lambda: lpips.LPIPS(lpips.Config("alexnet"), nnx.Rngs(0)))()


def test_equal_videos_have_no_distance_and_worse_ones_more(small):
    random = np.random.default_rng(0)
    video = random.uniform(-1, 1, (2, 2, 40, 33, 3)).astype(np.float32)
    noise = random.normal(size=video.shape)
    found = [small(video, video + share * noise) for share in (0, 0.1, 0.5)]
    assert not found[0].any()
    assert (found[1] > 0).all() and (found[2] > found[1]).all()
    assert found[1].dtype == jnp.float32
    half = small(video, jnp.asarray(video + 0.1 * noise, jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_a_gradient_is_finite_where_features_have_no_length(small):
    """They are not zero, so that no ReLU stops a gradient, but their squares are."""
    graph, state = nnx.split(small)
    state = jax.tree.map(
        lambda x: jnp.full_like(x, 1e-30) if x.ndim == 1 else 0 * x, state
    )
    faint = nnx.merge(graph, state)
    video = jnp.zeros((1, 1, 33, 33, 3))
    gradient = jax.grad(lambda x: faint(x, video).sum())(video + 0.5)
    assert jnp.isfinite(gradient).all()


def test_small_frames_and_unknown_networks_are_refused(small):
    with pytest.raises(ValueError, match="at least 31 x 31 pixels, not 40 x 30"):
        small(jnp.zeros((1, 1, 40, 30, 3)), jnp.zeros((1, 1, 40, 30, 3)))
    with pytest.raises(ValueError, match="it must be one of vgg16, alexnet"):
        lpips.Config("resnet")


def test_weights_of_other_names_and_shapes_are_all_named():
    trunk = {"features.0.weight": np.zeros((64, 3, 11, 11)), "features.9.bias": 0}
    heads = {"lin0.model.1.weight": np.zeros((1, 63, 1, 1))}
    config = lpips.Config(lpips.network_of(trunk, "features.0.weight"))
    with pytest.raises(ValueError) as error:
        lpips.from_torch(config, trunk, heads)
    for part in (
        "LPIPS with alexnet",
        "features.3.weight is missing",
        "lin0.model.1.weight has shape (1, 63, 1, 1), not (1, 64, 1, 1)",
        "features.9.bias is unexpected",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="features.0.weight is missing"):
        lpips.network_of({}, "features.0.weight")
