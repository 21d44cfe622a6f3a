"""Weights of feature networks: converted once, then read from a folder that says its hash.

A folder of ours holds weights.safetensors and config.json (kind, config, the SHA-256 of
the weights, and what file they come from). A folder as transformers stores it is read as
it is. What torch wrote is turned by the peers' Python (`.peers`, which ./launch/test
builds), since this environment has no torch: pickles with weights_only; TorchScript,
which is a program, only where its SHA-256 is the one that was asked for.
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

# StyleGAN-V's i3d_torchscript.pt, as many public scripts pin it.
STYLEGAN_V = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
KINDS = {
    "i3d": (i3d.Config, i3d.I3D),
    "videomae": (vit.Config, vit.VisionTransformer),
    "vjepa": (vit.Config, vit.VisionTransformer),
}


class WrongWeights(ValueError):
    """A weights file is absent, or not the one that its description names."""


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
    """Makes a network around parameters, without ever drawing its own.

    Raises:
      ValueError: some are not finite; they are named.
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
    """Writes a folder of ours; returns the SHA-256 of the weights.

    Args:
      folder: where to; it is made.
      kind: one of KINDS.
      config: of the network.
      params: its parameters, nested dicts.
      source: what they come from, for the description.
    """
    # safetensors writes memory as it lies; these may be views with other strides.
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
    """Reads a folder of ours, or one as transformers stores it.

    Raises:
      WrongWeights: a file is absent or not the described one, or the tensors are not
        those of the network; all that are missing or unexpected are named.
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
            f"weights.safetensors has SHA-256 {sha256[:12]}…, config.json asks for "
            f"{description['sha256'][:12]}…: scores made with it would not be comparable"
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
    """Turns a known file of feature weights into a folder of ours.

    I3D: a .pt of either PyTorch port, an .npz of the TensorFlow-Hub variables, or
    StyleGAN-V's TorchScript. VideoMAE-v2-g: CD-FVD's .pth. V-JEPA-H: JEDi's encoder with
    its probe.

    Args:
      source: the file.
      folder: where to.
      eps: I3D's epsilon. TensorFlow's variables and hassony2's port mean 1e-3. Files
        under piergiaj's names are used with either, so it must be said. For a
        TorchScript it is found by what the program computes.
      probe: JEDi's attentive probe, with V-JEPA's encoder.
      trusted: SHA-256 of a TorchScript that may be run.
      python: of the peers' environment.

    Returns:
      SHA-256 of the weights that were written.

    Raises:
      ValueError: the file is of no known layout; tensors are missing, unexpected or
        mis-shaped; a needed argument is absent; or a TorchScript is not the trusted one
        or computes something else than the network that its tensors make.
      FileNotFoundError: the file or the peers' Python does not exist.
    """
    about = {"file": source.name, "sha256": paths.sha256_file(source)}
    if probe is not None:
        about |= {"probe": probe.name, "probe_sha256": paths.sha256_file(probe)}
    if trusted is not None:
        if about["sha256"] != trusted:
            raise ValueError(
                f"{source} has SHA-256 {about['sha256']}, and {trusted} is trusted: a "
                "TorchScript is a program, and this is another one"
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
                    "these are V-JEPA's encoders; JEDi's features are what its probe "
                    "makes of them: give --probe, the file ssv2-probe.pth.tar"
                )
            pooler = _inside(torch_files.read(probe, python), "classifier.")
            params = vit_exchange.read_vjepa_1(encoder, pooler)
            return "vjepa", vit_exchange.VJEPA_H, params
    layout = i3d_exchange.i3d_layout(names)
    if layout is i3d_exchange.PIERGIAJ and eps is None:
        raise ValueError(
            "files under piergiaj's names are used with two epsilons, which changes the "
            "score: give --eps 1e-5 for i3d_pretrained_400.pt of VideoGPT, TATS and "
            "CD-FVD, or --eps 1e-3 for piergiaj's rgb_imagenet.pt, another network"
        )
    config = i3d.Config(eps=1e-3 if eps is None else eps)
    return "i3d", config, i3d_exchange.read_i3d(tensors, config)


def _unwrapped(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the dict "model" or "module" that some training code puts around them."""
    return _inside(tensors, "model.") or _inside(tensors, "module.") or tensors


def _inside(tensors: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {n.removeprefix(key): a for n, a in tensors.items() if n.startswith(key)}


def _from_script(source: pathlib.Path, python) -> tuple[exchange.Tree, i3d.Config]:
    """Parameters from a TorchScript, proved by running it beside what they make."""
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 16, i3d.SIZE, i3d.SIZE, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "video.safetensors"
        theirs = {"video": np.ascontiguousarray(np.moveaxis(video, -1, 1))}
        safetensors.numpy.save_file(theirs, file)
        tensors = torch_files.read(source, python, file)
    wanted = tensors.pop("probe")
    apart = {}
    for eps in (1e-3, 1e-5):
        config = i3d.Config(eps=eps)
        params = i3d_exchange.read_i3d_in_order(tensors, config)
        network = build(i3d.I3D, config, params)
        with jax.default_matmul_precision("highest"):
            found = jax.jit(lambda network: network(video)["logits"])(network)
        apart[eps] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        if apart[eps] < 1e-4:
            return params, config
    raise ValueError(
        f"{source} computes something else than the network that its tensors make: the "
        f"relative difference is {min(apart.values()):.1e}"
    )
