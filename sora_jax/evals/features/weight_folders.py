"""Weights of feature networks: converted once, then read from folders with a SHA-256.

A converted folder holds weights.safetensors and config.json (kind, config, the SHA-256 of
the weights, and their source file). Folders in the layout of transformers are read
directly. Files of torch are converted by the Python of `.peers`, which ./launch/test
builds, since this environment has no torch: pickles with weights_only; TorchScript files,
which are programs, only if their SHA-256 is trusted.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import digests, paths, trees
from sora_jax.models import exchange, i3d, i3d_exchange, vit, vit_exchange
from sora_jax.training import torch_files, weight_files

# SHA-256 of StyleGAN-V's i3d_torchscript.pt, as pinned by many public scripts.
STYLEGAN_V = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
KINDS = {
    "i3d": (i3d.Config, i3d.I3D),
    "videomae": (vit.Config, vit.VisionTransformer),
    "vjepa": (vit.Config, vit.VisionTransformer),
}


class WrongWeights(ValueError):
    """A weights file is missing, or does not match its description."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network that is ready to run.

    Attributes:
      kind: "i3d", "videomae", "vjepa" or "clip".
      parts: its modules: "video", or for CLIP "vision" and "text".
      sha256: of the file or files of weights.
    """

    kind: str
    parts: Mapping[str, nnx.Module]
    sha256: str


def build(make, config: Any, params: exchange.Tree) -> nnx.Module:
    """Builds a network with the given parameters, without initializing its own.

    Raises:
      ValueError: a tensor is not finite; the message names one.
    """
    flat = trees.flatten(params)
    broken = [name for name, array in flat.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(flat)} tensors hold NaN or infinity, such as "
            f"{broken[0]}"
        )
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return nnx.merge(graph, state)


def save(folder: pathlib.Path, kind: str, config: Any, params, source: Mapping) -> str:
    """Writes a converted folder; returns the SHA-256 of the weights.

    Args:
      folder: is created.
      kind: one of KINDS.
      config: of the network.
      params: its parameters, nested dicts.
      source: of the weights, for the description.
    """
    # safetensors writes the buffer as it is, but these may be views with other strides.
    flat = {n: np.ascontiguousarray(a) for n, a in trees.flatten(params).items()}
    content = safetensors.numpy.save(flat)
    sha256 = hashlib.sha256(content).hexdigest()
    digests.store(folder / "weights.safetensors", content)
    description = {
        "kind": kind,
        "config": dataclasses.asdict(config),
        "sha256": sha256,
        "source": dict(source),
    }
    text = json.dumps(description, indent=2) + "\n"
    digests.store(folder / "config.json", text)
    return sha256


def load(folder: pathlib.Path) -> Weights:
    """Reads a converted folder, or one in the layout of transformers.

    Raises:
      WrongWeights: a file is missing or does not match its description, or the tensors
        do not fit the network; all missing and unexpected tensors are named.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WrongWeights(f"{folder} holds no weights: it has no config.json")
    try:
        description = weight_files.read_json(file)
        if "kind" in description:
            return _load_ours(folder, description)
        tensors = weight_files.TensorFiles(folder, "model")
        kind, parts = vit_exchange.read_transformers(description, tensors)
        hashes = [paths.sha256_file(path) for path in tensors.paths]
        makers = {"text": vit.TextTransformer}
        modules = {
            part: build(makers.get(part, vit.VisionTransformer), *made)
            for part, made in parts.items()
        }
    except (ValueError, OSError) as error:
        raise WrongWeights(f"{folder}: {error}") from None
    sha256 = hashes[0]
    if len(hashes) > 1:
        sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Weights(kind, modules, sha256)


def _load_ours(folder: pathlib.Path, description: Mapping) -> Weights:
    kind = description["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, it must be one of {', '.join(KINDS)}")
    kinds = type(description.get("config")), type(description.get("sha256"))
    if kinds != (dict, str):
        raise ValueError(
            "config.json lacks the network's config or the weights' sha256"
        )
    digests.check(folder / "config.json")
    content = digests.read(folder / "weights.safetensors")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != description["sha256"]:
        raise ValueError(
            f"weights.safetensors has SHA-256 {sha256[:12]}…, but config.json has "
            f"{description['sha256'][:12]}…: its scores would not be comparable"
        )
    config_class, make = KINDS[kind]
    config = configs.build(config_class, description["config"])

    def entries(config):
        shapes = peer.shapes(config)
        for name, like in trees.flatten(shapes).items():
            yield exchange.Entry(name, name, tuple(range(len(like.shape))))

    peer = exchange.Peer(f"{kind} of ours", entries, make)
    params = peer.restore(safetensors.numpy.load(content), config)
    return Weights(kind, {"video": build(make, config, params)}, sha256)


def convert(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    eps: float | None = None,
    probe: pathlib.Path | None = None,
    trusted: str | None = None,
    python: str | pathlib.Path = torch_files.PEERS,
) -> str:
    """Converts a known file of feature weights into a folder.

    I3D: a .pt of either PyTorch port, an .npz of the TensorFlow-Hub variables, or
    StyleGAN-V's TorchScript. VideoMAE-v2-g: CD-FVD's .pth. V-JEPA-H: JEDi's encoder with
    its probe.

    Args:
      source: the file.
      folder: to write.
      eps: I3D's epsilon. It is 1e-3 for TensorFlow's variables and hassony2's port. Files
        with piergiaj's tensor names are used with two values, so it is required there.
        For a TorchScript it follows from the program's output.
      probe: JEDi's attentive probe, with V-JEPA's encoder.
      trusted: SHA-256 of a TorchScript that may be run.
      python: of the peers' environment.

    Returns:
      SHA-256 of the converted weights.

    Raises:
      ValueError: the file has an unknown layout; tensors are missing, unexpected or of
        the wrong shape; a required argument is missing; or a TorchScript is not trusted,
        or its output differs from the network with its tensors.
      FileNotFoundError: the file or the peers' Python does not exist.
    """
    about = {"file": source.name, "sha256": paths.sha256_file(source)}
    if probe is not None:
        about |= {"probe": probe.name, "probe_sha256": paths.sha256_file(probe)}
    if trusted is not None:
        if about["sha256"] != trusted:
            raise ValueError(
                f"{source} has SHA-256 {about['sha256']}, but only {trusted} is trusted: a "
                "TorchScript file is a program"
            )
        params, config = _from_script(source, python)
        return save(folder, "i3d", config, params, about)
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as file:
            tensors = dict(file)
    else:
        tensors = torch_files.read(source, python)
    kind, config, params = _recognise(tensors, eps, probe, python)
    return save(folder, kind, config, params, about)


def _recognise(tensors, eps, probe, python) -> tuple[str, Any, exchange.Tree]:
    names = {name.removesuffix(":0") for name in tensors}
    if "blocks.0.attn.q_bias" in _unwrapped(tensors):
        params = vit_exchange.read_videomae_v2(_unwrapped(tensors))
        return "videomae", vit_exchange.VIDEOMAE_V2_G, params
    keys = ("target_encoder.", "encoder.")
    for key in keys:
        encoder = _inside(tensors, key)
        if encoder:
            if probe is None:
                raise ValueError(
                    "these are V-JEPA's encoders, but JEDi's features also need its probe: "
                    "give --probe, the file ssv2-probe.pth.tar"
                )
            pooler = _inside(torch_files.read(probe, python), "classifier.")
            params = vit_exchange.read_vjepa_1(encoder, pooler)
            return "vjepa", vit_exchange.VJEPA_H, params
    layout = i3d_exchange.i3d_layout(names)
    if layout is i3d_exchange.PIERGIAJ and eps is None:
        raise ValueError(
            "files with piergiaj's tensor names are used with two epsilons, which changes "
            "the score: give --eps 1e-5 for i3d_pretrained_400.pt of VideoGPT, TATS and "
            "CD-FVD, or --eps 1e-3 for piergiaj's rgb_imagenet.pt, another network"
        )
    config = i3d.Config(eps=1e-3 if eps is None else eps)
    return "i3d", config, i3d_exchange.read_i3d(tensors, config)


def _unwrapped(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Removes the dict "model" or "module" in which some training code wraps tensors."""
    return _inside(tensors, "model.") or _inside(tensors, "module.") or tensors


def _inside(tensors: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {n.removeprefix(key): a for n, a in tensors.items() if n.startswith(key)}


def _from_script(source: pathlib.Path, python) -> tuple[exchange.Tree, i3d.Config]:
    """Reads parameters from a TorchScript, and checks them by running both networks."""
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 16, i3d.SIZE, i3d.SIZE, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "video.safetensors"
        theirs = {"video": np.ascontiguousarray(np.moveaxis(video, -1, 1))}
        safetensors.numpy.save_file(theirs, file)
        tensors = torch_files.read(source, python, file)
    wanted = tensors.pop("probe")
    errors = {}
    for eps in (1e-3, 1e-5):
        config = i3d.Config(eps=eps)
        params = i3d_exchange.read_i3d_in_order(tensors, config)
        network = build(i3d.I3D, config, params)
        with jax.default_matmul_precision("highest"):
            found = jax.jit(lambda network: network(video)["logits"])(network)
        errors[eps] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        if errors[eps] < 1e-4:
            return params, config
    raise ValueError(
        f"the output of {source} differs from that of the network with its tensors: the "
        f"relative difference is {min(errors.values()):.1e}"
    )
