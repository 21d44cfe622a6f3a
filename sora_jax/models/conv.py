"""Causal convolutions over video, and the reshapes that go with them.

3D convolutions have several implementations. XLA's own is best on TPU and GPU; on CPU it
is three to six times slower than one 2D convolution for each time tap, and slower still
on frames of two pixels, where a product of patches and a matrix wins. Computing pairs of
frames takes two thirds of those 2D convolutions. The choice is made when the program is
lowered, so compiling for a TPU on a CPU host gives the TPU's.

Activations keep the sharding of their batch, height and width. Where height or width is
sharded, XLA's partitioner runs the operation: devices exchange the rows at their borders
(a collective-permute each way), and no frame is gathered.

Letters: b batch, t time, h height, w width, c channel; kernels are [t,h,w,i,o] or
[h,w,i,o] with i input and o output channels.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from sora_jax.core import sharding
from sora_jax.models import layers

_DIMS_2D = ("NHWC", "HWIO", "NHWC")
_DIMS_3D = ("NDHWC", "DHWIO", "NDHWC")


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes, keeping the sharding of the leading axes that stay as they are.

    Axis 0 keeps its sharding when axis 1 is merged into it.
    """
    pairs = itertools.takewhile(
        lambda ab: ab[0] == ab[1], zip(x.shape, shape, strict=False)
    )
    kept = max(1, sum(1 for _ in pairs))
    layout = sharding.spec_like(x, *[None] * (x.ndim - kept))
    return jnp.reshape(x, shape, out_sharding=layout and jax.P(*layout[:kept]))


def join_voxels(x_bthwc: jax.Array) -> jax.Array:
    """Flattens the voxels of each frame: [b, t, h, w, c] to [b t, h w, c].

    The new axis is sharded as the height is; the width is gathered.
    """
    b, t, h, w, c = x_bthwc.shape
    layout = sharding.spec_like(x_bthwc)
    x_bthwc = sharding.gather_axis(x_bthwc, 3, like=x_bthwc)
    layout = layout and jax.P(layout[0], layout[2], layout[4])
    return jnp.reshape(x_bthwc, (b * t, h * w, c), out_sharding=layout)


def split_voxels(x_nmc: jax.Array, like_bthwc: jax.Array) -> jax.Array:
    """Undoes `join_voxels`; the result has the shape and sharding of `like_bthwc`."""
    layout = sharding.spec_like(like_bthwc)
    layout = layout and jax.P(*layout[:3], None, layout[4])
    x_bthwc = jnp.reshape(x_nmc, like_bthwc.shape, out_sharding=layout)
    return sharding.reshard_like(x_bthwc, like_bthwc)


def _over_sharded_frames(operation):
    """Leaves `operation(x_bthwc, ...)` to XLA's partitioner where frames are sharded.

    That is where the spec of height or width has mesh axes, even of size 1: under
    explicit sharding a convolution accepts none there. The first four axes of the result
    are sharded like those of x.
    """

    @functools.wraps(operation)
    def run(x_bthwc: jax.Array, *kernel: jax.Array, **options) -> jax.Array:
        whole = functools.partial(operation, **options)
        layout = jax.P(*(sharding.spec_like(x_bthwc) or ())[:4])
        if not any(layout[2:]):
            return whole(x_bthwc, *kernel)
        return jax.sharding.auto_axes(whole, out_sharding=layout)(x_bthwc, *kernel)

    return run


@_over_sharded_frames
def causal_conv3d(
    x_bthwc: jax.Array, kernel_thwio: jax.Array, *, missing: int | None = None
) -> jax.Array:
    """Convolves causally in time and centred in space, with zero padding.

    Frame t of the result depends on frames t - k + 1 .. t for k time taps. The spatial
    size of the kernel is odd and the result has the height and width of the input.

    Args:
      x_bthwc: the video, with `k - 1 - missing` earlier frames in front.
      kernel_thwio: the kernel.
      missing: how many of the k - 1 frames before the first one are not in x, and taken
        as zero; by default all of them.

    Returns:
      t - (k - 1) + missing frames.
    """
    missing = len(kernel_thwio) - 1 if missing is None else missing
    taps = functools.partial(_by_time_taps, missing=missing)
    if kernel_thwio.shape[1:3] == (1, 1):
        return taps(x_bthwc, kernel_thwio)
    direct = functools.partial(_direct, missing=missing)
    return jax.lax.platform_dependent(x_bthwc, kernel_thwio, cpu=taps, default=direct)


def _direct(x_bthwc: jax.Array, kernel_thwio: jax.Array, missing: int) -> jax.Array:
    kh, kw = kernel_thwio.shape[1:3]
    padding = [(missing, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)]
    return jax.lax.conv_general_dilated(
        x_bthwc, kernel_thwio, (1, 1, 1), padding, dimension_numbers=_DIMS_3D
    )


def _by_time_taps(
    x_bthwc: jax.Array, kernel_thwio: jax.Array, missing: int
) -> jax.Array:
    """Sums one 2D operation per time tap; missing frames cost nothing."""
    kt, kh, kw, i, o = kernel_thwio.shape
    if (kh, kw) == (1, 1) or min(x_bthwc.shape[2:4]) < kh:
        # XLA's CPU convolution is ten times slower than a matrix product once the
        # frame is smaller than the kernel.
        x_bthwc = _patches(x_bthwc, kh, kw)
        kernels_t = kernel_thwio.reshape(kt, kh * kw * i, o)
        return _sum_taps(x_bthwc, kernels_t, missing, _matmul)
    return _conv_taps(x_bthwc, kernel_thwio, missing)


def _reads(kt: int, t: int, missing: int) -> list[tuple[int, int, int]]:
    """For each tap that reads any frame: (tap, first frame it reads, first it writes).

    It reads as many frames as it writes, up to the last one.
    """
    count = t - (kt - 1) + missing  # frames of the result
    starts = [(tap, max(0, tap - missing), max(0, missing - tap)) for tap in range(kt)]
    return [(tap, read, write) for tap, read, write in starts if write < count][::-1]


def _sum_taps(x_bthwc: jax.Array, kernels_t, missing: int, apply) -> jax.Array:
    kt, t = len(kernels_t), x_bthwc.shape[1]
    count, y = t - (kt - 1) + missing, None
    for tap, read, write in _reads(kt, t, missing):
        term = apply(x_bthwc[:, read : read + count - write], kernels_t[tap])
        term = _shift(term, write, 0)
        y = term if y is None else y + term
    return y


def _shift(x_bthwc: jax.Array, front: int, behind: int) -> jax.Array:
    return jnp.pad(x_bthwc, ((0, 0), (front, behind), (0, 0), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_taps(x_bthwc: jax.Array, kernel_thwio: jax.Array, missing: int) -> jax.Array:
    return _by_pairs(x_bthwc, kernel_thwio, missing)


def _by_pairs(x_bthwc: jax.Array, kernel_thwio: jax.Array, missing: int) -> jax.Array:
    """Computes two frames with four convolutions instead of six (Winograd's F(2, 3)).

    arXiv 1509.09308, section 4.1, over time; still causal. Not in half precision, where
    the sums of frames would cost accuracy.
    """
    kt, t = len(kernel_thwio), x_bthwc.shape[1] - len(kernel_thwio) + 1 + missing
    if kt != 3 or t < 2 or x_bthwc.dtype != jnp.float32:
        return _sum_taps(x_bthwc, kernel_thwio, missing, conv2d)
    alone = t % 2  # the first frame, if the number of frames is odd
    x = _shift(x_bthwc, missing, 0)
    x0, x1, x2, x3 = (x[:, alone + i : i + t - 1 : 2] for i in range(4))
    k0, k1, k2 = kernel_thwio
    y0 = conv2d(x0 - x2, k0)
    y1 = conv2d(x1 + x2, (k0 + k1 + k2) / 2)
    y2 = conv2d(x2 - x1, (k0 - k1 + k2) / 2)
    y3 = conv2d(x1 - x3, k2)
    pairs = jnp.stack([y0 + y1 + y2, y1 - y2 - y3], axis=2)
    pairs = reshape(pairs, len(pairs), t - alone, *pairs.shape[3:])
    if not alone:
        return pairs
    first = _sum_taps(x_bthwc[:, : kt - missing], kernel_thwio, missing, conv2d)
    return jnp.concatenate([first, pairs], axis=1)


def _conv_taps_forward(x_bthwc, kernel_thwio, missing):
    return _conv_taps(x_bthwc, kernel_thwio, missing), (x_bthwc, kernel_thwio)


def _conv_taps_backward(missing, saved, dy_bthwo):
    """XLA's own gradient for the kernel is a convolution with a window as large as the
    frame, several times slower on CPU than one product of patches and gradient."""
    x_bthwc, kernel_thwio = saved
    kt, kh, kw, i, o = kernel_thwio.shape
    t, h = x_bthwc.shape[1:3]
    reads = _reads(kt, t, missing)
    transposed = kernel_thwio[:, ::-1, ::-1].swapaxes(-1, -2)
    later = _shift(dy_bthwo, 0, len(reads) - 1)  # the same convolution, back in time
    backwards = transposed[kt - len(reads) :][::-1]
    dx_bthwc = _by_pairs(later, backwards, kt - 1 - missing)
    sent = []
    for _, read, write in reads:
        dy = dy_bthwo[:, write:]
        # The gradient at the frames that this tap read; zero elsewhere.
        sent.append(_shift(dy, read, t - read - dy.shape[1]))
    sent_no = _voxels(jnp.concatenate(sent, axis=-1))
    rows = _patches(x_bthwc, 1, kw)  # a row of taps at once, for a wide product
    rows = jnp.pad(rows, ((0, 0), (0, 0), (kh // 2, kh // 2), (0, 0), (0, 0)))
    dk_hko = jnp.stack(
        [
            jnp.einsum(
                "nk,no->ko",
                _voxels(rows[:, :, row : row + h]),
                sent_no,
                out_sharding=sharding.out_sharding(None, None),
            )
            for row in range(kh)
        ]
    )
    dk = dk_hko.reshape(kh, kw, i, len(reads), o).transpose(3, 0, 1, 2, 4)[::-1]
    unused = ((kt - len(reads), 0), (0, 0), (0, 0), (0, 0), (0, 0))
    return dx_bthwc, jnp.pad(dk, unused)


_conv_taps.defvjp(_conv_taps_forward, _conv_taps_backward)


def _voxels(x_bthwc: jax.Array) -> jax.Array:
    """[b, t, h, w, c] -> [b t h w, c]."""
    b, t, h, w, c = x_bthwc.shape
    return reshape(reshape(x_bthwc, b * t, h, w, c), b * t * h * w, c)


def _matmul(x_bthwc: jax.Array, kernel_io: jax.Array) -> jax.Array:
    return layers.matmul(x_bthwc, kernel_io, None)


def _patches(x_bthwc: jax.Array, kh: int, kw: int) -> jax.Array:
    """Gathers each pixel's neighbourhood into channels, in the order of a kernel."""
    h, w = x_bthwc.shape[2:4]
    edges = ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))
    padded = jnp.pad(x_bthwc, edges)
    shifted = [
        padded[:, :, row : row + h, column : column + w]
        for row in range(kh)
        for column in range(kw)
    ]
    return jnp.concatenate(shifted, axis=-1)


@_over_sharded_frames
def conv2d(
    x_bthwc: jax.Array,
    kernel_hwio: jax.Array,
    *,
    stride: int = 1,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
) -> jax.Array:
    """Convolves every frame by itself."""
    b, t, h, w, c = x_bthwc.shape
    y_nhwo = jax.lax.conv_general_dilated(
        reshape(x_bthwc, b * t, h, w, c),
        kernel_hwio,
        (stride, stride),
        padding,
        dimension_numbers=_DIMS_2D,
    )
    return reshape(y_nhwo, b, t, *y_nhwo.shape[1:])


def half_time_conv(x_bthwc: jax.Array, kernel_thwio: jax.Array) -> jax.Array:
    """Halves time: 1 + 2n frames to n, frame k from frames 2k, 2k + 1 and 2k + 2.

    No padding. The kernel has three time taps and no spatial extent.
    """
    t = x_bthwc.shape[1]
    taps = [x_bthwc[:, 0 : t - 2 : 2], x_bthwc[:, 1 : t - 1 : 2], x_bthwc[:, 2:t:2]]
    return sum(_matmul(x, kernel_thwio[tap, 0, 0]) for tap, x in enumerate(taps))


@_over_sharded_frames
def double_space(x_bthwc: jax.Array) -> jax.Array:
    """Doubles height and width by repeating pixels (nearest neighbour)."""
    b, t, h, w, c = x_bthwc.shape
    x = jnp.broadcast_to(reshape(x_bthwc, b, t, h, 1, w, 1, c), (b, t, h, 2, w, 2, c))
    return reshape(x, b, t, 2 * h, 2 * w, c)


@_over_sharded_frames
def fold(x_bthwc: jax.Array, *, time: int, space: int) -> jax.Array:
    """Moves blocks of time x space x space pixels into channels, as [..., c, blocks].

    The result is [b, t/time, h/space, w/space, c, time * space * space].
    """
    b, t, h, w, c = x_bthwc.shape
    t, h, w = t // time, h // space, w // space
    x = reshape(x_bthwc, b, t, time, h, space, w, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return reshape(x, b, t, h, w, c, time * space * space)


@_over_sharded_frames
def unfold(x_bthwcf: jax.Array, *, time: int, space: int) -> jax.Array:
    """Undoes `fold`: [b, t, h, w, c, blocks] to [b, t*time, h*space, w*space, c]."""
    b, t, h, w, c, _ = x_bthwcf.shape
    x = reshape(x_bthwcf, b, t, h, w, c, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return reshape(x, b, t * time, h * space, w * space, c)
