"""Estimates the cost of calls from configs alone, without reading weights."""

import dataclasses
import math
import operator
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import paths
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import samplers
from sora_jax.generation import cache_calibration, plans, runs, wan
from sora_jax.generation import request as requests
from sora_jax.models import attention, lora, video_vae
from sora_jax.models import dit as dits
from sora_jax.training import adapters, checkpoint, cost, lora_files, pretrained

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class _Model:
    settings: requests.Settings
    tokenizer: tokenizers.Tokenizer
    dit: dits.Config
    vae: video_vae.Config
    weight_bytes: dict[str, int]  # as stored, by component


def _open(folder: pathlib.Path, strict: bool) -> _Model:
    if pretrained.is_folder(folder):
        opened = pretrained.open_folder(folder, strict=strict)
        parts = opened.components
        return _Model(
            wan.settings(opened),
            wan.read_tokenizer(opened),
            parts["transformer"].config,
            parts["vae"].config,
            {name: component.nbytes for name, component in parts.items()},
        )
    config = runs.read_config(folder)
    tokenizer = runs.load_tokenizer(folder, config)
    dit_config = configs.build(dits.Config, config.model.dit, "model.dit")
    sizes = checkpoint.networks_in(folder)
    if lora.PART in sizes:
        sizes["dit"] = adapters.base(folder, dit_config, strict=strict).nbytes
    vae = pretrained.open_component(folder / "vae", "vae", strict=strict)
    frozen = runs.frozen_text_encoder(folder, config, tokenizer, strict=strict)
    if frozen is not None:
        sizes["text_encoder"] = frozen.nbytes
    sizes["vae"] = vae.nbytes
    return _Model(
        runs.settings(config),
        tokenizer,
        dit_config,
        vae.config,
        sizes,
    )


def report(
    folder: str | pathlib.Path,
    calls: Sequence[Mapping],
    *,
    loras: Sequence[str | pathlib.Path] = (),
    strict: bool = False,
) -> str:
    """Checks calls, and describes the cost of each kind of clip.

    Args:
      folder: of the model.
      calls: arguments of `Pipeline.__call__`, for one clip each.
      loras: files of adapters, which are only checked: merged ones cost nothing.
      strict: see `Pipeline.from_pretrained`.

    Raises:
      FileNotFoundError, ValueError: as `from_pretrained` and a call do.
    """
    folder = paths.model(folder)
    model = _open(folder, strict)
    for file in loras:
        lora_files.read(file, model.dit)
    strides = requests.strides_of(model.vae, model.dit)
    calibration = folder / cache_calibration.FILE
    kinds: dict[str, int] = {}
    for call in calls:
        request = requests.check(model.settings, strides, **call)
        requests.check_lengths(
            request,
            lambda text: len(model.tokenizer.ids(text)),
            model.settings.text_length,
        )
        drawn = requests.RANDOM in np.atleast_1d(call.get("seed", 0)).tolist()
        text = _describe(model, request, drawn)
        if request.step_cache:
            calibration = cache_calibration.read(calibration)
            calibration.check_sampling(request)
            text += f"\n{calibration.describe(request.step_cache)}"
        kinds[text] = kinds.get(text, 0) + 1
    weights = sum(model.weight_bytes.values())
    lines = [
        f"model {folder}: {weights / _GIB:.2f} GiB of weights ("
        + ", ".join(f"{n} {b / _GIB:.2f}" for n, b in model.weight_bytes.items())
        + ")"
    ]
    for text, count in kinds.items():
        lines.append(f"{count} clip{'s' * (count != 1)} like this (estimates):\n{text}")
    return "\n".join(lines)


def _describe(model: _Model, request: requests.Request, drawn: bool) -> str:
    t, h, w, c = model.vae.latent_shape(
        request.num_frames, request.height, request.width
    )
    tokens = t * h * w // math.prod(model.dit.patch)
    scales = request.guidance_scale, request.guidance_scale_2
    parts = plans.plans(
        dataclasses.replace(request, step_cache=0.0), model.settings, None
    )
    passes = [
        int(samplers.evaluation_mask(request.sampler, part).sum()) for part in parts
    ]
    branches = [1 + (scale != 1) for scale in scales[: len(parts)]]
    if request.images is not None and request.given_scale != 1:
        branches = [3] * len(parts)
    forward = cost.dit_forward_flops(model.dit, tokens, model.settings.text_length)
    evaluations = sum(map(operator.mul, passes, branches))
    rows = request.batch_size * max(branches)
    platform = jax.default_backend()
    dtype = "bfloat16" if platform != "cpu" else model.dit.dtype
    width = jnp.dtype(dtype).itemsize
    stream = rows * tokens * (8 * model.dit.dim + 2 * model.dit.mlp_dim) * width
    shape = rows, tokens, model.dit.num_heads, model.dit.head_dim
    queries, text = jax.ShapeDtypeStruct(shape, dtype), model.settings.text_length
    workspace = max(  # of self-attention and of cross-attention, one after the other
        attention.workspace_bytes(queries, tokens, False, platform),
        attention.workspace_bytes(queries, text, model.dit.mask_text, platform),
    )
    settings = {
        name: getattr(request, name)
        for name in ("prompts", "negative_prompts", "seeds", "fps", "sampler", "shift")
    }
    if drawn:
        settings["seeds"] = "random"
    lines = [f"  {name} {value}" for name, value in settings.items()]
    lines += [
        f"  {request.num_frames} frames of {request.width} x {request.height}",
        f"  {request.num_inference_steps} steps, guidance {request.guidance_scale:g}"
        + (f" and {request.guidance_scale_2:g}" if request.guidance_scale_2 else ""),
        f"  latents {t} x {h} x {w} x {c}, {tokens} tokens; prompt "
        f"{len(model.tokenizer.ids(request.prompts[0]))} of "
        f"{model.settings.text_length} text tokens",
        f"  {forward / 1e12:.3g} TFLOP a pass, {evaluations} passes: "
        f"{forward * evaluations / 1e12:.4g} TFLOP a clip",
        f"  memory beside the weights, {request.batch_size} clips at a time: "
        f"{(stream + workspace) / _GIB:.2f} GiB on one device, {workspace / _GIB:.2f} of "
        f"it for attention on {platform.upper()}",
    ]
    return "\n".join(lines)
