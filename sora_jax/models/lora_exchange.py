"""Adapters of a denoiser in the names and layouts of a LoRA file for diffusers.

`WanPipeline.load_lora_weights` reads, for each layer with an adapter, two matrices:

    transformer.blocks.0.attn1.to_q.lora_A.weight  [rank, in]
    transformer.blocks.0.attn1.to_q.lora_B.weight  [out, rank]

and adds scale B A to its weight. The scale is 1 unless the file's metadata say otherwise,
so that ours is multiplied into B. Ours are models/lora.py's: A [in, rank], B [rank, out],
both stacked over the blocks.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.core import trees
from sora_jax.models import dit, exchange

_PREFIX = "transformer."
_NAME = re.compile(r"(?:transformer\.)?(.+)\.lora_([AB])\.weight")
_METADATA = "lora_adapter_metadata"
_WHAT = "adapters of WanTransformer3DModel"
# Variants of LoRA, by their name in the metadata, that compute something else.
_VARIANTS = ("use_dora", "use_rslora", "lora_bias")
# Their name of a layer, the rank of its adapter -> the scale.
Scale = Callable[[str, int], float]


def _kernels(config: dit.Config) -> dict[str, exchange.Entry]:
    """The weight of each layer that can have an adapter, by their name of the layer."""
    return {
        entry.theirs.removesuffix(".weight"): entry
        for entry in exchange.TRANSFORMER.entries(config)
        if entry.ours.endswith(".kernel")
    }


def _adapter_of(kernel: exchange.Entry) -> str:
    return f"{kernel.ours.removesuffix('.kernel')}.adapter"


def _pair(layer: str, kernel: exchange.Entry, rank: int) -> Iterator[exchange.Entry]:
    """The places of A and B. A convolution's B is one of 1 x 1 x 1."""
    theirs, ours = f"{_PREFIX}{layer}", _adapter_of(kernel)
    split = kernel.split and (*kernel.split[:-1], rank)
    at = {"layer": kernel.layer}
    yield exchange.Entry(
        f"{theirs}.lora_A.weight", f"{ours}.a", kernel.axes, split=split, **at
    )
    ones = (0, len(kernel.axes) - 2)
    yield exchange.Entry(f"{theirs}.lora_B.weight", f"{ours}.b", (1, 0), ones, **at)


def export(adapters: Mapping, config: dit.Config, scale: float) -> exchange.Flat:
    """Our adapters as theirs, float32.

    Args:
      adapters: of a denoiser, nested dicts.
      config: of the denoiser.
      scale: of the adapters; see `lora.Config`.

    Raises:
      ValueError: a layer with an adapter is one that WanTransformer3DModel lacks.
    """
    ours, theirs = trees.flatten(adapters), {}
    kernels = _kernels(config)
    known = {_adapter_of(kernel) for kernel in kernels.values()}
    beyond = sorted({path.rpartition(".")[0] for path in ours} - known)
    if beyond:
        names = ", ".join(name.removesuffix(".adapter") for name in beyond)
        raise ValueError(f"a LoRA file for diffusers has no adapters of {names}")
    for layer, kernel in kernels.items():
        adapter = _adapter_of(kernel)
        if f"{adapter}.a" not in ours:
            continue
        a, b = (np.asarray(ours[f"{adapter}.{matrix}"], np.float32) for matrix in "ab")
        places = _pair(layer, kernel, a.shape[-1])
        for place, array in zip(places, (a, np.float32(scale) * b), strict=True):
            theirs[place.theirs] = place.export(array)
    return theirs


def restore(flat: Mapping[str, Any], config: dit.Config, scale: Scale) -> dict:
    """Their adapters as ours, float32, for a scale of 1.

    Layers of a block that the file lacks in some blocks have adapters of zeros there, and
    smaller ranks are filled up with zeros.

    Args:
      flat: their tensors by name.
      config: of the denoiser.
      scale: of each layer's adapter.

    Raises:
      ValueError: tensors have no place, or are missing or of another shape.
    """
    kernels, pairs, unexpected = _kernels(config), {}, set()
    shapes = trees.flatten(exchange.TRANSFORMER.shapes(config))
    for name in flat:
        match = _NAME.fullmatch(name)
        if match and match[1] in kernels:
            pairs.setdefault(match[1], {})[match[2]] = np.asarray(flat[name], "f4")
        else:
            unexpected.add(name)
    missing = {
        f"{layer}.lora_{one}.weight"
        for layer, pair in pairs.items()
        for one in "AB"
        if one not in pair
    }
    wrong, stacked = {}, {}
    for layer, pair in pairs.items() if not missing else ():
        rank = pair["B"].shape[1] if pair["B"].ndim > 1 else 0
        if not rank:
            wrong[layer] = f"{layer}.lora_B.weight {pair['B'].shape}"
            continue
        kernel = kernels[layer]
        *before, i, o = shapes[kernel.ours].shape
        sizes = (*before, i, rank), (*before, rank, o)
        factors = 1.0, scale(layer, rank)
        places = _pair(layer, kernel, rank)
        for one, place, size, factor in zip("AB", places, sizes, factors, strict=True):
            if (theirs := place.their_shape(size)) != pair[one].shape:
                name = f"{layer}.lora_{one}.weight"
                wrong[name] = f"{name} {pair[one].shape} instead of {theirs}"
                continue
            rows = stacked.setdefault(place.ours, {})
            rows[place.layer] = np.float32(factor) * place.view(pair[one], size)
    exchange.check_fit(_WHAT, wrong, missing, unexpected)
    if not pairs:
        raise ValueError(f"there are no {_WHAT}")
    return _nested(
        {path: _filled(path, rows, config) for path, rows in stacked.items()}
    )


def _filled(path: str, rows: Mapping[int | None, np.ndarray], config) -> np.ndarray:
    """One array of all blocks, with zeros where a row or a part of its rank is missing."""
    if None in rows:
        return rows[None]
    axis = 1 if path.endswith(".a") else 0
    size = list(next(iter(rows.values())).shape)
    size[axis] = max(row.shape[axis] for row in rows.values())
    whole = np.zeros((config.num_layers, *size), np.float32)
    for layer, row in rows.items():
        whole[layer][tuple(map(slice, row.shape))] = row
    return whole


def _nested(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, array in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def scales(metadata: Mapping[str, str] | None) -> Scale:
    """The scale of each layer's adapter: alpha / rank, or 1 where no alpha is stored.

    Args:
      metadata: of a file, in which diffusers stores peft's config as JSON.

    Raises:
      ValueError: the metadata are damaged, or say that this is another kind of adapter.
    """
    text = (metadata or {}).get(_METADATA)
    if text is None:
        return lambda layer, rank: 1.0
    try:
        fields = {k.removeprefix(_PREFIX): v for k, v in json.loads(text).items()}
        alpha = float(fields["lora_alpha"])
        patterns = {
            pattern.removeprefix("^"): float(value)
            for pattern, value in (fields.get("alpha_pattern") or {}).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{_METADATA} is damaged: {error!r}") from None
    if used := [name for name in _VARIANTS if fields.get(name)]:
        raise ValueError(f"{_METADATA} has {used[0]}, which is not implemented")

    def scale(layer: str, rank: int) -> float:
        for pattern, value in patterns.items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                return value / rank
        return alpha / rank

    return scale
