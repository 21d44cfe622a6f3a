"""A video in chunks: the state that causal layers keep, and the loops over chunks.

A causal network can run on a few frames at a time, with the result that it has on all of
them at once: every layer that looks back keeps the last frames of its own input. A whole
video is a first chunk without a second.

Memory depends on the chunk, not the video: the state is passed from chunk to chunk, its
buffers are donated, and results are yielded as they are computed. There are at most three
programs, for the first chunk, the following ones and the remainder; they are compiled
once per process for each network and frame size.

Letters: b batch, t time, h height, w width, c channels.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.core import sharding

State = tuple[jax.Array, ...]  # frames that layers keep, in the order of the layers
CHUNK = 4  # latent frames; see experiments/RESULTS.md, "Video VAE"


class Past:
    """The state that the layers of one pass read, and the one that they write.

    The layers run in a fixed order, in which each reads its entry of the state and writes
    one for the next chunk.

    Args:
      state: that of the previous chunk; None at the first frame.
    """

    def __init__(self, state: State | None = None):
        self.is_first = state is None
        self._old = iter(state or ())
        self._new = []

    def join(self, x_bthwc: jax.Array, frames: int) -> tuple[jax.Array, int]:
        """Puts the last `frames` frames of the past in front of a layer's input.

        Returns:
          the longer input, and how many of these frames do not exist: all of them in the
          first chunk, whose input is returned as it is, and none later.
        """
        if not self.is_first:
            x_bthwc = jnp.concatenate([next(self._old), x_bthwc], axis=1)
        t = x_bthwc.shape[1]
        short = max(0, frames - t)  # frames before the first are zero
        edges = ((0, 0), (short, 0), (0, 0), (0, 0), (0, 0))
        self._new.append(jnp.pad(x_bthwc[:, max(0, t - frames) :], edges))
        return x_bthwc, frames * self.is_first

    def state(self) -> State:
        """Returns the state for the next chunk."""
        return tuple(self._new)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def encode_chunk(graph, parameters, video_bthwc, state):
    """`VideoVAE.encode_chunk`, jitted; it donates the state's buffers."""
    return nnx.merge(graph, parameters).encode_chunk(video_bthwc, state)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def decode_chunk(graph, parameters, latents_bthwc, state):
    """`VideoVAE.decode_chunk`, jitted; it donates the state's buffers."""
    return nnx.merge(graph, parameters).decode_chunk(latents_bthwc, state)


def encode(vae, video, chunk: int, layout) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields the moments of a video's latents; see `VideoVAE.encode_stream`."""
    stride = vae.config.temporal_stride
    graph, parameters = nnx.split(vae)
    num_frames, state = 0, None
    for video_bthwc in _chunks(video, 1 + stride * (chunk - 1), stride * chunk):
        num_frames += video_bthwc.shape[1]
        shape = vae.config.latent_shape(num_frames, *video_bthwc.shape[2:4])
        video_bthwc = shard_frames(video_bthwc, shape[1:3], layout)
        moments, state = encode_chunk(graph, parameters, video_bthwc, state)
        yield moments


def decode(vae, latents, chunk: int, layout) -> Iterator[jax.Array]:
    """Yields a video's frames from its latents; see `VideoVAE.decode_stream`."""
    graph, parameters = nnx.split(vae)
    state = None
    for latents_bthwc in _chunks(latents, chunk, chunk):
        latents_bthwc = shard_frames(latents_bthwc, latents_bthwc.shape[2:4], layout)
        video_bthwc, state = decode_chunk(graph, parameters, latents_bthwc, state)
        yield video_bthwc


def _chunks(video, first: int, rest: int) -> Iterator[np.ndarray]:
    """Splits an array, or its parts in order, into `first` frames and then `rest` each.

    The last chunk may be shorter. At most a chunk and a part are in memory.
    """
    if first < 1:
        raise ValueError("chunk, the latent frames of a chunk, must be at least 1")
    parts: Iterable = (video,) if hasattr(video, "shape") else video
    size, buffer, count = first, [], 0
    for part in map(np.asarray, parts):
        while count + part.shape[1] >= size:
            head, part = part[:, : size - count], part[:, size - count :]
            yield np.concatenate([*buffer, head], axis=1)
            size, buffer, count = rest, [], 0
        buffer, count = [*buffer, part], count + part.shape[1]
    if count:
        yield np.concatenate(buffer, axis=1)


def shard_frames(x_bthwc, latent_size: tuple[int, int], layout=None) -> jax.Array:
    """Shards a chunk over the current mesh; without one it does nothing.

    Args:
      x_bthwc: frames or latents, on the host.
      latent_size: height and width of the latent; if these divide, all levels do.
      layout: mesh axes of [b, t, h, w, c]. By default rows are sharded over those of
        `batch`, and each remaining axis shards the height if that divides, else the
        width.

    Raises:
      ValueError: a size does not divide over `layout`; the message names one that does.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return x_bthwc
    if layout is None:
        layout = default_spec(mesh, x_bthwc.shape[0], latent_size)
    layout = jax.P(*layout, *[None] * (x_bthwc.ndim - len(layout)))
    for axis, size in zip((2, 3), latent_size, strict=True):
        _check_shards(
            axis, x_bthwc.shape[axis], size, sharding.num_shards(mesh, layout[axis])
        )
    return jax.device_put(x_bthwc, jax.NamedSharding(mesh, layout))


def default_spec(mesh, rows: int, latent_size: tuple[int, int]) -> jax.P:
    batch = rows % sharding.logical_axis_size(mesh, "batch") == 0
    taken = sharding.RULES["batch"] if batch else ()
    axes, left = ([], []), list(latent_size)
    for name, shards in mesh.shape.items():
        fits = [i for i in range(2) if left[i] % shards == 0]
        if name not in taken and shards > 1 and fits:
            axes[fits[0]].append(name)
            left[fits[0]] //= shards
    return jax.P(taken or None, None, *[tuple(names) or None for names in axes], None)


def check_shards(video_bthwc: jax.Array, stride: int) -> None:
    """Checks that every level of the encoder divides over the shards of its input.

    Args:
      video_bthwc: the video, sharded.
      stride: pixels per latent voxel, along height and width.

    Raises:
      ValueError: a latent's rows or columns do not; the message names a size that does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis in (2, 3):
        if sharding.is_sharded(video_bthwc, [axis]):
            layout = jax.typeof(video_bthwc).sharding.spec
            shards = sharding.num_shards(mesh, layout[axis])
            size = video_bthwc.shape[axis]
            _check_shards(axis, size, size // stride, shards)


def _check_shards(axis: int, size: int, latent_size: int, shards: int) -> None:
    if latent_size % shards:
        name = {2: "height", 3: "width"}[axis]
        unit = shards * size // latent_size
        nearest = max(1, round(size / unit)) * unit
        raise ValueError(
            f"a {name} of {size} has {latent_size} rows or columns of latents, which do "
            f"not divide over {shards} devices; a multiple of {unit} does, such as "
            f"{nearest}"
        )
