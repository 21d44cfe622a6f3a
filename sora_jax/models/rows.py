"""Rows of tokens: all that the denoiser sees.

A token is a patch of latents with a position, a noise level and a role. A row is one clip,
or several packed clips, each with its own text. A row of one clip needs no segments, and
the arrays that say how tokens differ are left out where they do not.

Letters: b rows, n tokens, c latent channels times the patch volume, k distinct noise levels
of a row, l text tokens, d text width; t, h, w time, height and width of a latent video.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sora_jax.core import sharding
from sora_jax.models import layers, patches

if TYPE_CHECKING:
    from sora_jax.models import dit


class Role(enum.IntEnum):
    """What a token is for; its noise level and its weight in the loss are apart.

    All but the first are given to the denoiser, which uses them to generate the others.
    """

    GENERATED = 0
    KNOWN = 1  # part of the video, or a frame of it
    REFERENCE = 2  # a picture of something that the video shows
    SOURCE = 3  # part of the video before an edit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The input of the denoiser.

    Attributes:
      tokens_bnc: latent patches at their noise levels, each flattened in the order
        (t, h, w, channel).
      pos_bn3: (t, h, w) of each token, real-valued; b may be 1. See `positions`.
      levels_bk: the few distinct noise levels tau of a row, in [0, 1]. Modulation is
        computed for these, not for every token.
      text_bld, text_mask_bl: states of the text encoder, and True at real text tokens.
      level_index_bn: which level each token has; None where k is 1.
      roles_bn: int32 `Role` of each token; None where all are generated.
      period_bn: after which time, in the unit of pos_bn3, that of a token starts anew; 0:
        never. b may be 1; None where none does.
      segments_bn, text_segments_bl, level_segments_bk: where several clips share a row,
        the clip of each token, text token and noise level, from 1 on; 0 is padding.
    """

    tokens_bnc: jax.Array
    pos_bn3: jax.Array
    levels_bk: jax.Array
    text_bld: jax.Array
    text_mask_bl: jax.Array
    level_index_bn: jax.Array | None = None
    roles_bn: jax.Array | None = None
    period_bn: jax.Array | None = None
    segments_bn: jax.Array | None = None
    text_segments_bl: jax.Array | None = None
    level_segments_bk: jax.Array | None = None

    @property
    def tau(self) -> jax.Array:
        """The noise level of each token, [b, n]; [b] where a row has only one."""
        if self.level_index_bn is None:
            return self.levels_bk[:, 0]
        pick = layers.picker(self.level_index_bn, self.levels_bk.shape[1])
        return pick(self.levels_bk[..., None])[..., 0]

    @property
    def given_bn(self) -> jax.Array | None:
        """Which tokens are given, bool; None where all are generated."""
        return None if self.roles_bn is None else self.roles_bn != Role.GENERATED

    def sharded(self) -> "Rows":
        """These rows over the mesh, filled with padding so that their tokens divide."""
        n = self.tokens_bnc.shape[1]
        more = sharding.padded_size(n, "tokens") - n
        found = self._filled(more) if more else self
        axes = {
            "tokens_bnc": ("batch", "tokens", None),
            "levels_bk": ("batch", None),
            "text_bld": ("batch", None, None),
            "text_mask_bl": ("batch", None),
            "level_index_bn": ("batch", "tokens"),
            "roles_bn": ("batch", "tokens"),
            "segments_bn": ("batch", "tokens"),
            "text_segments_bl": ("batch", None),
            "level_segments_bk": ("batch", None),
        }
        arrays = {name: getattr(found, name) for name in axes}
        return dataclasses.replace(
            found,
            **{
                name: sharding.reshard(array, *axes[name])
                for name, array in arrays.items()
                if array is not None
            },
        )

    def _filled(self, more: int) -> "Rows":
        """These rows with `more` tokens of no clip at their end."""

        def longer(x_bn):
            return jnp.pad(x_bn, [(0, 0), (0, more), *[(0, 0)] * (x_bn.ndim - 2)])

        names = ("tokens_bnc", "pos_bn3", "level_index_bn", "roles_bn", "period_bn", "segments_bn")  # fmt: skip
        found = {n: longer(x) for n in names if (x := getattr(self, n)) is not None}
        if self.segments_bn is None:
            alike = {
                "segments_bn": self.tokens_bnc[..., 0],
                "text_segments_bl": self.text_mask_bl,
                "level_segments_bk": self.levels_bk,
            }
            found |= {n: jnp.ones(x.shape, jnp.int32) for n, x in alike.items()}
            found["segments_bn"] = longer(found["segments_bn"])
        return dataclasses.replace(self, **found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """Latents that are given beside a video, each frame with a time of its own.

    Attributes:
      latents_bthwc: clean ones.
      times_t: the time of each frame, in latent frames.
      role: of their tokens.
    """

    latents_bthwc: jax.Array
    times_t: jax.Array
    role: Role = dataclasses.field(default=Role.KNOWN, metadata={"static": True})


def of_video(
    config: "dit.Config",
    latents_bthwc: jax.Array,
    levels_bk: jax.Array,
    text_bld: jax.Array,
    text_mask_bl: jax.Array,
    *,
    known_bn: jax.Array | None = None,
    fps: float | jax.Array | None = None,
    start: int | jax.Array = 0,
    beside: Sequence[Beside] = (),
    is_loop: bool = False,
) -> Rows:
    """Rows of one clip each, all of one size.

    Args:
      config: the denoiser's.
      latents_bthwc: sizes are multiples of the patch.
      levels_bk: level 0 is that of generated tokens, level 1, if there is one, that of
        given ones.
      text_bld, text_mask_bl: see `Rows`.
      known_bn: 1 where a token is known; see `known_tokens`.
      fps: frames per second of the video, where positions are in seconds.
      start: index of the first frame of tokens, which is not 0 in a window that starts
        mid-clip.
      beside: what is given beside the video; its tokens follow.
      is_loop: whether the first frame comes after the last.

    Raises:
      ValueError: a size is not a multiple of the patch's, or a token spans several latent
        frames, and what is given beside the video has a time for each.
    """
    tokens_bnc = patches.patchify(latents_bthwc, config.patch)
    pos_1n3 = grid_positions(latents_bthwc.shape[1:4], config, fps, start)
    roles_bn = None if known_bn is None else known_bn.astype(jnp.int32)
    if beside and roles_bn is None:
        roles_bn = jnp.zeros(tokens_bnc.shape[:2], jnp.int32)
    period_1n = None
    if is_loop:
        length = jnp.full(
            (1, tokens_bnc.shape[1]), latents_bthwc.shape[1] / config.patch[0]
        )
        period_1n = seconds(length, config, fps)
    for one in beside:
        if config.patch[0] > 1:
            raise ValueError(
                f"a token spans {config.patch[0]} latent frames, and what is given beside a "
                "video has a time for each"
            )
        more_bnc = patches.patchify(one.latents_bthwc, config.patch)
        tokens_bnc = jnp.concatenate([tokens_bnc, more_bnc], axis=1)
        role_bn = jnp.full(more_bnc.shape[:2], one.role, jnp.int32)
        roles_bn = jnp.concatenate([roles_bn, role_bn], axis=1)
        index_1n3 = _grid_index(one.latents_bthwc.shape[1:4], config.patch)
        a_frame = index_1n3.shape[1] // len(one.times_t)
        index_1n3 = index_1n3.at[..., 0].set(jnp.repeat(one.times_t, a_frame))
        more_1n3 = positions(index_1n3, config, fps)
        pos_1n3 = jnp.concatenate([pos_1n3, more_1n3], axis=1)
        if is_loop:
            filled = ((0, 0), (0, more_1n3.shape[1]))
            period_1n = jnp.pad(period_1n, filled)
    level_index_bn = None
    if levels_bk.shape[1] > 1 and roles_bn is not None:
        level_index_bn = jnp.minimum(roles_bn, 1)
    return Rows(
        tokens_bnc,
        pos_1n3,
        levels_bk,
        text_bld,
        text_mask_bl,
        level_index_bn=level_index_bn,
        roles_bn=roles_bn,
        period_bn=period_1n,
    )


def to_video(
    tokens_bnc: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> jax.Array:
    """The latents [b, t, h, w, c] of rows of one clip of this size.

    Tokens that are given beside the video, and follow it, are left out.
    """
    count = math.prod(grid) // math.prod(patch)
    if tokens_bnc.shape[1] > count:
        tokens_bnc = sharding.gather_axis(tokens_bnc, 1, tokens_bnc)[:, :count]
    return patches.unpatchify(tokens_bnc, grid, patch)


def known_tokens(known_bthw: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """Which tokens are known, bool [b, n]: those of which all latents are."""
    return jnp.all(patches.patchify(known_bthw[..., None], patch), axis=-1)


def grid_positions(
    grid: tuple[int, int, int],
    config: "dit.Config",
    fps: float | jax.Array | None = None,
    start: int | jax.Array = 0,
) -> jax.Array:
    """Returns (t, h, w) of every token of a latent grid: [1, n, 3], float32.

    h and w count tokens. t counts latent frames where `config.time_scale` is None, as in
    Wan; otherwise it is the time in seconds of a latent's last video frame, times
    `time_scale`, so that a second is the same at every frame rate. start: see `of_video`.
    """
    index_1n3 = _grid_index(grid, config.patch)
    return positions(index_1n3.at[..., 0].add(start), config, fps)


def _grid_index(grid: tuple[int, int, int], patch: tuple[int, int, int]) -> jax.Array:
    """The index of every token of a latent grid: [1, n, 3], float32."""
    axes = [
        jnp.arange(size // p, dtype=jnp.float32)
        for size, p in zip(grid, patch, strict=True)
    ]
    index = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    return index.reshape(1, -1, 3)


def positions(
    index_bn3: jax.Array, config: "dit.Config", fps: float | jax.Array | None
) -> jax.Array:
    """Returns `grid_positions` of any tokens: [b, n, 3], float32.

    Args:
      index_bn3: each token's index in the token grid of its clip. A window that starts
        mid-clip starts at the index of its first latent there.
      config: the denoiser's.
      fps: frames per second of all tokens, or of each token, [b, n].
    """
    index_bn3 = index_bn3.astype(jnp.float32)
    time_bn = seconds(index_bn3[..., 0], config, fps)
    return jnp.concatenate([time_bn[..., None], index_bn3[..., 1:]], axis=-1)


def seconds(
    frames_bn: jax.Array, config: "dit.Config", fps: float | jax.Array | None
) -> jax.Array:
    """How long so many frames of tokens are, in the unit of positions: [b, n].

    That is a latent frame where `config.time_scale` is None.
    """
    if config.time_scale is None:
        return frames_bn
    if fps is None:
        raise ValueError("positions are in seconds (time_scale) and need fps")
    video_frames_bn = frames_bn * config.patch[0] * config.temporal_stride
    return video_frames_bn / fps * config.time_scale


def of_clips(segments_bn: jax.Array, clips: int) -> jax.Array:
    """Which clip of its packed row each token belongs to, one-hot [b, n, k]."""
    return jax.nn.one_hot(segments_bn - 1, clips)


def by_clip(x_bn: jax.Array, of_clip_bnk: jax.Array | None) -> jax.Array:
    """Sums over the tokens of each clip, [b, k]; None: a row is one clip.

    A product at the highest precision, which shards where a gather does not.
    """
    if of_clip_bnk is None:
        return jnp.sum(x_bn, 1, keepdims=True)
    x_bn = sharding.reshard(x_bn, "batch", None)
    return jnp.einsum("bn,bnk->bk", x_bn, of_clip_bnk, precision="highest")
