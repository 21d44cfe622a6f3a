"""Public files of vision transformers: the names and layouts of their tensors.

The names are those of transformers' classes; the tensors of older files (VideoMAE-v2,
V-JEPA) are renamed to them first. The rules are those of `exchange.py`: every tensor has
exactly one place, and one error names all tensors that have none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.models import exchange, peer_configs, vit


def _norm(theirs: str, ours: str, **at) -> Iterator[exchange.Entry]:
    yield exchange.Entry(f"{theirs}.weight", f"{ours}.scale", (0,), **at)
    yield exchange.Entry(f"{theirs}.bias", f"{ours}.bias", (0,), **at)


def _patches(theirs: str, config: vit.Config) -> Iterator[exchange.Entry]:
    rank = 2 if config.patch[0] == 1 else 3  # CLIP's are pictures
    split = (*config.patch[3 - rank :], 3, config.dim)
    axes = (rank + 1, rank, *range(rank))
    yield exchange.Entry(f"{theirs}.weight", "patches.kernel", axes, split=split)
    if config.patch_bias:
        yield exchange.Entry(f"{theirs}.bias", "patches.bias", (0,))


def _blocks(theirs, ours, count, parts: Mapping[str, str], key_bias=True):
    """Yields the entries of numbered blocks; `parts` maps our names to theirs."""
    for layer in range(count):
        for part, name in parts.items():
            entry = _norm if part.startswith("norm") else exchange.linear_entries
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
        entry = _norm if part.startswith("norm") else exchange.linear_entries
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
    yield from exchange.linear_entries("visual_projection", "projection", False)


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
    yield from exchange.linear_entries("text_projection", "projection", False)


VIDEOMAE = exchange.Peer("VideoMAE", _videomae, vit.VisionTransformer)
VJEPA = exchange.Peer("V-JEPA", _vjepa, vit.VisionTransformer)
CLIP_VISION = exchange.Peer("CLIP's vision half", _clip_vision, vit.VisionTransformer)
CLIP_TEXT = exchange.Peer("CLIP's text half", _clip_text, vit.TextTransformer)

# Networks of published scores, whose files do not contain their sizes.
VIDEOMAE_V2_G = vit.Config()
VJEPA_H = vit.Config(
    patch=(2, 16, 16),
    dim=1280,
    num_layers=32,
    mlp_dim=5120,
    positions="table",
    key_bias=True,
    norm_out=True,
    pool="query",
    pool_norm=False,
    pool_eps=1e-5,
)

_RENAMED = {
    "videomae_v2": (
        (r"patch_embed\.proj", "videomae.embeddings.patch_embeddings.projection"),
        (r"blocks\.(\d+)\.norm1", r"videomae.encoder.layer.\1.layernorm_before"),
        (r"blocks\.(\d+)\.norm2", r"videomae.encoder.layer.\1.layernorm_after"),
        (
            r"blocks\.(\d+)\.attn\.proj",
            r"videomae.encoder.layer.\1.attention.output.dense",
        ),
        (
            r"blocks\.(\d+)\.attn\.(query|key|value)",
            r"videomae.encoder.layer.\1.attention.attention.\2",
        ),
        (r"blocks\.(\d+)\.mlp\.fc1", r"videomae.encoder.layer.\1.intermediate.dense"),
        (r"blocks\.(\d+)\.mlp\.fc2", r"videomae.encoder.layer.\1.output.dense"),
    ),
    "vjepa": (
        (r"pos_embed", "vjepa2.encoder.pos_embed"),
        (r"patch_embed\.proj", "vjepa2.encoder.embeddings.patch_embeddings.proj"),
        (r"blocks\.(\d+)\.attn\.", r"vjepa2.encoder.layer.\1.attention."),
        (r"blocks\.(\d+)\.(norm\d|mlp)", r"vjepa2.encoder.layer.\1.\2"),
        (r"norm\.", "vjepa2.encoder.layernorm."),
    ),
    "vjepa_probe": (
        (
            r"pooler\.cross_attention_block\.norm(\d)",
            r"pooler.cross_attention_layer.layer_norm\1",
        ),
        (r"pooler\.cross_attention_block\.mlp", "pooler.cross_attention_layer.mlp"),
        (
            r"pooler\.cross_attention_block\.xattn\.q\.",
            "pooler.cross_attention_layer.cross_attn.q_proj.",
        ),
        (
            r"pooler\.cross_attention_block\.xattn\.key\.",
            "pooler.cross_attention_layer.cross_attn.k_proj.",
        ),
        (
            r"pooler\.cross_attention_block\.xattn\.value\.",
            "pooler.cross_attention_layer.cross_attn.v_proj.",
        ),
        (
            r"pooler\.cross_attention_block\.xattn\.proj",
            "pooler.cross_attention_layer.cross_attn.out_proj",
        ),
    ),
}


def _rename(tensors: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Renames tensors to transformers' names; names without a rule stay."""
    renamed = {}
    for name, array in tensors.items():
        for pattern, replacement in _RENAMED[file]:
            new, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                name = new
                break
        renamed[name] = array
    return renamed


def _split(tensors: Mapping[str, Any], joint: str, parts: tuple[str, ...]):
    """Splits tensors named `....joint.xxx` along axis 0 into parts."""
    tensors_by_part = {}
    for name, array in tensors.items():
        head, mark, tail = name.rpartition(f".{joint}.")
        if not mark:
            tensors_by_part[name] = array
            continue
        for part, values in zip(parts, np.split(array, len(parts)), strict=True):
            tensors_by_part[f"{head}.{part}.{tail}"] = values
    return tensors_by_part


def read_videomae_v2(
    tensors: Mapping[str, Any], config: vit.Config = VIDEOMAE_V2_G
) -> exchange.Tree:
    """Returns parameters from VideoMAE-v2's own file, such as CD-FVD's.

    The classifier is skipped. Raises ValueError as `exchange.Peer.check`.
    """
    tensors = {n: a for n, a in tensors.items() if not n.startswith("head.")}
    tensors = _split(tensors, "attn.qkv", ("attn.query", "attn.key", "attn.value"))
    biases = {".q_bias": ".query.bias", ".v_bias": ".value.bias"}
    for name in list(tensors):
        for old, new in biases.items():
            if name.endswith(f".attn{old}"):
                tensors[name.removesuffix(old) + new] = tensors.pop(name)
    return VIDEOMAE.restore(_rename(tensors, "videomae_v2"), config)


def read_vjepa_1(
    encoder: Mapping[str, Any], probe: Mapping[str, Any], config: vit.Config = VJEPA_H
) -> exchange.Tree:
    """Returns parameters from V-JEPA's own files, such as JEDi's.

    The probe's classifier is skipped. Raises ValueError as `exchange.Peer.check`.

    Args:
      encoder: tensors of the target encoder.
      probe: tensors of the attentive probe.
      config: the network's.
    """
    encoder = {re.sub(r"^(module\.|backbone\.)+", "", n): a for n, a in encoder.items()}
    encoder = _split(encoder, "attn.qkv", ("attn.query", "attn.key", "attn.value"))
    probe = {n.removeprefix("module."): a for n, a in probe.items()}
    probe = {n: a for n, a in probe.items() if not n.startswith("linear.")}
    probe = _split(probe, "xattn.kv", ("xattn.key", "xattn.value"))
    tensors = _rename(encoder, "vjepa") | _rename(probe, "vjepa_probe")
    return VJEPA.restore(tensors, config)


_EPS = peer_configs.Type(
    "a number above 0, below 1",
    lambda value: peer_configs.is_number(value) and 0 < value < 1,
    float,
)
_FACTOR = peer_configs.Type(
    "a number above 0, up to 64",
    lambda value: peer_configs.is_number(value) and 0 < value <= 64,
)
_ACTIVATION = peer_configs.Type(
    f"one of {', '.join(vit.ACTIVATIONS)}",
    lambda value: isinstance(value, str) and value in vit.ACTIVATIONS,
)
_SECTION = peer_configs.Type("a section", lambda value: isinstance(value, Mapping))
_END = peer_configs.whole(0, 2**20)


def _fields(theirs: Mapping[str, Any], kind: str) -> peer_configs.Fields:
    # A network has several classes: with a classifier, with a head for pretraining, ...
    theirs = {name: v for name, v in theirs.items() if name != "architectures"}
    return peer_configs.Fields(theirs, "config.json", kind)


def _sizes(fields: peer_configs.Fields) -> dict[str, Any]:
    """Returns the sizes that all of these configs name alike."""
    return {
        "dim": fields.take("hidden_size", peer_configs.SIZE),
        "num_layers": fields.take("num_hidden_layers", peer_configs.COUNT),
        "num_heads": fields.take("num_attention_heads", peer_configs.COUNT),
    }


def _video_sizes(
    fields: peer_configs.Fields, num_frames: str, size: str
) -> dict[str, Any]:
    """Returns the sizes of video networks; two of them have different names in each."""
    pixels = fields.take("patch_size", peer_configs.COUNT)
    return _sizes(fields) | {
        "num_frames": fields.take(num_frames, peer_configs.COUNT),
        "size": fields.take(size, peer_configs.SIZE),
        "patch": (fields.take("tubelet_size", peer_configs.COUNT), pixels, pixels),
        "activation": fields.take("hidden_act", _ACTIVATION),
        "eps": fields.take("layer_norm_eps", _EPS),
    }


def _videomae_config(theirs: Mapping[str, Any], tensors) -> vit.Config:
    fields = _fields(theirs, "VideoMAE")
    # Only a classifier has a norm after the mean; without one the tokens are normed.
    after_mean = "fc_norm.weight" in tensors
    return vit.Config(
        **_video_sizes(fields, "num_frames", "image_size"),
        mlp_dim=fields.take("intermediate_size", peer_configs.SIZE),
        norm_out="videomae.layernorm.weight" in tensors,
        pool_norm=after_mean,
        pool_eps=1e-5,
    )


def _vjepa_config(theirs: Mapping[str, Any]) -> vit.Config:
    fields = _fields(theirs, "V-JEPA 2")
    sizes = _video_sizes(fields, "frames_per_clip", "crop_size")
    return vit.Config(
        **sizes,
        mlp_dim=int(sizes["dim"] * fields.take("mlp_ratio", _FACTOR)),
        positions="rotation",
        key_bias=True,
        norm_out=True,
        pool="query",
        pool_norm=False,
        pool_layers=fields.take("num_pooler_layers", peer_configs.COUNT),
        pool_projection=False,
        pool_eps=sizes["eps"],
    )


def _clip_configs(theirs: Mapping[str, Any]) -> tuple[vit.Config, vit.TextConfig]:
    fields = _fields(theirs, "CLIP")
    picture, text = (
        _fields(fields.take(f"{half}_config", _SECTION), "CLIP")
        for half in ("vision", "text")
    )
    width = fields.take("projection_dim", peer_configs.SIZE)

    def shared(half: peer_configs.Fields) -> dict[str, Any]:
        return _sizes(half) | {
            "mlp_dim": half.take("intermediate_size", peer_configs.SIZE),
            "activation": half.take("hidden_act", _ACTIVATION, "quick_gelu"),
            "eps": half.take("layer_norm_eps", _EPS, 1e-5),
        }

    of_picture = shared(picture)
    pixels = picture.take("patch_size", peer_configs.COUNT)
    vision_config = vit.Config(
        **of_picture,
        num_frames=1,
        size=picture.take("image_size", peer_configs.SIZE),
        patch=(1, pixels, pixels),
        positions="table",
        key_bias=True,
        patch_bias=False,
        norm_in=True,
        pool="class",
        projection=width,
        pool_eps=of_picture["eps"],
    )
    # Older configs have 2, which is not CLIP's end token; that is the last id.
    end = text.take("eos_token_id", _END, 2)
    size = text.take("vocab_size", peer_configs.SIZE)
    return vision_config, vit.TextConfig(
        **shared(text),
        vocab_size=size,
        length=text.take("max_position_embeddings", peer_configs.SIZE),
        projection=width,
        end=size - 1 if end == 2 else end,
    )


def read_transformers(
    theirs: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[Any, exchange.Tree]]]:
    """Reads a folder of transformers: VideoMAE, V-JEPA 2 with its pooler, or CLIP.

    Tensors that no feature needs are skipped: classifiers, V-JEPA's predictor, CLIP's
    scale.

    Args:
      theirs: the folder's config.json.
      tensors: the folder's tensors by name.

    Returns:
      The kind of network ("videomae", "vjepa" or "clip"), and the config and the
      parameters of each of its parts ("video", for CLIP "vision" and "text").

    Raises:
      ValueError: another kind of model, a field of the config that is missing or wrong,
        or tensors that are missing, unexpected or of another shape; it names all.
    """
    kind = theirs.get("model_type")
    unused = ("classifier.", "vjepa2.predictor.", "logit_scale")
    tensors = {
        name: array
        for name, array in tensors.items()
        if not name.startswith(unused) and not name.endswith(".position_ids")
    }
    if kind == "videomae":
        tensors = {
            re.sub(r"\.([qv])_bias$", _bias_name, name): array
            for name, array in tensors.items()
        }
        if not any(name.startswith("videomae.") for name in tensors):
            tensors = {f"videomae.{name}": array for name, array in tensors.items()}
        config = _videomae_config(theirs, tensors)
        return kind, {"video": (config, VIDEOMAE.restore(tensors, config))}
    if kind == "vjepa2":
        config = _vjepa_config(theirs)
        return "vjepa", {"video": (config, VJEPA.restore(tensors, config))}
    if kind == "clip":
        text = {n: a for n, a in tensors.items() if n.startswith("text_")}
        rest = {n: a for n, a in tensors.items() if n not in text}
        vision_config, text_config = _clip_configs(theirs)
        return kind, {
            "vision": (vision_config, CLIP_VISION.restore(rest, vision_config)),
            "text": (text_config, CLIP_TEXT.restore(text, text_config)),
        }
    raise ValueError(f"model_type is {kind!r}; it must be videomae, vjepa2 or clip")


def _bias_name(match: re.Match) -> str:
    return {"q": ".query.bias", "v": ".value.bias"}[match[1]]
