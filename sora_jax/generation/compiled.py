"""The compiled functions of the pipeline; networks are passed as graph and state.

Letters: b clips of a batch, t, h, w time, height and width (of latents or of video), c
channels, n tokens, k noise levels, l text tokens, d text width.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.diffusion import flow, guidance, samplers, step_cache
from sora_jax.generation import given as givens
from sora_jax.models import dit as dits
from sora_jax.models import patches, rows


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


@functools.partial(jax.jit, static_argnames="config")
def start_rows(
    config: dits.Config,
    noise_bthwc,
    text: Mapping,
    fps,
    known_tau,
    given: givens.Given = givens.Given(),
    beside_noises=(),
    latents_bthwc=None,
    level=1.0,
) -> rows.Rows:
    """The rows from which the solver starts: noise, and known tokens at their level.

    Args:
      config: the denoiser's.
      noise_bthwc: of the whole video.
      text: {"states": bld, "mask": bl}.
      fps: frames per second.
      known_tau: the noise level of known tokens.
      given: what the task gives besides text.
      beside_noises: noise of each part of what it gives beside the video.
      latents_bthwc: clean latents that are noised to the first level, instead of noise.
      level: the first level, of these and of known latents that are blended.
    """
    b = len(noise_bthwc)
    levels_bk, known_bn, start_bthwc = jnp.ones((b, 1)), None, noise_bthwc
    if latents_bthwc is not None:
        start_bthwc = flow.interpolate(latents_bthwc, noise_bthwc, level)
    if given.known_bthw is not None and given.blended:
        given_bthwc = flow.interpolate(given.latents_bthwc, noise_bthwc, level)
        start_bthwc = jnp.where(given.known_bthw[..., None], given_bthwc, start_bthwc)
    elif given.known_bthw is not None:
        known_bn = rows.known_tokens(given.known_bthw, config.patch)
        given_bthwc = flow.interpolate(given.latents_bthwc, noise_bthwc, known_tau)
        # Tokens of which only a part is known are noise, as in training.
        part_bnp = jnp.repeat(known_bn[..., None], math.prod(config.patch), axis=-1)
        whole_bthw1 = rows.to_video(part_bnp, start_bthwc.shape[1:4], config.patch)
        start_bthwc = jnp.where(whole_bthw1, given_bthwc, start_bthwc)
    beside = [
        dataclasses.replace(
            one, latents_bthwc=flow.interpolate(one.latents_bthwc, noise, known_tau)
        )
        for one, noise in zip(given.beside, beside_noises, strict=True)
    ]
    if known_bn is not None or beside:
        levels_bk = jnp.concatenate([levels_bk, jnp.full((b, 1), known_tau)], axis=1)
    return rows.of_video(
        config,
        start_bthwc,
        levels_bk,
        text["states"],
        text["mask"],
        known_bn=known_bn,
        fps=fps,
        start=given.start,
        beside=beside,
        is_loop=given.is_loop,
    )


@functools.partial(jax.jit, static_argnames="config")
def path_of(config: dits.Config, given: givens.Given, noise_bthwc) -> dict:
    """What keeps known latents x0 on the straight path from their noise, in tokens.

    The velocity of (1 - tau) x0 + tau noise is noise - x0, and every solver follows a
    straight path exactly. So the latents stay what blended diffusion sets them to after
    each step (arXiv 2201.09865, 2206.02779).

    Returns:
      {"velocity": bnc, "known": bool bnc}; a token may be known in part.
    """
    known_bthwc = jnp.broadcast_to(given.known_bthw[..., None], noise_bthwc.shape)
    velocity_bthwc = flow.velocity(given.latents_bthwc, noise_bthwc)
    return {
        name: patches.patchify(sharding.reshard_like(x, noise_bthwc), config.patch)
        for name, x in (("velocity", velocity_bthwc), ("known", known_bthwc))
    }


@functools.partial(jax.jit, static_argnames=("config", "grid"))
def to_video(config: dits.Config, tokens_bnc: jax.Array, grid) -> jax.Array:
    """The latents [b, t, h, w, c] of rows of one clip each."""
    return rows.to_video(tokens_bnc, grid, config.patch)


@functools.partial(jax.jit, static_argnames="config")
def of_video(config: dits.Config, start: rows.Rows, latents_bthwc) -> jax.Array:
    """The tokens of latents that a caller has changed, but for the known ones."""
    x_bnc = patches.patchify(latents_bthwc, config.patch)
    of_pictures_bnc = start.tokens_bnc[:, x_bnc.shape[1] :]
    return _with_known(start, jnp.concatenate([x_bnc, of_pictures_bnc], axis=1))


def _with_known(start: rows.Rows, x_bnc: jax.Array) -> jax.Array:
    """The tokens of the solver, with given ones as they were at the start."""
    if start.given_bn is None:
        return x_bnc
    return jnp.where(start.given_bn[..., None], start.tokens_bnc, x_bnc)


@functools.partial(jax.jit, static_argnames=("config", "rows", "tokens", "slots"))
def start_cache(config: dits.Config, rows: int, tokens: int, slots=0):
    """An empty step cache.

    Args:
      config: the denoiser's.
      rows: of a batch, including all branches of guidance.
      tokens: of a row.
      slots: number of evaluations whose change of the residual is recorded.
    """
    tokens = sharding.padded_size(tokens, "tokens")
    residual_bnd = jnp.zeros((rows, tokens, config.dim), config.dtype)
    cache = {"residual": sharding.reshard(residual_bnd, "batch", "tokens", None)}
    if slots:
        cache["changes"] = sharding.replicate(jnp.zeros((slots, rows, 3)))
    return cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchor:
    """What is given at first, from which it changes to what the rows have.

    Attributes:
      branches: rows, for each branch of guidance, with the levels of the first step.
      until: the noise level of the video at which the change is over.
    """

    branches: tuple[rows.Rows, ...]
    until: jax.Array


# What branches of guidance may differ in: all but the positions.
_OF_BRANCH = ("tokens_bnc", "levels_bk", "text_bld", "text_mask_bl", "level_index_bn", "roles_bn")  # fmt: skip


def _velocity_of(
    dit: dits.DiT, branches, weights, rescale, anchor: Anchor | None = None
):
    """The guided velocity of rows: (x, level) -> velocity, or with a step cache."""
    start = branches[0]

    def anchored(row: rows.Rows, first: rows.Rows, level) -> rows.Rows:
        """A row with its given tokens on the line between two levels of them."""
        share = jnp.clip((level - anchor.until) / (1 - anchor.until), 0, 1)
        names = ("tokens_bnc", "levels_bk")
        return dataclasses.replace(
            row,
            **{
                name: getattr(row, name)
                + share * (getattr(first, name) - getattr(row, name))
                for name in names
            },
        )

    def velocity(x, level, condition, cache=None, step=None):
        x, condition = jax.tree.map(
            lambda a: sharding.reshard(a, "batch", *(None,) * (a.ndim - 1)),
            (x, condition),
        )
        row = dataclasses.replace(start, **condition["row"])
        if anchor is not None:
            row = anchored(row, dataclasses.replace(row, **condition["first"]), level)
        tau_b1 = sharding.reshard(jnp.full((len(x), 1), level), "batch", None)
        row = dataclasses.replace(
            row,
            tokens_bnc=_with_known(row, x),
            levels_bk=jnp.concatenate([tau_b1, row.levels_bk[:, 1:]], axis=1),
        )
        reuse = None
        if cache is not None:
            gain_b = jnp.tile(step["gain"], x.shape[0] // len(step["gain"]))
            gain_b = sharding.reshard(gain_b, "batch")
            reuse = dits.Reuse(cache["residual"], step["reuse"] > 0, gain_b)
        found = dit(row, reuse)
        found, *residual = (found,) if cache is None else found
        found = sharding.reshard_like(found, x)
        if row.given_bn is not None:
            found = jnp.where(row.given_bn[..., None], 0, found)
        if cache is None:
            return found
        kept = {"residual": residual[0]}
        if "changes" in cache:
            change_b3 = step_cache.change(cache["residual"], residual[0])
            here = jnp.arange(len(cache["changes"])) == step["slot"]
            kept["changes"] = jnp.where(
                here[:, None, None], sharding.replicate(change_b3), cache["changes"]
            )
        return found, kept

    def fields(row: rows.Rows) -> dict:
        return {name: getattr(row, name) for name in _OF_BRANCH}

    conditions = [{"row": fields(row)} for row in branches]
    if anchor is not None:
        conditions = [
            condition | {"first": fields(row)}
            for condition, row in zip(conditions, anchor.branches, strict=True)
        ]
    return guidance.guided(velocity, conditions, weights, rescale, start.given_bn)


def _on_path(velocity, path: Mapping):
    """The velocity with that of known latents in place of the denoiser's own."""

    def kept(x_bnc, level, *cache):
        found = velocity(x_bnc, level, *cache)
        found_bnc, *cache = found if cache else (found,)
        found_bnc = jnp.where(path["known"], path["velocity"], found_bnc)
        return (found_bnc, *cache) if cache else found_bnc

    return kept


def _on_circle(velocity, frames: int, levels_k: jax.Array, done: jax.Array):
    """The velocity of a video that repeats: its latents are rolled while it is computed.

    Step k rolls them by k times `circle_step` latent frames, so that the place where the
    denoiser sees an end is another one at each step (Mobius, arXiv 2502.20307).

    Args:
      velocity: of tokens in the order of time.
      frames: latent frames of the video.
      levels_k: of the steps of this chunk, falling.
      done: number of steps before them.
    """

    def rolled(x_bnc, level):
        step = done + jnp.sum(levels_k > level)
        frame = x_bnc.shape[1] // frames  # tokens of a latent frame
        shift = frame * (step * circle_step(frames) % frames)
        found_bnc = velocity(jnp.roll(x_bnc, -shift, axis=1), level)
        return jnp.roll(found_bnc, shift, axis=1)

    return rolled


def circle_step(frames: int) -> int:
    """Latent frames by which a circle is rolled further at each step.

    Nearly half of it, and without a divisor in common with it, so that every latent
    becomes the first one.
    """
    half = range(1, frames // 2 + 1)
    return max((step for step in half if math.gcd(step, frames) == 1), default=0)


@functools.partial(jax.jit, static_argnames=("graph", "sampler", "circle_frames"))
def denoise_chunk(
    graph,
    state,
    x_bnc,
    memory,
    steps,
    branches,
    weights=(),
    *,
    sampler: str,
    cache=None,
    rescale=None,
    anchor=None,
    path=None,
    circle_frames=None,
    done=0,
):
    """Runs some solver steps; returns x, the solver's memory and the step cache.

    Args:
      x_bnc: tokens at the first step's level.
      branches: rows as `start_rows` gives them, for each branch of guidance; the solver
        moves the generated tokens of the first, at the first of their levels.
      weights, rescale: of guidance, see `guidance.guided`.
      cache: from `start_cache` or the chunk before, if the steps have rows for it.
      anchor: of what is given, if its level falls over the first steps.
      path: from `path_of`, if known latents are kept without the denoiser's knowledge.
      circle_frames: latent frames of a video that repeats; not with a cache.
      done: solver steps before these.
      The others are described in `diffusion/samplers.py`.
    """
    velocity = _velocity_of(nnx.merge(graph, state), branches, weights, rescale, anchor)
    if circle_frames:
        velocity = _on_circle(
            velocity, circle_frames, jnp.asarray(steps["level"]), done
        )
    if path is not None:
        velocity = _on_path(velocity, path)
    return samplers.sample_chunk(velocity, x_bnc, memory, steps, sampler, cache)


@functools.partial(jax.jit, static_argnames=("graph", "sampler"))
def edit_chunk(
    graph,
    state,
    z_bnc,
    memory,
    steps,
    source_bnc,
    keys_b,
    branches,
    weights,
    source_branches,
    source_weights,
    *,
    sampler: str,
    rescale=None,
):
    """Runs some steps of FlowEdit (arXiv 2412.08629, algorithm 1) from one text to another.

    With fresh noise n at every level, x = (1 - tau) source + tau n and y = z + x - source,

        dz / dtau = v(y, tau, text) - v(x, tau, source's text)

    Args:
      z_bnc: what the source has become, at first the source itself.
      source_bnc: clean tokens of the source.
      keys_b: of the noise of each clip.
      branches, weights: of guidance with the new text.
      source_branches, source_weights: of guidance with the source's text.
      The others are those of `denoise_chunk`.
    """
    dit = nnx.merge(graph, state)
    target = _velocity_of(dit, branches, weights, rescale)
    source = _velocity_of(dit, source_branches, source_weights, rescale)

    def velocity(z, level):
        number = jnp.round(level * 2**20).astype(jnp.int32)  # of the level
        noise = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, number), z.shape[1:])
        )(keys_b)
        noised = flow.interpolate(source_bnc, noise, level)
        return target(z + noised - source_bnc, level) - source(noised, level)

    return samplers.sample_chunk(velocity, z_bnc, memory, steps, sampler)[:2]
