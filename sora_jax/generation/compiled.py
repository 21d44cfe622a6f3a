"""The compiled parts of a pipeline: pure functions of networks, as graph and state.

Letters: b clips of a batch, t, h, w time, height and width (of latents or of video), c
channels, l text tokens, d text width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.diffusion import guidance, known, samplers


@functools.partial(jax.jit, static_argnames="shape")
def draw_noise(keys_b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One clip's noise for each key: the values do not depend on batch or mesh."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_b)
    return sharding.reshard(noise, "batch", *(None,) * len(shape))


@functools.partial(jax.jit, static_argnames="graph")
def encode_text(graph, state, ids_bl, mask_bl) -> jax.Array:
    """Token ids and their mask to states [b, l, d]."""
    return nnx.merge(graph, state)(ids_bl, mask_bl)


@functools.partial(jax.jit, static_argnames="graph")
def encode_video(graph, state, video_bthwc) -> jax.Array:
    """Video in [-1, 1] to normalised latent means."""
    vae = nnx.merge(graph, state)
    mean_bthwc, _ = vae.encode(video_bthwc)
    return vae.normalize(mean_bthwc)


@functools.partial(jax.jit, static_argnames="graph")
def decode_video(graph, state, latents_bthwc) -> jax.Array:
    """Normalised latents to video, float32 in [0, 1]."""
    vae = nnx.merge(graph, state)
    video_bthwc = vae.decode(vae.denormalize(latents_bthwc))
    return jnp.clip(video_bthwc.astype(jnp.float32) / 2 + 0.5, 0, 1)


@functools.partial(jax.jit, static_argnames=("graph", "sampler", "guided"))
def denoise_chunk(
    graph, state, x_bthwc, memory, steps, text, null, given, scale, fps, known_tau,
    *, sampler: str, guided: bool,
):  # fmt: skip
    """Runs some solver steps; `given` is (known_bthw, values_bthwc) or None."""
    dit = nnx.merge(graph, state)
    known_bthw, values_bthwc = (None, None) if given is None else given
    condition, empty = text | {"known": known_bthw}, null | {"known": known_bthw}

    def velocity(x, level, condition):
        tau_b = sharding.reshard(jnp.full(x.shape[:1], level), "batch")
        is_known, levels_bk = condition["known"], tau_b[:, None]
        if is_known is not None:
            levels_bk, _ = known.levels(tau_b, is_known, known_tau)
            is_known = is_known.astype(jnp.float32)
        return dit.apply_video(
            x, levels_bk, is_known, condition["states"], condition["mask"], fps
        )

    velocity = guidance.guided(velocity, condition, empty, scale if guided else 1)
    return samplers.sample_chunk(
        velocity, x_bthwc, memory, steps, known_bthw, values_bthwc, sampler
    )
