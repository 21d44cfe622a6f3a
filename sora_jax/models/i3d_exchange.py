"""I3D's public files: the names and layouts of their tensors.

There are three sets of names. `PIERGIAJ` and `HASSONY2` are the two PyTorch ports; `TF` is
the TensorFlow-Hub module i3d-kinetics-400, whose batch norms have no scale. The rules are
those of `exchange.py`: every tensor has exactly one place, and one error names all
tensors that have none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.models import exchange, i3d

_TORCH_KERNEL, _TF_KERNEL = (4, 3, 0, 1, 2), (0, 1, 2, 3, 4)
_TORCH_NORM = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}
_TF_NORM = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "variance": "moving_variance",
}
_STEM = dict(
    zip(i3d.STEM, ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"), strict=True)
)
_HASSONY2_PARTS = dict(
    zip(
        i3d.PARTS,
        (
            "branch_0",
            "branch_1.0",
            "branch_1.1",
            "branch_2.0",
            "branch_2.1",
            "branch_3.1",
        ),
        strict=True,
    )
)
_TF_PARTS = dict(
    zip(
        i3d.PARTS,
        (
            "Branch_0/Conv3d_0a_1x1",
            "Branch_1/Conv3d_0a_1x1",
            "Branch_1/Conv3d_0b_3x3",
            "Branch_2/Conv3d_0a_1x1",
            "Branch_2/Conv3d_0b_3x3",
            "Branch_3/Conv3d_0b_1x1",
        ),
        strict=True,
    )
)


def _places(stem, block, parts) -> Iterator[tuple[str, str]]:
    """Yields (ours, theirs) for every convolution with a norm, in the network's order."""
    for name in i3d.STEM:
        yield name, stem(_STEM[name])
    for name in i3d.BLOCKS:
        for part in i3d.PARTS:
            yield f"{name}.{part}", f"{block(name.capitalize())}{parts[part]}"


def _torch(theirs: str, ours: str, norm: str) -> Iterator[exchange.Entry]:
    yield exchange.Entry(f"{theirs}.conv3d.weight", f"{ours}.kernel", _TORCH_KERNEL)
    for our_part, their_part in _TORCH_NORM.items():
        yield exchange.Entry(
            f"{theirs}.{norm}.{their_part}", f"{ours}.{our_part}", (0,)
        )


def _torch_logits(theirs: str) -> Iterator[exchange.Entry]:
    yield exchange.Entry(
        f"{theirs}.conv3d.weight", "logits.kernel", (1, 0), ones=(0, 3)
    )
    yield exchange.Entry(f"{theirs}.conv3d.bias", "logits.bias", (0,))


def _piergiaj(config: i3d.Config) -> Iterator[exchange.Entry]:
    parts = {part: f".{part}" for part in i3d.PARTS}
    for ours, theirs in _places(str, str, parts):
        yield from _torch(theirs, ours, "bn")
    yield from _torch_logits("logits")


def _hassony2(config: i3d.Config) -> Iterator[exchange.Entry]:
    parts = {part: f".{name}" for part, name in _HASSONY2_PARTS.items()}
    for ours, theirs in _places(_lower_first, _lower_first, parts):
        yield from _torch(theirs, ours, "batch3d")
    yield from _torch_logits("conv3d_0c_1x1")


def _lower_first(name: str) -> str:
    return name[0].lower() + name[1:]


def _tf(config: i3d.Config) -> Iterator[exchange.Entry]:
    root = "RGB/inception_i3d/"
    parts = {part: f"/{name}" for part, name in _TF_PARTS.items()}
    for ours, theirs in _places(root.__add__, root.__add__, parts):
        # The published graph has one name that breaks its own pattern.
        if theirs.endswith("Mixed_5b/Branch_2/Conv3d_0b_3x3"):
            theirs = theirs.replace("0b_3x3", "0a_3x3")
        yield exchange.Entry(f"{theirs}/conv_3d/w", f"{ours}.kernel", _TF_KERNEL)
        for our_part, their_part in _TF_NORM.items():
            name = f"{theirs}/batch_norm/{their_part}"
            yield exchange.Entry(name, f"{ours}.{our_part}", (0,), ones=(4, 0))
    logits = f"{root}Logits/Conv3d_0c_1x1/conv_3d"
    yield exchange.Entry(f"{logits}/w", "logits.kernel", (0, 1), ones=(3, 0))
    yield exchange.Entry(f"{logits}/b", "logits.bias", (0,))


PIERGIAJ = exchange.Peer("piergiaj's I3D", _piergiaj, i3d.I3D)
HASSONY2 = exchange.Peer("hassony2's I3D", _hassony2, i3d.I3D)
TF = exchange.Peer("the TensorFlow-Hub I3D", _tf, i3d.I3D)


def i3d_layout(names) -> exchange.Peer | None:
    """Returns which of the three layouts has these names; None where none has."""
    marks = {
        "Conv3d_1a_7x7.conv3d.weight": PIERGIAJ,
        "conv3d_1a_7x7.conv3d.weight": HASSONY2,
        "RGB/inception_i3d/Conv3d_1a_7x7/conv_3d/w": TF,
    }
    return next((peer for name, peer in marks.items() if name in names), None)


def read_i3d(tensors: Mapping[str, Any], config: i3d.Config) -> exchange.Tree:
    """Returns I3D's parameters from a file's tensors, in any of its layouts.

    Torch's counters of batches are ignored. A TensorFlow variable may end in ":0".
    TensorFlow's norms have no scale, which becomes one.

    Raises:
      ValueError: the names are of no known layout, or tensors are missing, unexpected or
        of another shape; all of them are named.
    """
    tensors = {
        name.removesuffix(":0"): array
        for name, array in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    peer = i3d_layout(tensors)
    if peer is None:
        raise ValueError(
            "these are not the names of a known I3D: they start with Conv3d_1a_7x7 "
            "(piergiaj), conv3d_1a_7x7 (hassony2) or RGB/inception_i3d/Conv3d_1a_7x7 "
            f"(TensorFlow Hub), not {', '.join(sorted(tensors)[:3])}, …"
        )
    if peer is TF:
        for name in [n for n in tensors if n.endswith("/beta")]:
            gamma = f"{name.removesuffix('beta')}gamma"
            tensors.setdefault(gamma, np.ones_like(tensors[name]))
    return peer.restore(tensors, config)


def read_i3d_in_order(tensors: Mapping[str, Any], config: i3d.Config) -> exchange.Tree:
    """Returns I3D's parameters from tensors whose names do not follow a known layout.

    The parameters of a TorchScript may have any prefix. If removing a common prefix gives
    a known layout, that is used. Otherwise modules, the tensors that share all but the
    last part of their names, are taken in the order of the network, and the logits by
    their shape. The caller must verify the result, since the order proves nothing.

    Raises:
      ValueError: as `read_i3d`, or the tensors do not match the network.
    """
    tensors = {
        n: a for n, a in tensors.items() if not n.endswith(".num_batches_tracked")
    }
    for mark in ("Conv3d_1a_7x7.conv3d.weight", "conv3d_1a_7x7.conv3d.weight"):
        for name in tensors:
            if name.endswith(mark):
                prefix = name.removesuffix(mark)
                return read_i3d(
                    {n.removeprefix(prefix): a for n, a in tensors.items()}, config
                )
    modules: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = array
    kernels = [m for m in modules.values() if np.ndim(m.get("weight")) == 5]
    norms = [m for m in modules.values() if "running_mean" in m]
    logits = [m for m in kernels if len(m["weight"]) == config.num_classes]
    units = [m for m in kernels if len(m["weight"]) != config.num_classes]
    names = [ours for ours, _ in _places(str, str, dict.fromkeys(i3d.PARTS, ""))]
    if (len(logits), len(units), len(norms)) != (1, len(names), len(names)):
        raise ValueError(
            f"I3D has {len(names)} convolutions with a norm and one for the logits, not "
            f"{len(units)}, {len(norms)} norms and {len(logits)} for logits"
        )
    ordered = {}
    for place, unit, norm in zip(_piergiaj_places(), units, norms, strict=True):
        ordered |= {f"{place}.conv3d.{part}": array for part, array in unit.items()}
        # The scale is one where a norm has none, as TensorFlow's.
        norm = {"weight": np.ones_like(norm["running_mean"])} | norm
        ordered |= {f"{place}.bn.{part}": array for part, array in norm.items()}
    ordered |= {f"logits.conv3d.{part}": a for part, a in logits[0].items()}
    return PIERGIAJ.restore(ordered, config)


def _piergiaj_places() -> Iterator[str]:
    parts = {part: f".{part}" for part in i3d.PARTS}
    return (theirs for _, theirs in _places(str, str, parts))
