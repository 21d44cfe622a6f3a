"""Features of public networks: fed as their code feeds them, and independent of batches."""

import dataclasses
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sora_jax.core import trees
from sora_jax.evals.features import networks, weight_folders
from sora_jax.models import exchange, i3d, i3d_exchange, vit

ORACLE = pathlib.Path(__file__).resolve().parents[2] / "oracle"
TINY = vit.Config(
    num_frames=4, size=28, patch=(2, 14, 14), dim=16, num_layers=1, num_heads=2,
    mlp_dim=24,
)  # fmt: skip


def draw(make, config, seed: int = 0):
    """Random parameters, none of them at zero."""
    rng = np.random.default_rng(seed)
    shapes = exchange.Peer("", lambda config: iter(()), make).shapes(config)

    def one(path, like):
        noise = rng.standard_normal(like.shape, np.float32)
        if path.endswith("kernel"):
            return noise / np.sqrt(np.prod(like.shape[:-1]), dtype=np.float32)
        return 0.1 * noise + path.endswith("scale")

    return trees.map_paths(one, shapes)


def tiny(kind: str, **fields) -> weight_folders.Weights:
    config = dataclasses.replace(TINY, **fields)
    params = draw(vit.VisionTransformer, config)
    network = weight_folders.build(vit.VisionTransformer, config, params)
    return weight_folders.Weights(kind, {"video": network}, "0" * 64)


def clips(count: int, frames: int = 4, size: int = 20, seed: int = 3) -> np.ndarray:
    shape = (count, frames, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.slow
@pytest.mark.peers
def test_i3d_end_to_end(peers_python, tmp_path):
    """Small clips, resized and scaled, beside torch's own on the same weights."""
    subprocess.run([peers_python, ORACLE / "i3d_clips.py", tmp_path, "3"], check=True)
    tensors = safetensors.numpy.load_file(tmp_path / "piergiaj.safetensors")
    case = safetensors.numpy.load_file(tmp_path / "clips.safetensors")
    config = i3d.Config(eps=1e-5)
    params = i3d_exchange.read_i3d(tensors, config)
    sha256 = weight_folders.save(tmp_path / "i3d", "i3d", config, params, {})
    network = networks.open("i3d", tmp_path / "i3d")
    assert network.sha256 == sha256
    assert network.resize == "half_pixel; first frames; i3d logits, epsilon 1e-05"
    video = np.moveaxis(case["video"], 1, -1)
    longer = np.concatenate([video, video[:, :2]], axis=1)  # the first 16 frames
    found = network(longer)
    for array, wanted in ((found, case["logits"]),):
        apart = np.linalg.norm(array - wanted) / np.linalg.norm(wanted)
        print(f"end to end: relative difference {apart:.1e}")
        assert apart < 1e-5
    # Whatever the batch: 6 significant digits of each clip's features.
    larger = networks.open("i3d", tmp_path / "i3d", batch_size=2)(video)
    scale = np.abs(found).max(axis=1, keepdims=True)
    assert (np.abs(larger - found) / scale).max() < 1e-6
    pooled = networks.open("i3d", tmp_path / "i3d", output="pooled")
    assert pooled(video[:1]).shape == (1, 1024)
    assert "pooled" in pooled.resize
    with pytest.raises(ValueError, match="i3d needs 16 frames, the clips have 15"):
        network(video[:, :15])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_do_not_change_features(batch_size):
    network = networks.VideoFeatures(tiny("videomae"), batch_size=batch_size)
    video = clips(5)
    alone = np.concatenate([network(video[i : i + 1]) for i in range(5)])
    found = network(video)
    assert found.shape == (5, TINY.dim)
    np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-6)


def test_pixels_are_scaled_as_each_score_wants():
    """A clip of one value: what reaches the network is known."""
    seen = {}

    class Probe(nnx.Module):
        config = dataclasses.replace(TINY, size=20)

        def __call__(self, video_bthwc):
            return video_bthwc[:, 0, 0, 0]

    video = np.full((1, 4, 20, 20, 3), 51, np.uint8)
    for kind in ("videomae", "vjepa"):
        network = weight_folders.Weights(kind, {"video": Probe()}, "")
        seen[kind] = networks.VideoFeatures(network)(video)[0]
    np.testing.assert_allclose(seen["videomae"], [0.2] * 3, rtol=1e-6)
    wanted = (0.2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(seen["vjepa"], wanted, rtol=1e-5)


def test_the_resizing_changes_features_and_is_recorded():
    video = clips(2)
    found = {}
    for name in ("half_pixel", "tf", "half_pixel, cropped"):
        network = networks.VideoFeatures(tiny("videomae"), resize=name)
        assert network.resize.startswith(f"{name};")
        found[name] = network(video)
    assert np.abs(found["half_pixel"] - found["tf"]).max() > 1e-4
    np.testing.assert_array_equal(found["half_pixel"], found["half_pixel, cropped"])
    with pytest.raises(ValueError, match="resize is 'area', it must be one of tf"):
        networks.VideoFeatures(tiny("videomae"), resize="area")


def test_options_that_a_network_does_not_have():
    with pytest.raises(ValueError, match="videomae has a fixed number of frames"):
        networks.VideoFeatures(tiny("videomae"), num_frames=8)
    with pytest.raises(ValueError, match="videomae needs 4 frames, the clips have 3"):
        networks.VideoFeatures(tiny("videomae"))(clips(1, frames=3))
    with pytest.raises(ValueError, match="features are 'c3d', they must be toy, i3d"):
        networks.open("c3d")


@pytest.mark.parametrize("name", list(networks.KNOWN))
def test_missing_weights_are_named_in_one_sentence(tmp_path, name):
    """Which file, from where, how it is made ready, and what works without it."""
    known = networks.KNOWN[name]
    for folder, where in (
        (None, "no folder is named"),
        (tmp_path, f"{tmp_path} has none"),
    ):
        with pytest.raises(networks.WrongWeights) as raised:
            networks.open(name, folder)
        text = str(raised.value)
        assert text.startswith(f"{known.score} needs weights") and where in text
        assert known.weights in text and "\n" not in text
        assert "; FVD-toy, flicker" in text and text.endswith("scores need none")


def test_weights_of_the_toy_are_built_in():
    network = networks.open("toy", batch_size=4)
    assert network(clips(2, frames=9, size=32)).shape == (2, 96)


@pytest.fixture(scope="module")
def clip_weights():
    config = dataclasses.replace(
        TINY, num_frames=1, patch=(1, 14, 14), positions="table", key_bias=True,
        patch_bias=False, norm_in=True, pool="class", projection=6,
    )  # fmt: skip
    text = vit.TextConfig(
        vocab_size=20, length=9, dim=16, num_layers=1, num_heads=2, mlp_dim=24,
        projection=6, end=19,
    )  # fmt: skip
    parts = {
        "vision": (vit.VisionTransformer, config),
        "text": (vit.TextTransformer, text),
    }
    parts = {
        part: weight_folders.build(make, config, draw(make, config))
        for part, (make, config) in parts.items()
    }
    return weight_folders.Weights("clip", parts, "0" * 64)


def test_features_of_frames_and_texts(clip_weights):
    network = networks.ClipFeatures(clip_weights)
    video = clips(3, frames=5)
    ids = np.array([[1, 2, 19, 0], [3, 19, 0, 0], [4, 5, 6, 19]])
    frames = network.frames(video)
    assert frames.shape == (3, 5, 6)
    np.testing.assert_allclose(network(video), frames.mean(axis=1), atol=1e-6)
    alone = network.frames(video[1:2, 3:4])
    np.testing.assert_allclose(alone[0, 0], frames[1, 3], atol=1e-6)
    texts = network.texts(ids)
    np.testing.assert_allclose(texts, clip_weights.parts["text"](ids), atol=1e-6)
    units = networks.unit(texts)
    lengths = np.linalg.norm(texts, axis=1, keepdims=True)
    np.testing.assert_allclose(units * lengths, texts, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
