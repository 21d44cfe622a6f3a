"""The clips of a batch, of which a task makes one window of video after another.

Letters: b clips of the batch, t, h, w time, height and width (of latents or of video), c
channels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data import conditions
from sora_jax.generation import compiled, placement
from sora_jax.generation import given as givens
from sora_jax.generation import request as requests
from sora_jax.models import rows

if TYPE_CHECKING:
    from sora_jax.generation import pipeline

# Latents that are decoded before a loop. The toy's decoder then shows a seam of less than
# 0.001 of 255, and random weights of Wan's form, which amplify it, one of 0.7.
_WARM_UP = 20


class Windows:
    """What a task may do: encode what the user gives, sample, and decode.

    Args:
      pipe: the model.
      request: the call; its num_frames, height and width are those of a window.
      rows: the clips of the batch, by their places in the request.
      text, null: their encoded prompts and negative prompts.
      progress: called with the number of clip steps since its last call.
    """

    def __init__(
        self,
        pipe: "pipeline.Pipeline",
        request: requests.Request,
        rows: Sequence[int],
        text: Mapping,
        null: Mapping,
        progress: Callable[[int], None] | None = None,
    ):
        self.pipe, self.request, self.rows = pipe, request, rows
        self._text, self._null, self._progress = text, null, progress
        self._made = 0  # windows, of which each has its own noise
        self.stride = pipe.strides.time

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a window."""
        r = self.request
        *grid, _ = self.pipe.latent_shape(r.num_frames, r.height, r.width)
        return tuple(grid)

    def of_all(self, frames: np.ndarray) -> np.ndarray:
        """Frames [b, t, h, w, c] of every clip, of those or of one video for all."""
        frames = np.asarray(frames)
        if frames.ndim == 5:
            return frames
        return np.repeat(frames[None], len(self.rows), axis=0)

    def encode(self, frames: np.ndarray) -> jax.Array:
        """The normalised latents [b, t, h, w, c] of videos, or of one for all clips.

        Args:
          frames: uint8 [t, h, w, 3] or [b, t, h, w, 3], at the size of the request; t is
            1 + stride n.
        """
        return self.pipe.encode(self.of_all(frames).astype(np.float32) / 127.5 - 1)

    def pictures(
        self,
        frames: np.ndarray,
        at: Sequence[int],
        beside: givens.Given = givens.Given(),
    ) -> givens.Given:
        """What gives a window frames that are encoded alone.

        Args:
          frames: as of `encode`.
          at: the video frame of the window that each of them is.
          beside: what else is given.
        """
        times_t = jnp.asarray(at, jnp.float32) / self.stride
        pictures = rows.Beside(self.encode_alone(frames), times_t)
        return dataclasses.replace(beside, beside=(*beside.beside, pictures))

    def references(self, images: np.ndarray) -> givens.Given:
        """What gives a window pictures of something that it is to show.

        images: as frames of `encode`.
        """
        latents_bthwc = self.encode_alone(images)
        times = map(conditions.reference_time, range(latents_bthwc.shape[1]))
        times_t = jnp.asarray([*times], jnp.float32)
        role = rows.Role.REFERENCE
        return givens.Given(beside=(rows.Beside(latents_bthwc, times_t, role),))

    def source(self, video: np.ndarray) -> givens.Given:
        """What gives a window the video before an edit; see `encode`."""
        latents_bthwc = self.encode(video)
        times_t = jnp.arange(latents_bthwc.shape[1], dtype=jnp.float32)
        role = rows.Role.SOURCE
        return givens.Given(beside=(rows.Beside(latents_bthwc, times_t, role),))

    def encode_alone(self, frames: np.ndarray) -> jax.Array:
        """The latents of frames, each encoded alone: [b, t, h, w, c]; see `encode`."""
        frames = self.of_all(frames)
        alone = [self.encode(frames[:, t : t + 1]) for t in range(frames.shape[1])]
        return jnp.concatenate(alone, axis=1)

    def head(
        self, latents_bthwc: jax.Array, start: int = 0, length: int | None = None
    ) -> givens.Given:
        """What gives a window known latents at its head.

        Args:
          latents_bthwc: these.
          start: index of the window's first latent frame.
          length: latent frames of the window; None: as many as usual.
        """
        t, h, w = self.grid
        return givens.head(latents_bthwc, (length or t, h, w), start)

    def sample(
        self,
        what: givens.Given = givens.Given(),
        latents_bthwc: jax.Array | None = None,
        first: float = 1.0,
        length: int | None = None,
        is_rolled: bool = False,
    ) -> jax.Array:
        """Generates a window, and returns its latents; see `Pipeline.denoise`.

        length: latent frames of the window; None: as many as usual.
        """
        return self.pipe.denoise(
            self.request,
            self.rows,
            self._text,
            self._null,
            self.noise(length),
            what,
            progress=self._progress,
            latents_bthwc=latents_bthwc,
            first=first,
            is_rolled=is_rolled,
        )

    def edit(
        self, latents_bthwc: jax.Array, source: Mapping, guidance: float, first: float
    ) -> jax.Array:
        """Turns latents from one text to another; see `Pipeline.flow_edit`."""
        return self.pipe.flow_edit(
            self.request,
            self.rows,
            self._text,
            self._null,
            latents_bthwc,
            source,
            guidance,
            first,
            self._progress,
        )

    def noise(self, length: int | None = None) -> jax.Array:
        """Draws the noise of the next window, of so many latent frames."""
        more = (self._made,) if self._made else ()
        self._made += 1
        r = self.request
        t, *rest = self.pipe.latent_shape(r.num_frames, r.height, r.width)
        keys_b = r.keys(self.rows, "noise", *more)
        return compiled.draw_noise(keys_b, (length or t, *rest))

    def decode_loop(self, latents_bthwc: jax.Array) -> np.ndarray:
        """The video of a circle of latents: all its frames, and then the first again.

        Every latent stands for `stride` frames. The decoder is causal, so it gets a
        warm-up lap first: the latents that come before the first one in the circle.

        Args:
          latents_bthwc: t latents, of which the one after the last is the first.

        Returns:
          uint8 [b, stride t, h, w, 3].
        """
        t = latents_bthwc.shape[1]
        circle = latents_bthwc[:, np.arange(-_WARM_UP, t) % t]
        return self.decode(circle)[:, -self.stride * t :]

    def decode(self, latents_bthwc: jax.Array) -> np.ndarray:
        """The video of latents, uint8 [b, t, h, w, 3].

        Raises:
          FloatingPointError: the model's weights give numbers that are not finite.
        """
        frames = placement.to_host(self.pipe.decode_latents(latents_bthwc))
        placement.check_finite(frames)
        return np.round(frames * 255).astype(np.uint8)
