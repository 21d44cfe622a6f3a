"""How a request is computed: the solver's steps, and how many clips at a time."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from sora_jax.core import sharding
from sora_jax.diffusion import samplers, step_cache, timesteps
from sora_jax.generation import cache_calibration
from sora_jax.generation import request as requests


def solver(
    settings: requests.Settings,
    sampler: str,
    steps: int,
    shift: float,
    first: float = 1.0,
):
    """The plan of a solver's steps, at the noise levels of the model's schedule.

    Args:
      settings: the model's.
      sampler, steps, shift: arguments of the call.
      first: the highest level. The levels of diffusers' schedulers are those of all
        steps, of which the ones above it are left out, as in its video to video.
    """
    if settings.levels == "diffusers":
        taus, levels = timesteps.diffusers_schedule(sampler, steps, shift)
        above = min(int(np.sum(taus[:-1] > np.float32(first))), steps - 1)
        taus, levels = taus[above:], levels[above:]
    else:
        taus, levels = timesteps.schedule(steps, shift, first), None
    return samplers.plan(sampler, taus, levels)


def plans(
    request: requests.Request,
    settings: requests.Settings,
    calibration: cache_calibration.Calibration | None,
    first: float = 1.0,
) -> list[samplers.Plan]:
    """The plan of the one denoiser, or of the first and the second expert.

    Args:
      request: the call.
      settings: the model's.
      calibration: used if the request has a step cache.
      first: the highest level; see `solver`.
    """
    steps = request.num_inference_steps
    plan = solver(settings, request.sampler, steps, request.shift, first)
    parts = [plan]
    if settings.boundary is not None:
        # The first expert's levels come first: they fall from step to step.
        first = int(np.sum(plan["level"] >= np.float32(settings.boundary)))
        parts = samplers.split(plan, first)
    if not request.step_cache:
        return [*parts]
    of_cache = calibration.rows(request, parts)
    return [part | rows for part, rows in zip(parts, of_cache, strict=True)]


def restart(
    sampler: str, parts: Sequence[samplers.Plan], done: int
) -> list[samplers.Plan]:
    """The plans of the experts for latents that were changed after `done` steps.

    The solver and the step cache restart from them.
    """
    names = parts[0].keys() - samplers.OF_CACHE
    whole = {n: np.concatenate([part[n] for part in parts]) for n in names}
    rest = samplers.restart(sampler, {n: rows[done:] for n, rows in whole.items()})
    whole = {n: np.concatenate([whole[n][:done], rest[n]]) for n in names}
    changed, first = [], 0
    for part in parts:
        last = first + len(part["tau"])
        part = part | {n: rows[first:last] for n, rows in whole.items()}
        if "reuse" in part and first < done < last:
            behind = done - first
            fresh = {n: rows[behind:] for n, rows in part.items()}
            fresh = step_cache.restart(sampler, fresh)
            part = {n: np.concatenate([part[n][:behind], fresh[n]]) for n in part}
        changed.append(part)
        first = last
    return changed


def sizes(request: requests.Request) -> tuple[int, int]:
    """Clips that are denoised at a time, and the rows that pad them to the mesh.

    With guidance a clip is two rows of the denoiser, which may be on two devices, so one
    clip occupies two devices.
    """
    mesh = jax.sharding.get_mesh()
    ways = 1 if mesh.empty else sharding.logical_axis_size(mesh, "batch")
    is_guided = 1 not in (request.guidance_scale, request.guidance_scale_2)
    is_guided &= request.given_scale == 1  # guidance by what is given has three rows
    least = ways // 2 if is_guided and ways % 2 == 0 else ways
    size = math.ceil(request.batch_size / least) * least
    return size, math.ceil(size / ways) * ways
