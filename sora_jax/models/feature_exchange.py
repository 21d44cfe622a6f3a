"""Public files of feature networks: the names and layouts of their tensors.

Vision transformers have the names of transformers' classes; the files that came before
those classes (VideoMAE-v2, V-JEPA) are renamed to them first.

I3D is in use under three sets of names. `piergiaj` and `hassony2` are the two PyTorch
ports; `TF` are the variables of the TensorFlow-Hub module i3d-kinetics-400, whose batch
norms have no scale. The rules are those of `exchange.py`: every tensor has exactly one
place, and one error names all that have none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.models import exchange, i3d, vit

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
        ("branch_0", "branch_1.0", "branch_1.1", "branch_2.0", "branch_2.1", "branch_3.1"),
        strict=True,
    )
)  # fmt: skip
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
    """(ours, theirs) of every convolution with a norm, in the order of the network."""
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
        # The published graph has a slip of the pen in one place.
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
    """Which of the three layouts these names are; None where they are none's."""
    marks = {
        "Conv3d_1a_7x7.conv3d.weight": PIERGIAJ,
        "conv3d_1a_7x7.conv3d.weight": HASSONY2,
        "RGB/inception_i3d/Conv3d_1a_7x7/conv_3d/w": TF,
    }
    return next((peer for name, peer in marks.items() if name in names), None)


def read_i3d(tensors: Mapping[str, Any], config: i3d.Config) -> exchange.Tree:
    """Returns I3D's parameters from a file's tensors, in any of its layouts.

    Counters of batches, which torch keeps beside its norms, are left out; a variable of
    TensorFlow may end in ":0". TensorFlow's norms have no scale: it is one.

    Raises:
      ValueError: it is no layout's, or tensors are missing, unexpected or mis-shaped;
        all of them are named.
    """
    tensors = {
        name.removesuffix(":0"): array
        for name, array in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    peer = i3d_layout(tensors)
    if peer is None:
        raise ValueError(
            "these are the names of no known I3D: it begins with Conv3d_1a_7x7 "
            "(piergiaj), conv3d_1a_7x7 (hassony2) or RGB/inception_i3d/Conv3d_1a_7x7 "
            f"(TensorFlow Hub), and here are {', '.join(sorted(tensors)[:3])}, …"
        )
    if peer is TF:
        for name in [n for n in tensors if n.endswith("/beta")]:
            gamma = f"{name.removesuffix('beta')}gamma"
            tensors.setdefault(gamma, np.ones_like(tensors[name]))
    return peer.restore(tensors, config)


def _norm(theirs: str, ours: str, **at) -> Iterator[exchange.Entry]:
    yield exchange.Entry(f"{theirs}.weight", f"{ours}.scale", (0,), **at)
    yield exchange.Entry(f"{theirs}.bias", f"{ours}.bias", (0,), **at)


def _linear(theirs: str, ours: str, bias: bool = True, **at):
    yield exchange.Entry(f"{theirs}.weight", f"{ours}.kernel", (1, 0), **at)
    if bias:
        yield exchange.Entry(f"{theirs}.bias", f"{ours}.bias", (0,), **at)


def _patches(theirs: str, config: vit.Config) -> Iterator[exchange.Entry]:
    rank = 2 if config.patch[0] == 1 else 3  # CLIP's are pictures
    split = (*config.patch[3 - rank :], 3, config.dim)
    axes = (rank + 1, rank, *range(rank))
    yield exchange.Entry(f"{theirs}.weight", "patches.kernel", axes, split=split)
    if config.patch_bias:
        yield exchange.Entry(f"{theirs}.bias", "patches.bias", (0,))


def _blocks(theirs, ours, count, parts: Mapping[str, str], key_bias=True):
    """Entries of numbered blocks; `parts` has their names of our parts."""
    for layer in range(count):
        for part, name in parts.items():
            entry = _norm if part.startswith("norm") else _linear
            bias = {} if part != "attention.k" or key_bias else {"bias": False}
            place = f"{theirs}.{layer}.{name}", f"{ours}.{part}"
            yield from entry(*place, **bias, layer=layer)


_VIDEOMAE_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
_VJEPA_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.q": "attention.query",
    "attention.k": "attention.key",
    "attention.v": "attention.value",
    "attention.o": "attention.proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def _videomae(config: vit.Config) -> Iterator[exchange.Entry]:
    root = "videomae."
    yield from _patches(f"{root}embeddings.patch_embeddings.projection", config)
    yield from _blocks(
        f"{root}encoder.layer",
        "blocks",
        config.num_layers,
        _VIDEOMAE_BLOCK,
        config.key_bias,
    )
    if config.norm_out:
        yield from _norm(f"{root}layernorm", "norm_out")
    if config.pool_norm:
        yield from _norm("fc_norm", "pool_norm")


def _vjepa(config: vit.Config) -> Iterator[exchange.Entry]:
    root, pooler = "vjepa2.encoder.", "pooler.cross_attention_layer"
    yield from _patches(f"{root}embeddings.patch_embeddings.proj", config)
    if config.positions == "table":
        yield exchange.Entry(f"{root}pos_embed", "table", (0, 1), ones=(1, 0))
    yield from _blocks(f"{root}layer", "blocks", config.num_layers, _VJEPA_BLOCK)
    yield from _norm(f"{root}layernorm", "norm_out")
    yield exchange.Entry("pooler.query_tokens", "pool.query", (0,), ones=(2, 0))
    others = f"{pooler.rpartition('.')[0]}.self_attention_layers"
    yield from _blocks(others, "pool.blocks", config.pool_layers, _CLIP_BLOCK)
    for part, name in _CLIP_BLOCK.items():
        if part == "attention.o" and not config.pool_projection:
            continue
        name = name.replace("self_attn", "cross_attn")
        entry = _norm if part.startswith("norm") else _linear
        yield from entry(f"{pooler}.{name}", f"pool.{part}")


def _clip_vision(config: vit.Config) -> Iterator[exchange.Entry]:
    root = "vision_model."
    yield exchange.Entry(f"{root}embeddings.class_embedding", "token", (0,))
    yield from _patches(f"{root}embeddings.patch_embedding", config)
    places = f"{root}embeddings.position_embedding.weight"
    yield exchange.Entry(places, "table", (0, 1))
    yield from _norm(f"{root}pre_layrnorm", "norm_in")
    yield from _blocks(
        f"{root}encoder.layers", "blocks", config.num_layers, _CLIP_BLOCK
    )
    yield from _norm(f"{root}post_layernorm", "pool_norm")
    yield from _linear("visual_projection", "projection", False)


def _clip_text(config: vit.TextConfig) -> Iterator[exchange.Entry]:
    root = "text_model."
    for theirs, ours in (
        ("token_embedding", "embedding"),
        ("position_embedding", "table"),
    ):
        yield exchange.Entry(f"{root}embeddings.{theirs}.weight", ours, (0, 1))
    yield from _blocks(
        f"{root}encoder.layers", "blocks", config.num_layers, _CLIP_BLOCK
    )
    yield from _norm(f"{root}final_layer_norm", "norm_out")
    yield from _linear("text_projection", "projection", False)


VIDEOMAE = exchange.Peer("VideoMAE", _videomae, vit.VisionTransformer)
VJEPA = exchange.Peer("V-JEPA", _vjepa, vit.VisionTransformer)
CLIP_VISION = exchange.Peer("CLIP's vision half", _clip_vision, vit.VisionTransformer)
CLIP_TEXT = exchange.Peer("CLIP's text half", _clip_text, vit.TextTransformer)
