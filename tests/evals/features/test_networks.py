"""The shipped state network: its bytes are checked, and FVD-toy sees what it must."""

import json

import numpy as np
import pytest

from sora_jax.core import digests
from sora_jax.evals.features import networks
from sora_jax.evals.metrics import controls, distances
from sora_jax.toyworld import families, render
from sora_jax.toyworld import scene as scene_module

FILES = (f"{networks.TOY}.safetensors", f"{networks.TOY}.json")


@pytest.fixture(scope="module")
def network():
    return networks.ToyFeatures()


def right_moving(split, count, start=0):
    """Clips in which everything moves right: reversing them is not another sample."""
    found, index = [], start
    while len(found) < count:
        scene = families.scene("tw32", split, index, {"motion": 1.0})
        if scene.truth.subjects[0].direction == "right":
            found.append(render.render(scene))
        index += 1
    return np.stack(found)


def test_weights_are_small_and_described(network):
    weights = networks.WEIGHTS / FILES[0]
    assert weights.stat().st_size < 1_000_000
    assert json.loads((networks.WEIGHTS / FILES[1]).read_text())["sha256"] == (
        network.sha256
    )


def test_other_weights_are_refused(tmp_path):
    for name in FILES:
        digests.copy(networks.WEIGHTS / name, tmp_path / name)
    networks.load(tmp_path, networks.TOY)
    content = bytearray((tmp_path / FILES[0]).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILES[0]).write_bytes(content)
    with pytest.raises(networks.WrongWeights, match="is damaged: its SHA-256 is"):
        networks.load(tmp_path, networks.TOY)
    digests.store(tmp_path / FILES[0], bytes(content))
    with pytest.raises(
        networks.WrongWeights, match="SHA-256 .* but its description has"
    ):
        networks.load(tmp_path, networks.TOY)
    (tmp_path / FILES[0]).unlink()
    with pytest.raises(networks.WrongWeights, match="is missing"):
        networks.load(tmp_path, networks.TOY)


def test_weights_of_another_size_are_refused(tmp_path):
    for name in FILES:
        digests.copy(networks.WEIGHTS / name, tmp_path / name)
    description = json.loads((tmp_path / FILES[1]).read_text())
    description["config"]["features"] = 64
    digests.store(tmp_path / FILES[1], json.dumps(description))
    with pytest.raises(ValueError, match="to_features"):
        networks.load(tmp_path, networks.TOY)


def test_features_do_not_depend_on_batches_or_type(network):
    video = right_moving("val", 5)
    found = network(video)
    assert found.shape == (5, network.network.config.features)
    small = networks.ToyFeatures(batch_size=2)(video)
    np.testing.assert_allclose(small, found, atol=1e-4)
    as_float = network(video.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(as_float, found, atol=1e-4)
    longer = np.concatenate([video, video], axis=1)
    np.testing.assert_allclose(network(longer), found, atol=1e-4)
    large = video.repeat(2, axis=2).repeat(2, axis=3)
    apart = np.linalg.norm(network(large) - found) / np.linalg.norm(found)
    assert apart < 0.35


def test_errors_name_the_fault(network):
    with pytest.raises(ValueError, match="needs 9 frames, the clips have 5"):
        network(np.zeros((2, 5, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="no clips"):
        network(np.zeros((0, 9, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="NaN"):
        network(np.full((1, 9, 32, 32, 3), np.nan, np.float32))


def test_the_state_is_read(network):
    """The heads say what is there: without that the features would mean nothing."""
    drawn = [families.scene("tw32", "val", i, {"motion": 1.0}) for i in range(64)]
    video = np.stack([render.render(scene) for scene in drawn])
    read = network.network(video.astype(np.float32) / 127.5 - 1)
    colours = list(scene_module.PALETTE)
    right = []
    for number, scene in enumerate(drawn):
        at = colours.index(scene.objects[0].colour)
        velocity = np.asarray(read["velocity"])[number, at]
        right.append(
            np.asarray(read["count"])[number, at].argmax() == 1
            and np.abs(velocity - scene.vel[0, 0]).max() < 0.6
        )
    assert np.mean(right) > 0.9


def test_fvd_toy_ranks_spoilt_clips(network):
    """Ground truth's other half < mild blur < reversed, shuffled, still, noise."""
    reference = network(right_moving("train", 200))
    video = right_moving("test", 200)
    kinds = {"split half": video} | controls.make(video)
    rng = np.random.default_rng(0)
    kinds["noise"] = rng.integers(0, 256, video.shape, np.uint8)
    features = {name: network(clips) for name, clips in kinds.items()}
    value = {
        n: distances.frechet(of_kind, reference) for n, of_kind in features.items()
    }
    limit = {
        name: distances.frechet_extrapolated(of_kind, reference).limit
        for name, of_kind in features.items()
    }
    half, blur = value["split half"], value["blurred"]
    assert half < blur
    for name in ("time-reversed", "frames shuffled", "still", "noise"):
        assert value[name] > 2 * half, name
        assert value[name] > blur, name
    assert value["noise"] > value["time-reversed"]
    # With many clips, what is left of a small sample's own distance is next to nothing.
    assert limit["split half"] < limit["blurred"]
    assert limit["frames shuffled"] > 4 * limit["split half"]
