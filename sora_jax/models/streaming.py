"""A video in chunks: what causal layers keep of the past, and the loops over chunks.

A network that sees no later frame can be run on a few frames at a time, with the result
that it has on all of them at once: every layer that looks back keeps the last frames of
its own input. A whole video is a first chunk without a second.

Memory follows the chunk, not the video: the state is handed from chunk to chunk, its
buffers are used again, and results leave as they come. There are at most three
programs, of the first chunk, of those that follow and of what is left over at the end;
they are compiled once a process for each network and size of frames.

Letters: b batch, t time, h height, w width, c channels.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.core import sharding

State = tuple[jax.Array, ...]  # frames that layers keep, in the order in which they run
CHUNK = 4  # latent frames; see experiments/RESULTS.md, "Video VAE"


class Past:
    """What the layers of one pass are given of earlier frames, and what they leave.

    The layers run in a fixed order, in which each takes its entry of the state and
    leaves one for the next chunk.

    Args:
      state: what the pass over the chunk before left; None at the first frame.
    """

    def __init__(self, state: State | None = None):
        self.is_first = state is None
        self._given = iter(state or ())
        self._left = []

    def join(self, x_bthwc: jax.Array, frames: int) -> tuple[jax.Array, int]:
        """Puts the last `frames` frames of the past in front of a layer's input.

        Returns:
          the input, longer by them, and how many of them do not exist: all of them, in
          the first chunk, which comes back as it is, and none later.
        """
        if not self.is_first:
            x_bthwc = jnp.concatenate([next(self._given), x_bthwc], axis=1)
        t = x_bthwc.shape[1]
        short = max(0, frames - t)  # frames before the first are zero
        edges = ((0, 0), (short, 0), (0, 0), (0, 0), (0, 0))
        self._left.append(jnp.pad(x_bthwc[:, max(0, t - frames) :], edges))
        return x_bthwc, frames * self.is_first

    def state(self) -> State:
        """What the layers left for the next chunk."""
        return tuple(self._left)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def encode_chunk(graph, parameters, video_bthwc, state):
    """`VideoVAE.encode_chunk` as a program, which takes the state's buffers over."""
    return nnx.merge(graph, parameters).encode_chunk(video_bthwc, state)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def decode_chunk(graph, parameters, latents_bthwc, state):
    """`VideoVAE.decode_chunk` as a program, which takes the state's buffers over."""
    return nnx.merge(graph, parameters).decode_chunk(latents_bthwc, state)


def encode(vae, video, chunk: int, layout) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields the moments of a video's latents; see `VideoVAE.encode_stream`."""
    stride = vae.config.temporal_stride
    graph, parameters = nnx.split(vae)
    num_frames, state = 0, None
    for video_bthwc in _cut(video, 1 + stride * (chunk - 1), stride * chunk):
        num_frames += video_bthwc.shape[1]
        shape = vae.config.latent_shape(num_frames, *video_bthwc.shape[2:4])
        video_bthwc = spread_frames(video_bthwc, shape[1:3], layout)
        moments, state = encode_chunk(graph, parameters, video_bthwc, state)
        yield moments


def decode(vae, latents, chunk: int, layout) -> Iterator[jax.Array]:
    """Yields a video's frames from its latents; see `VideoVAE.decode_stream`."""
    graph, parameters = nnx.split(vae)
    state = None
    for latents_bthwc in _cut(latents, chunk, chunk):
        latents_bthwc = spread_frames(latents_bthwc, latents_bthwc.shape[2:4], layout)
        video_bthwc, state = decode_chunk(graph, parameters, latents_bthwc, state)
        yield video_bthwc


def _cut(video, first: int, rest: int) -> Iterator[np.ndarray]:
    """Cuts an array, or parts that make one, into `first` frames and then `rest` each.

    The last piece may be shorter. No more is held than a piece and a part.
    """
    if first < 1:
        raise ValueError("chunk is the latent frames of a chunk, and at least 1")
    parts: Iterable = (video,) if hasattr(video, "shape") else video
    wanted, held, count = first, [], 0
    for part in map(np.asarray, parts):
        while count + part.shape[1] >= wanted:
            part, piece = part[:, wanted - count :], part[:, : wanted - count]
            yield np.concatenate([*held, piece], axis=1)
            wanted, held, count = rest, [], 0
        held, count = [*held, part], count + part.shape[1]
    if count:
        yield np.concatenate(held, axis=1)


def spread_frames(x_bthwc, latent_size: tuple[int, int], layout=None) -> jax.Array:
    """Lays a chunk out over the mesh that is set; without one it does nothing.

    Args:
      x_bthwc: frames or latents, on the host.
      latent_size: height and width of the latent, which all levels divide as well as.
      layout: mesh axes of [b, t, h, w, c]. By default rows are split over those of
        `batch` and each axis that is left over splits the height if that divides, else
        the width.

    Raises:
      ValueError: a size does not divide over `layout`; the message names one that does.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return x_bthwc
    if layout is None:
        layout = default_layout(mesh, x_bthwc.shape[0], latent_size)
    layout = jax.P(*layout, *[None] * (x_bthwc.ndim - len(layout)))
    for axis, size in zip((2, 3), latent_size, strict=True):
        _check_shards(
            axis, x_bthwc.shape[axis], size, sharding.num_shards(mesh, layout[axis])
        )
    return jax.device_put(x_bthwc, jax.NamedSharding(mesh, layout))


def default_layout(mesh, rows: int, latent_size: tuple[int, int]) -> jax.P:
    batch = rows % sharding.logical_axis_size(mesh, "batch") == 0
    taken = sharding.RULES["batch"] if batch else ()
    axes, left = ([], []), list(latent_size)
    for name, shards in mesh.shape.items():
        fits = [i for i in range(2) if left[i] % shards == 0]
        if name not in taken and shards > 1 and fits:
            axes[fits[0]].append(name)
            left[fits[0]] //= shards
    return jax.P(taken or None, None, *[tuple(names) or None for names in axes], None)


def check_split(video_bthwc: jax.Array, stride: int) -> None:
    """Checks that every level of the encoder divides over the devices as its input is.

    Args:
      video_bthwc: the video, in the layout that it has.
      stride: pixels a side in each latent voxel.

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
            f"not divide over {shards} devices; a multiple of {unit} would, such as "
            f"{nearest}"
        )
