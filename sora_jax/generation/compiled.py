"""The compiled functions of the pipeline; networks are passed as graph and state.

Letters: b clips of a batch, t, h, w time, height and width (of latents or of video), c
channels, l text tokens, d text width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.diffusion import guidance, known, samplers, step_cache
from sora_jax.models import dit as dits


@functools.partial(jax.jit, static_argnames="shape")
def draw_noise(keys_b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws one clip's noise per key; the values do not depend on batch or mesh."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_b)
    return sharding.reshard(noise, "batch", *(None,) * len(shape))


@functools.partial(jax.jit, static_argnames="graph")
def encode_text(graph, state, ids_bl, mask_bl) -> jax.Array:
    """Encodes token ids and their mask to states [b, l, d]."""
    return nnx.merge(graph, state)(ids_bl, mask_bl)


@functools.partial(jax.jit, static_argnames="graph")
def encode_video(graph, state, video_bthwc) -> jax.Array:
    """Encodes video in [-1, 1] to normalised latent means."""
    vae = nnx.merge(graph, state)
    mean_bthwc, _ = vae.encode(video_bthwc)
    return vae.normalize(mean_bthwc)


@functools.partial(jax.jit, static_argnames="graph")
def decode_video(graph, state, latents_bthwc) -> jax.Array:
    """Decodes normalised latents to video, float32 in [0, 1]."""
    vae = nnx.merge(graph, state)
    video_bthwc = vae.decode(vae.denormalize(latents_bthwc))
    return jnp.clip(video_bthwc.astype(jnp.float32) / 2 + 0.5, 0, 1)


@functools.partial(jax.jit, static_argnames=("config", "rows", "grid", "slots"))
def start_cache(config: dits.Config, rows: int, grid: tuple[int, int, int], slots=0):
    """An empty step cache.

    Args:
      config: the denoiser's.
      rows: of a batch, including both branches of guidance.
      grid: the latents' time, height and width.
      slots: number of evaluations whose change of the residual is recorded.
    """
    tokens = sharding.padded_size(math.prod(grid) // math.prod(config.patch), "tokens")
    residual_bnd = jnp.zeros((rows, tokens, config.dim), config.dtype)
    cache = {"residual": sharding.reshard(residual_bnd, "batch", "tokens", None)}
    if slots:
        cache["changes"] = sharding.replicate(jnp.zeros((slots, rows, 3)))
    return cache


@functools.partial(jax.jit, static_argnames=("graph", "sampler", "guided"))
def denoise_chunk(
    graph,
    state,
    x_bthwc,
    memory,
    steps,
    text,
    null,
    fixed,
    scale,
    fps,
    known_tau,
    *,
    sampler: str,
    guided: bool,
    cache=None,
    rescale=None,
):
    """Runs some solver steps; returns x, the solver's memory and the step cache.

    Args:
      fixed: (known_bthw, values_bthwc), or None.
      scale, rescale: of guidance, see `guidance.guided`.
      cache: from `start_cache` or the chunk before, if the steps have rows for it.
      The others are described in `diffusion/samplers.py`.
    """
    dit = nnx.merge(graph, state)
    known_bthw, values_bthwc = (None, None) if fixed is None else fixed
    condition, empty = text | {"known": known_bthw}, null | {"known": known_bthw}

    def velocity(x, level, condition, cache=None, step=None):
        x, condition = jax.tree.map(
            lambda a: sharding.reshard(a, "batch", *(None,) * (a.ndim - 1)),
            (x, condition),
        )
        tau_b = sharding.reshard(jnp.full(x.shape[:1], level), "batch")
        is_known, levels_bk = condition["known"], tau_b[:, None]
        if is_known is not None:
            levels_bk, _ = known.levels(tau_b, is_known, known_tau)
            is_known = is_known.astype(jnp.float32)
        reuse = None
        if cache is not None:
            gain_b = jnp.tile(step["gain"], x.shape[0] // len(step["gain"]))
            gain_b = sharding.reshard(gain_b, "batch")
            reuse = dits.Reuse(cache["residual"], step["reuse"] > 0, gain_b)
        found = dit.apply_video(
            x, levels_bk, is_known, condition["states"], condition["mask"], fps, reuse
        )
        if cache is None:
            return found
        found, residual_bnd = found
        kept = {"residual": residual_bnd}
        if "changes" in cache:
            change_b3 = step_cache.change(cache["residual"], residual_bnd)
            here = jnp.arange(len(cache["changes"])) == step["slot"]
            kept["changes"] = jnp.where(
                here[:, None, None], sharding.replicate(change_b3), cache["changes"]
            )
        return found, kept

    velocity = guidance.guided(
        velocity, condition, empty, scale if guided else 1, rescale, known_bthw
    )
    return samplers.sample_chunk(
        velocity, x_bthwc, memory, steps, known_bthw, values_bthwc, sampler, cache
    )
