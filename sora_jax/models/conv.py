"""Causal convolutions over video, and the reshapes that go with them.

A 3D convolution has one meaning and several forms. XLA's direct form is right on TPU
and GPU; its CPU form is three to six times slower than one 2D convolution for each time
tap, and slower still on frames of two pixels, where patches times a matrix win. The form
is chosen when the program is lowered, so compiling for a TPU on a CPU host gets the
TPU's.

Activations keep whatever layout their batch axis has; all else is unsharded.

Letters: b batch, t time, h height, w width, c channel; kernels are [t,h,w,i,o] or
[h,w,i,o] with i input and o output channels.
"""

import jax
import jax.numpy as jnp

from sora_jax.core import sharding
from sora_jax.models import layers

_DIMS_2D = ("NHWC", "HWIO", "NHWC")
_DIMS_3D = ("NDHWC", "DHWIO", "NDHWC")


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes, keeping the layout of axis 0, which may be merged with axis 1."""
    layout = sharding.follow(x, *[None] * (x.ndim - 1))
    return jnp.reshape(x, shape, out_sharding=layout and jax.P(layout[0]))


def causal_conv3d(x_bthwc: jax.Array, kernel_thwio: jax.Array) -> jax.Array:
    """Convolves with zero padding: all of it in front in time, centred in space.

    Frame t of the result depends on frames t - k + 1 .. t for k time taps. The spatial
    size of the kernel is odd and the result has the size of the input.
    """
    if kernel_thwio.shape[1:3] == (1, 1):
        return _by_time_taps(x_bthwc, kernel_thwio)
    return jax.lax.platform_dependent(
        x_bthwc, kernel_thwio, cpu=_by_time_taps, default=_direct
    )


def _direct(x_bthwc: jax.Array, kernel_thwio: jax.Array) -> jax.Array:
    kt, kh, kw = kernel_thwio.shape[:3]
    padding = [(kt - 1, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)]
    return jax.lax.conv_general_dilated(
        x_bthwc, kernel_thwio, (1, 1, 1), padding, dimension_numbers=_DIMS_3D
    )


def _by_time_taps(x_bthwc: jax.Array, kernel_thwio: jax.Array) -> jax.Array:
    """Sums one 2D operation per time tap; frames that are padding cost nothing."""
    kt, kh, kw, i, o = kernel_thwio.shape
    if (kh, kw) == (1, 1) or min(x_bthwc.shape[2:4]) < kh:
        # XLA's CPU convolution is ten times slower than a matrix product once the
        # frame is smaller than the kernel.
        x_bthwc = _patches(x_bthwc, kh, kw)
        return _sum_taps(x_bthwc, kernel_thwio.reshape(kt, kh * kw * i, o), _matmul)
    return _conv_taps(x_bthwc, kernel_thwio)


def _sum_taps(x_bthwc: jax.Array, kernels_t, apply) -> jax.Array:
    kt, t = len(kernels_t), x_bthwc.shape[1]
    y = apply(x_bthwc, kernels_t[kt - 1])
    for back in range(1, min(kt, t)):
        earlier = apply(x_bthwc[:, : t - back], kernels_t[kt - 1 - back])
        y = y + _shift(earlier, back, 0)
    return y


def _shift(x_bthwc: jax.Array, front: int, behind: int) -> jax.Array:
    return jnp.pad(x_bthwc, ((0, 0), (front, behind), (0, 0), (0, 0), (0, 0)))


@jax.custom_vjp
def _conv_taps(x_bthwc: jax.Array, kernel_thwio: jax.Array) -> jax.Array:
    return _sum_taps(x_bthwc, kernel_thwio, conv2d)


def _conv_taps_forward(x_bthwc, kernel_thwio):
    return _conv_taps(x_bthwc, kernel_thwio), (x_bthwc, kernel_thwio)


def _conv_taps_backward(saved, dy_bthwo):
    """XLA's own gradient for the kernel is a convolution with a window as large as the
    frame, several times slower on CPU than one product of patches and gradient."""
    x_bthwc, kernel_thwio = saved
    kt, kh, kw, i, o = kernel_thwio.shape
    t = x_bthwc.shape[1]
    backs = range(min(kt, t))  # how many frames later a tap writes what it reads
    turned = kernel_thwio[:, ::-1, ::-1].swapaxes(-1, -2)
    dx_bthwc = conv2d(dy_bthwo, turned[kt - 1])
    for back in backs[1:]:
        dx = conv2d(dy_bthwo[:, back:], turned[kt - 1 - back])
        dx_bthwc = dx_bthwc + _shift(dx, 0, back)
    later = [_shift(dy_bthwo[:, back:], 0, back) for back in backs]
    later_no = _voxels(jnp.concatenate(later, axis=-1))
    rows = _patches(x_bthwc, 1, kw)  # a row of taps at once: wide enough for a product
    edges = ((0, 0), (0, 0), (kh // 2, kh // 2), (0, 0), (0, 0))
    rows, h = jnp.pad(rows, edges), x_bthwc.shape[2]
    dk_hko = jnp.stack(
        [
            jnp.einsum(
                "nk,no->ko",
                _voxels(rows[:, :, row : row + h]),
                later_no,
                out_sharding=sharding.spec(None, None),
            )
            for row in range(kh)
        ]
    )
    dk = dk_hko.reshape(kh, kw, i, len(backs), o).transpose(3, 0, 1, 2, 4)[::-1]
    unused = ((kt - len(backs), 0), (0, 0), (0, 0), (0, 0), (0, 0))
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


def double_space(x_bthwc: jax.Array) -> jax.Array:
    """Doubles height and width by repeating pixels (nearest neighbour)."""
    b, t, h, w, c = x_bthwc.shape
    x = jnp.broadcast_to(reshape(x_bthwc, b, t, h, 1, w, 1, c), (b, t, h, 2, w, 2, c))
    return reshape(x, b, t, 2 * h, 2 * w, c)


def fold(x_bthwc: jax.Array, time: int, space: int) -> jax.Array:
    """Moves blocks of time x space x space pixels into channels, as [..., c, blocks].

    The result is [b, t/time, h/space, w/space, c, time * space * space].
    """
    b, t, h, w, c = x_bthwc.shape
    t, h, w = t // time, h // space, w // space
    x = reshape(x_bthwc, b, t, time, h, space, w, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return reshape(x, b, t, h, w, c, time * space * space)


def unfold(x_bthwcf: jax.Array, time: int, space: int) -> jax.Array:
    """Undoes `fold`: [b, t, h, w, c, blocks] to [b, t*time, h*space, w*space, c]."""
    b, t, h, w, c, _ = x_bthwcf.shape
    x = reshape(x_bthwcf, b, t, h, w, c, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return reshape(x, b, t * time, h * space, w * space, c)
