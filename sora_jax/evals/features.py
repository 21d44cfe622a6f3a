"""Features for Frechet distances, from networks whose weights are hashed.

Built in is the toy state network; the distance on its features is called FVD-toy, never
FVD: it can only see what the toy world has.

Letters: b clips, t frames, h height, w width, c colour channels, d features.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import paths
from sora_jax.evals import temporal
from sora_jax.models import feature_net

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TOY = "toy_state_network_2"


class WrongWeights(ValueError):
    """A weights file is absent, or not the one that its description names."""


class ToyFeatures:
    """Maps clips to the features of the toy state network.

    Clips of another size are resized (bilinear, antialiased); of longer clips the first
    frames are used.

    Attributes:
      sha256: of the weights file.
      resize: how clips are brought to size, for the protocol.
      num_frames, size: what the network takes.
    """

    resize = "bilinear, antialiased; first frames"

    def __init__(
        self, folder: pathlib.Path = WEIGHTS, name: str = TOY, *, batch_size: int = 64
    ):
        self.network, self.sha256 = load(folder, name)
        self.num_frames = self.network.config.num_frames
        self.size = self.network.config.size
        self._batch_size = batch_size
        self._graph, self._params = nnx.split(self.network)

    def __call__(self, video_bthwc: np.ndarray) -> np.ndarray:
        """Returns features [b, d], float32.

        Args:
          video_bthwc: uint8, or float32 in [-1, 1].

        Raises:
          ValueError: too few frames, or values that are not finite.
        """
        if np.ndim(video_bthwc) == 5 and video_bthwc.shape[1] < self.num_frames:
            raise ValueError(
                f"the toy state network needs {self.num_frames} frames, the clips have "
                f"{video_bthwc.shape[1]}"
            )
        features = []
        for start in range(0, len(video_bthwc), self._batch_size):
            chunk = video_bthwc[start : start + self._batch_size, : self.num_frames]
            chunk = temporal.as_unit(chunk) * 2 - 1
            # A short chunk is filled up, so that one shape is compiled.
            fill = np.repeat(chunk[-1:], self._batch_size - len(chunk), axis=0)
            padded = np.concatenate([chunk, fill])
            result = _forward(self._graph, self.size, self._params, padded)
            features.append(np.asarray(result)[: len(chunk)])
        if not features:
            raise ValueError("there are no clips to take features of")
        return np.concatenate(features)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(graph, size, params, video_bthwc):
    b, t, h, w, c = video_bthwc.shape
    if (h, w) != (size, size):
        video_bthwc = jax.image.resize(video_bthwc, (b, t, size, size, c), "linear")
    return nnx.merge(graph, params).features(video_bthwc)


def save(network: feature_net.StateNetwork, folder: pathlib.Path, name: str) -> str:
    """Writes name.safetensors and name.json (config, SHA-256); returns the SHA-256."""
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
    content = safetensors.numpy.save(arrays)
    paths.write_atomically(folder / f"{name}.safetensors", content)
    sha256 = hashlib.sha256(content).hexdigest()
    description = {"config": dataclasses.asdict(network.config), "sha256": sha256}
    paths.write_atomically(folder / f"{name}.json", json.dumps(description, indent=2))
    return sha256


def load(folder: pathlib.Path, name: str) -> tuple[feature_net.StateNetwork, str]:
    """Reads a network that `save` wrote and its SHA-256.

    Raises:
      WrongWeights: a file is absent, its SHA-256 is not the one in the description, or
        its tensors are not those of the configured network.
    """
    weights_file, json_file = (
        folder / f"{name}{end}" for end in (".safetensors", ".json")
    )
    for file in (weights_file, json_file):
        if not file.is_file():
            raise WrongWeights(
                f"{file} is missing; it is part of the repository, and "
                "experiments/train_state_network.py makes it anew"
            )
    description = json.loads(json_file.read_text())
    content = weights_file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != description["sha256"]:
        raise WrongWeights(
            f"{weights_file} has SHA-256 {sha256[:12]}…, its description asks for "
            f"{description['sha256'][:12]}…: scores made with it would not be comparable"
        )
    arrays = safetensors.numpy.load(content)
    config = configs.build(feature_net.Config, description["config"])
    network = nnx.eval_shape(lambda: feature_net.StateNetwork(config, nnx.Rngs(0)))
    graph, abstract = nnx.split(network)
    flat = nnx.to_flat_state(abstract)
    wanted = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
    found = {key: array.shape for key, array in arrays.items()}
    if wanted != found:
        raise WrongWeights(
            f"{weights_file} does not hold the configured network: "
            f"{sorted(dict(wanted.items() ^ found.items()))} differ"
        )
    leaves = [
        (path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves)), sha256
