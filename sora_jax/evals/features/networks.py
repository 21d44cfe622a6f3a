"""Feature networks for distances between videos.

The toy state network ("toy") is built in. The distance on its features is called FVD-toy,
never FVD, since it sees only what occurs in the toy world. The others need weights that
cannot be shipped (`weight_folders.py` reads them): "i3d" for FVD, "videomae" for
content-debiased FVD (arXiv 2404.12391), "vjepa" for JEDi (arXiv 2410.05203), "clip" for
agreement with texts. Clips are preprocessed as by the public code of each score; what can
vary is recorded in the protocol.

Letters: b clips, t frames, h height, w width, c colour channels, d features, l tokens.
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
from sora_jax.core import digests
from sora_jax.evals import pixels
from sora_jax.evals.features import resize as resizing
from sora_jax.evals.features.weight_folders import Weights, WrongWeights
from sora_jax.evals.features.weight_folders import load as load_weights
from sora_jax.models import feature_net, i3d

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TOY = "toy_state_network_2"


class ToyFeatures:
    """Maps clips to the features of the toy state network.

    Clips of another size are resized (bilinear, antialiased); of longer clips the first
    frames are used.

    Attributes:
      sha256: of the weights file.
      resize: how clips are resized, for the protocol.
      num_frames, size: of the network's input.
      batch_size: clips per batch.
    """

    resize = "bilinear, antialiased; first frames"

    def __init__(
        self, folder: pathlib.Path = WEIGHTS, name: str = TOY, *, batch_size: int = 64
    ):
        self.network, self.sha256 = load(folder, name)
        self.num_frames = self.network.config.num_frames
        self.size = self.network.config.size
        self.batch_size = batch_size
        self._graph, self._params = nnx.split(self.network)

    def __call__(self, video_bthwc: np.ndarray) -> np.ndarray:
        """Returns features [b, d], float32.

        Args:
          video_bthwc: uint8, or float32 in [-1, 1].

        Raises:
          ValueError: too few frames, or values that are not finite.
        """
        forward = functools.partial(_forward, self._graph, self.size, self._params)
        return _in_batches(
            video_bthwc,
            self.num_frames,
            self.batch_size,
            "the toy state network",
            lambda chunk_bthwc: forward(chunk_bthwc * 2 - 1),
        )


def _in_batches(video_bthwc, num_frames, batch_size: int, name: str, forward):
    """Applies `forward` to the first frames of all clips, in [0, 1]: float32 [b, ...].

    Raises:
      ValueError: there are no clips, too few frames, or values that are not finite.
    """
    if np.ndim(video_bthwc) == 5 and video_bthwc.shape[1] < num_frames:
        raise ValueError(
            f"{name} needs {num_frames} frames, the clips have {video_bthwc.shape[1]}"
        )
    features = []
    for start in range(0, len(video_bthwc), batch_size):
        chunk = pixels.as_unit(video_bthwc[start : start + batch_size, :num_frames])
        # A short chunk is padded, so that one shape is compiled.
        fill = np.repeat(chunk[-1:], batch_size - len(chunk), axis=0)
        result = forward(np.concatenate([chunk, fill]))
        features.append(np.asarray(result)[: len(chunk)])
    if not features:
        raise ValueError("there are no clips to compute features of")
    return np.concatenate(features)


@dataclasses.dataclass(frozen=True)
class Known:
    """How public code preprocesses clips for a network, and where its weights are.

    Attributes:
      score: what is computed from its features.
      resize: one of `resize.NAMES`.
      mean, deviation: per channel, by which pixels in [0, 1] are normalized.
      weights: the file, its source, and how to convert it.
      num_frames: first frames that are used, if the network takes any number.
    """

    score: str
    resize: str
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    weights: str
    num_frames: int | None = None


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}
_CONVERTED = (
    "turned into a folder by python -m sora_jax.convert --from FILE --out FOLDER"
)
KNOWN = {
    "i3d": Known(
        "FVD",
        "half_pixel",
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        "i3d_torchscript.pt of universome/fvd-comparison or i3d_pretrained_400.pt of "
        f"songweige/TATS, {_CONVERTED}",
        num_frames=16,
    ),
    "videomae": Known(
        "content-debiased FVD",
        "half_pixel",
        (0.0, 0.0, 0.0),  # CD-FVD's code does not normalize pixels
        (1.0, 1.0, 1.0),
        "vit_g_hybrid_pt_1200e_ssv2_ft.pth of OpenGVLab's InternVideoMAE_models on the "
        f"hub, {_CONVERTED}",
    ),
    "vjepa": Known(
        "JEDi",
        "half_pixel",
        **_IMAGENET,
        weights="vith16.pth.tar and ssv2-probe.pth.tar of facebookresearch/jepa, "
        f"{_CONVERTED} --probe SECOND",
    ),
    "clip": Known(
        "agreement with texts",
        "bicubic, cropped",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        "the folder openai/clip-vit-base-patch32 of the hub, unchanged",
    ),
}
NAMES = ("toy", *KNOWN)


def open(name: str, folder: str | pathlib.Path | None = None, **options):
    """Returns a feature network as a function of clips.

    Args:
      name: one of NAMES.
      folder: of the weights; those of the toy are built in.
      options: see `VideoFeatures`.

    Raises:
      WrongWeights: the weights are missing (the sentence names file and source), or are
        those of another network.
      ValueError: unknown name, or an option that the network does not have.
    """
    if name == "toy":
        return ToyFeatures(**options)
    if name not in KNOWN:
        raise ValueError(f"features are {name!r}, they must be {', '.join(NAMES)}")
    known = KNOWN[name]
    if folder is None or not (pathlib.Path(folder) / "config.json").is_file():
        where = "no folder is named" if folder is None else f"{folder} has none"
        raise WrongWeights(
            f"{known.score} needs weights that cannot be shipped, and {where}: use "
            f"{known.weights}; FVD-toy, flicker, warping error, motion and the oracle's "
            "scores need none"
        )
    weights = load_weights(pathlib.Path(folder))
    if weights.kind != name:
        raise WrongWeights(f"{folder} holds {weights.kind}, not {name}")
    return (ClipFeatures if name == "clip" else VideoFeatures)(weights, **options)


class VideoFeatures:
    """Maps clips to the features of a public network.

    The features of a clip do not depend on the other clips of a batch.

    Args:
      weights: of the network.
      resize: one of `resize.NAMES`; None: that of the network's score.
      num_frames: first frames of a clip that are used, for I3D.
      output: "logits" or "pooled", for I3D.
      batch_size: clips per batch; by default 1 on CPU, whose caches are small, else 16.

    Attributes:
      name: of the network.
      sha256: of the weights.
      resize: all preprocessing of clips, for the protocol.
      num_frames, size: of the network's input.
      eps: of I3D's batch norms; None for others.
      batch_size: clips per batch.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        resize: str | None = None,
        num_frames: int | None = None,
        output: str | None = None,
        batch_size: int | None = None,
    ):
        known = KNOWN[weights.kind]
        self.name, self.sha256 = weights.kind, weights.sha256
        network = next(iter(weights.parts.values()))
        own = None if self.name == "i3d" else network.config.num_frames
        if self.name != "i3d" and (num_frames, output) != (None, None):
            raise ValueError(f"{self.name} has a fixed number of frames and one output")
        if output not in (None, "logits", "pooled"):
            raise ValueError(f"output is {output!r}, it must be logits or pooled")
        self.num_frames = num_frames or known.num_frames or own
        self.size = i3d.SIZE if self.name == "i3d" else network.config.size
        self._resize = resize or known.resize
        if self._resize not in resizing.NAMES:
            raise ValueError(
                f"resize is {self._resize!r}, it must be one of "
                f"{', '.join(resizing.NAMES)}"
            )
        self._output = output or "logits"
        self.eps = network.config.eps if self.name == "i3d" else None
        eps = "" if self.eps is None else f", epsilon {self.eps:g}"
        what = f" {self._output}" if self.name == "i3d" else ""
        self.resize = f"{self._resize}; first frames; {self.name}{what}{eps}"
        cpu = jax.default_backend() == "cpu"
        self.batch_size = batch_size or (1 if cpu else 16)
        self._known = known
        self._split = {part: nnx.split(net) for part, net in weights.parts.items()}

    def __call__(self, video_bthwc: np.ndarray) -> np.ndarray:
        """Returns features [b, d], float32; arguments and errors as in `ToyFeatures`."""
        return _in_batches(
            video_bthwc, self.num_frames, self.batch_size, self.name, self._forward
        )

    def _forward(self, unit_bthwc: np.ndarray) -> jax.Array:
        graph, params = next(iter(self._split.values()))
        with jax.default_matmul_precision("highest"):  # full float32 on accelerators
            return _features(
                graph,
                self._known,
                self.size,
                self._resize,
                self._output,
                params,
                unit_bthwc,
            )


class ClipFeatures(VideoFeatures):
    """Maps clips to the mean of CLIP's features of all frames, and texts to features.

    Arguments and errors as in `VideoFeatures`.

    Attributes:
      text_config: of the text network, a `vit.TextConfig`.
    """

    def __init__(self, weights: Weights, **options):
        super().__init__(weights, **options)
        self.text_config = weights.parts["text"].config

    def __call__(self, video_bthwc: np.ndarray) -> np.ndarray:
        """Returns features [b, d] of clips of any length, float32."""
        return self.frames(video_bthwc).mean(axis=1)

    def frames(self, video_bthwc: np.ndarray) -> np.ndarray:
        """Returns features [b, t, d] of each frame."""
        b, t = video_bthwc.shape[:2]
        pictures = np.reshape(video_bthwc, (b * t, 1, *video_bthwc.shape[2:]))
        return super().__call__(pictures).reshape(b, t, -1)

    def texts(self, ids_bl: np.ndarray) -> np.ndarray:
        """Returns features [b, d] of texts, given as token ids."""
        graph, params = self._split["text"]
        with jax.default_matmul_precision("highest"):
            return np.asarray(_text(graph, params, ids_bl))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors normalized to unit length along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _features(graph, known, size, resize, output, params, unit_bthwc):
    x_bthwc = resizing.resize(unit_bthwc, size, resize)
    x_bthwc = (x_bthwc - np.float32(known.mean)) / np.float32(known.deviation)
    found = nnx.merge(graph, params)(x_bthwc)
    return found[output] if isinstance(found, dict) else found


@functools.partial(jax.jit, static_argnums=0)
def _text(graph, params, ids_bl):
    return nnx.merge(graph, params)(ids_bl)


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
    digests.store(folder / f"{name}.safetensors", content)
    sha256 = hashlib.sha256(content).hexdigest()
    description = {"config": dataclasses.asdict(network.config), "sha256": sha256}
    digests.store(folder / f"{name}.json", json.dumps(description, indent=2))
    return sha256


def load(folder: pathlib.Path, name: str) -> tuple[feature_net.StateNetwork, str]:
    """Reads a network that `save` wrote, and its SHA-256.

    Raises:
      WrongWeights: a file is missing, its SHA-256 differs from the description, or its
        tensors do not fit the configured network.
    """
    weights_file, json_file = (
        folder / f"{name}{end}" for end in (".safetensors", ".json")
    )
    for file in (weights_file, json_file):
        if not file.is_file():
            raise WrongWeights(
                f"{file} is missing; it is part of the repository, and can be retrained "
                "with experiments/train_state_network.py"
            )
    try:
        description = json.loads(digests.read(json_file))
        content = digests.read(weights_file)
    except digests.Damaged as error:
        raise WrongWeights(str(error)) from None
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != description["sha256"]:
        raise WrongWeights(
            f"{weights_file} has SHA-256 {sha256[:12]}…, but its description has "
            f"{description['sha256'][:12]}…: its scores would not be comparable"
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
