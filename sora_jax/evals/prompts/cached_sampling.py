"""Calibrates a model's step cache, and measures its loss of quality.

The ratios are recorded while every evaluation is computed. Then the same clips are sampled
with the cache at a few thresholds, and compared.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sora_jax.core import paths, progress
from sora_jax.diffusion import step_cache
from sora_jax.evals.metrics import reconstruction
from sora_jax.generation import cache_calibration, pipeline, placement, plans
from sora_jax.generation import request as requests

THRESHOLDS = (0.03, 0.06, 0.1, 0.2, 0.4)


def calibrate(
    pipe: pipeline.Pipeline,
    *,
    max_skips: int = step_cache.MAX_SKIPS,
    retention: float = step_cache.RETENTION,
    thresholds: Sequence[float] = THRESHOLDS,
    note: Callable[[int], None] | None = None,
    **arguments,
) -> cache_calibration.Calibration:
    """Measures a model on the clips of a call, and sets the pipeline's calibration.

    Args:
      pipe: the model, under its mesh.
      max_skips, retention: see `diffusion/step_cache.py`.
      thresholds: at which videos are compared.
      note: takes the number of clip steps that were computed.
      **arguments: of a call of the pipeline; a few prompts are enough.

    Raises:
      ValueError: as the call would; or with images, or if one of two experts has no
        step.
    """
    request = pipe.check_inputs(**arguments | {"step_cache": 0.0})
    arguments["seed"] = request.seeds  # the same noise again, also for random seeds
    if request.images is not None:
        raise ValueError("a step cache is calibrated on text only, without --image")
    if not all(len(p["tau"]) for p in plans.plans(request, pipe.settings, None)):
        raise ValueError("with these steps and this shift one expert has no step")
    videos, changes = [], []
    for rows in pipe.batches(request):
        latents_bthwc, change_er3 = _measure(pipe, request, rows)
        real = len(set(rows))
        frames = placement.to_host(pipe.decode_latents(latents_bthwc))
        videos.append(frames[:real])
        changes.append([stage[:, :, :real] for stage in change_er3])
        if note:
            note(real * request.num_inference_steps)
    dense = np.concatenate(videos)
    # Means over clips, for each expert: [evaluation, branch, 3].
    means = [np.concatenate(stage, 2).mean(2) for stage in zip(*changes, strict=True)]
    for mean_er3 in means:
        mean_er3[0] = 1.0, 0.0, 0.0  # no earlier evaluation
    tables = [
        tuple(tuple(map(tuple, mean_er3[..., i].tolist())) for mean_er3 in means)
        for i in range(3)
    ]
    made = cache_calibration.Calibration(
        model=cache_calibration.model_of(pipe.source),
        sampling=cache_calibration.sampling_of(request),
        clips={
            "clips": len(request),
            "num_frames": request.num_frames,
            "height": request.height,
            "width": request.width,
        },
        max_skips=max_skips,
        retention=retention,
        ratio=tables[0],
        deviation=tables[1],
        distance=tables[2],
    )
    pipe.calibration = made
    for threshold in sorted(thresholds):
        same = [one for one in made.quality if made.alike(one.threshold, threshold)]
        if same:
            quality = dataclasses.replace(same[0], threshold=threshold)
            if note:
                note(len(request) * request.num_inference_steps)
        else:
            cached = pipe(**arguments | {"step_cache": threshold}, progress=note).frames
            psnr_n = reconstruction.psnr(dense, cached)
            ssim = float(np.mean(reconstruction.ssim(dense, cached)))
            scores = float(psnr_n.mean()), float(psnr_n.min()), ssim
            quality = cache_calibration.Quality(
                threshold, *made.counts(threshold), *scores
            )
        made = dataclasses.replace(made, quality=(*made.quality, quality))
    pipe.calibration = made
    return made


def run(pipe: pipeline.Pipeline, kinds: int, **arguments) -> str:
    """Calibrates a model, writes the file into its folder, and returns the text to print.

    Args:
      pipe: the model, read from its folder.
      kinds: number of kinds of clips in the call; must be 1.
      **arguments: of a call of the pipeline.

    Raises:
      ValueError: more kinds, a model without a folder, or as `calibrate`.
      OSError: the folder cannot be written to.
    """
    if kinds > 1:
        raise ValueError("a step cache is calibrated on clips of one kind")
    arguments["step_cache"] = 0.0
    path, request = pipe.calibration, pipe.check_inputs(**arguments)
    if not isinstance(path, pathlib.Path):
        raise ValueError("the model has no folder for its calibration")
    paths.check_writable(path)
    process, steps = jax.process_index(), request.num_inference_steps
    total = (1 + len(THRESHOLDS)) * len(request) * steps
    with progress.Progress(
        total, "calibrate", "clip steps", process_index=process
    ) as bar:
        made = calibrate(pipe, note=bar.update, **arguments)
    if process == 0:
        made.save(path)
    return "\n".join([*map(made.describe, THRESHOLDS), f"written: {path}"])


def _measure(pipe: pipeline.Pipeline, request: requests.Request, rows: list[int]):
    """Returns latents without a cache, and for each expert the changes [e, branch, b, 3]."""
    text, null = pipe.encode_prompt(request, rows)
    x_bthwc, _ = pipe.prepare_latents(request, rows)
    changes = []

    def record(branches: int, cache: dict) -> None:
        changes_eb3 = placement.to_host(cache["changes"]).astype(np.float64)
        e, b, _ = changes_eb3.shape
        changes_eb3 = changes_eb3.reshape(e, b // branches, branches, 3)
        changes.append(changes_eb3.transpose(0, 2, 1, 3))

    return pipe.denoise(request, rows, text, null, x_bthwc, record=record), changes
