"""I3D: Inception-v1 inflated to video (arXiv 1705.07750), for features of clips.

Inference only: batch norms use stored statistics. All padding is TensorFlow's "SAME",
which depends on the size of the input and puts the odd row or frame at the end. Pools
ignore padding; ports that pad pools with zeros compute the same, since a pool always
follows a ReLU.

On CPU a convolution is a sum of 2D convolutions over time taps (`conv.py`), the first one
folds its taps into channels, and pooling runs along one axis after the other; XLA's own
operations are several times slower there.

Letters: b clips, t frames, h height, w width, c channels, i/o input and output channels
of a kernel, k classes, d width of the last layer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.models import conv, layers

SIZE = 224  # pixels; at this size the last average pool covers the whole frame
MIN_FRAMES = 9  # with fewer, the last pool, over two frames, gets only one

# Channels of a block: 1x1; 1x1 then 3x3x3; 1x1 then 3x3x3; pool then 1x1.
_MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
BLOCKS = tuple(_MIXED)
PARTS = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")  # convolutions of a block
STEM = ("conv_1a", "conv_2b", "conv_2c")


@dataclasses.dataclass(frozen=True)
class Config:
    """What differs between published weights.

    Attributes:
      num_classes: number of logits.
      eps: added to the variance in batch norms: 1e-3 in TensorFlow's network and the
        ports that follow it; 1e-5, torch's default, in VideoGPT's port and those made
        from it (TATS, CD-FVD).
    """

    num_classes: int = 400
    eps: float = 1e-3


class Unit(nnx.Module):
    """relu(norm(convolution)) with "SAME" padding.

    Args:
      size: taps over time, height and width.
      i, o: input and output channels.
      eps: added to the variance.
    """

    def __init__(self, size, i: int, o: int, *, eps: float, rngs: nnx.Rngs):
        init = layers.fan_in_normal(size[0] * size[1] * size[2] * i, 2**0.5)
        self.kernel = layers.param(rngs, init, (*size, i, o), (None,) * 5)
        ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
        self.scale = layers.param(rngs, ones, (o,), (None,))
        self.bias = layers.param(rngs, zeros, (o,), (None,))
        self.mean = layers.param(rngs, zeros, (o,), (None,))
        self.variance = layers.param(rngs, ones, (o,), (None,))
        self.eps = eps

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel [t, h, w, i, o] and bias [o] with the norm folded in."""
        gain_o = self.scale[...] * jax.lax.rsqrt(self.variance[...] + self.eps)
        return self.kernel[...] * gain_o, self.bias[...] - self.mean[...] * gain_o

    def __call__(self, x_bthwc: jax.Array, stride: int = 1) -> jax.Array:
        kernel_thwio, bias_o = self.folded()
        return jax.nn.relu(convolve(x_bthwc, kernel_thwio, stride) + bias_o)


class Mixed(nnx.Module):
    """An Inception block: four branches, concatenated along channels."""

    def __init__(self, i: int, widths: tuple[int, ...], *, eps, rngs: nnx.Rngs):
        o0, o1a, o1b, o2a, o2b, o3b = widths
        kind = {"eps": eps, "rngs": rngs}
        self.b0 = Unit((1, 1, 1), i, o0, **kind)
        self.b1a = Unit((1, 1, 1), i, o1a, **kind)
        self.b1b = Unit((3, 3, 3), o1a, o1b, **kind)
        self.b2a = Unit((1, 1, 1), i, o2a, **kind)
        self.b2b = Unit((3, 3, 3), o2a, o2b, **kind)
        self.b3b = Unit((1, 1, 1), i, o3b, **kind)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        branches = (
            self.b0(x_bthwc),
            self.b1b(self.b1a(x_bthwc)),
            self.b2b(self.b2a(x_bthwc)),
            self.b3b(max_pool(x_bthwc, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """The network for RGB clips. See the head of this file."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        kind = {"eps": config.eps, "rngs": rngs}
        self.conv_1a = Unit((7, 7, 7), 3, 64, **kind)
        self.conv_2b = Unit((1, 1, 1), 64, 64, **kind)
        self.conv_2c = Unit((3, 3, 3), 64, 192, **kind)
        width = 192
        for name, widths in _MIXED.items():
            setattr(self, name, Mixed(width, widths, **kind))
            width = sum(widths[i] for i in (0, 2, 4, 5))
        self.logits = layers.Linear(
            width, config.num_classes, axes=(None, None), rngs=rngs
        )

    def __call__(self, video_bthwc: jax.Array) -> dict[str, jax.Array]:
        """Returns the features for distances between videos, float32.

        Args:
          video_bthwc: RGB in [-1, 1], at least 9 frames of 224 x 224.

        Returns:
          logits [b, k]: before the softmax, their mean over time; FVD is defined on
            these. pooled [b, d]: the activations before the last layer.

        Raises:
          ValueError: clips of another size, or too short.
        """
        b, t, *shape = video_bthwc.shape
        if shape != [SIZE, SIZE, 3] or t < MIN_FRAMES:
            raise ValueError(
                f"I3D takes {MIN_FRAMES} or more frames of {SIZE} x {SIZE} x 3, got "
                f"{t} of {' x '.join(map(str, shape))}"
            )
        x_bthwc = self.conv_1a(video_bthwc, stride=2)
        x_bthwc = max_pool(x_bthwc, (1, 3, 3), (1, 2, 2))
        x_bthwc = self.conv_2c(self.conv_2b(x_bthwc))
        x_bthwc = max_pool(x_bthwc, (1, 3, 3), (1, 2, 2))
        x_bthwc = self.mixed_3c(self.mixed_3b(x_bthwc))
        x_bthwc = max_pool(x_bthwc, (3, 3, 3), (2, 2, 2))
        for name in BLOCKS[2:7]:
            x_bthwc = getattr(self, name)(x_bthwc)
        x_bthwc = max_pool(x_bthwc, (2, 2, 2), (2, 2, 2))
        x_bthwc = self.mixed_5c(self.mixed_5b(x_bthwc))
        # Means of two neighbouring frames, then over time: inner frames count twice.
        frame_btd = jnp.mean(x_bthwc, axis=(2, 3))
        pooled_bd = jnp.mean((frame_btd[:, 1:] + frame_btd[:, :-1]) / 2, axis=1)
        return {"logits": self.logits(pooled_bd), "pooled": pooled_bd}


def same_padding(size: int, taps: int, stride: int) -> tuple[int, int]:
    """Returns the rows that TensorFlow's "SAME" adds at the start and the end."""
    total = max((-(-size // stride) - 1) * stride + taps - size, 0)
    return total // 2, total - total // 2


def _paddings(x_bthwc: jax.Array, taps, strides) -> list[tuple[int, int]]:
    return list(map(same_padding, x_bthwc.shape[1:4], taps, strides))


def convolve(x_bthwc: jax.Array, kernel_thwio: jax.Array, stride: int) -> jax.Array:
    """Convolves with "SAME" padding and one stride, 1 or 2, for time and space."""
    return jax.lax.platform_dependent(
        x_bthwc,
        kernel_thwio,
        cpu=functools.partial(_conv_cpu, stride=stride),
        default=functools.partial(_conv_direct, stride=stride),
    )


def _conv_direct(x_bthwc, kernel_thwio, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_bthwc,
        kernel_thwio,
        (stride,) * 3,
        _paddings(x_bthwc, kernel_thwio.shape[:3], (stride,) * 3),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _conv_cpu(x_bthwc, kernel_thwio, stride: int) -> jax.Array:
    kt, kh, kw, i, o = kernel_thwio.shape
    if (kt, kh, kw, stride) == (1, 1, 1, 1):
        return layers.matmul(x_bthwc, kernel_thwio[0, 0, 0], None)
    time, *space = _paddings(x_bthwc, (kt, kh, kw), (stride,) * 3)
    if stride == 1:
        behind = ((0, 0), (0, time[1]), (0, 0), (0, 0), (0, 0))
        x_bthwc = jnp.pad(x_bthwc, behind)
        return conv.causal_conv3d(x_bthwc, kernel_thwio, missing=time[0])
    # Few input channels: all time taps at once, as channels of one 2D convolution. Time
    # becomes the second to last axis, where the frames of a window are contiguous.
    count = -(-x_bthwc.shape[1] // stride)
    x_bthwc = jnp.pad(x_bthwc, ((0, 0), time, (0, 0), (0, 0), (0, 0)))
    x_bhwm = jnp.moveaxis(x_bthwc, 1, 3).reshape(*x_bthwc[:, 0].shape[:3], -1)
    windows = [x_bhwm[..., stride * k * i :][..., : kt * i] for k in range(count)]
    kernel_hwio = jnp.moveaxis(kernel_thwio, 0, 2).reshape(kh, kw, kt * i, o)
    x_bthwc = jnp.stack(windows, axis=1)
    return conv.conv2d(x_bthwc, kernel_hwio, stride=stride, padding=tuple(space))


def max_pool(x_bthwc: jax.Array, taps, strides) -> jax.Array:
    """Max pooling over windows of t x h x w, with "SAME" padding."""
    padding = _paddings(x_bthwc, taps, strides)

    def direct(x):
        return jax.lax.reduce_window(
            x,
            -jnp.inf,
            jax.lax.max,
            (1, *taps, 1),
            (1, *strides, 1),
            ((0, 0), *padding, (0, 0)),
        )

    def by_axes(x):
        for axis, (size, step, (front, behind)) in enumerate(
            zip(taps, strides, padding, strict=True), 1
        ):
            if size == 1:
                continue
            pads = [(0, 0)] * 5
            pads[axis] = (front, behind)
            x = jnp.pad(x, pads, constant_values=-jnp.inf)
            last = x.shape[axis] - size
            shifted = (
                jax.lax.slice_in_dim(x, j, last + j + 1, step, axis)
                for j in range(size)
            )
            x = jax.tree.reduce(jnp.maximum, list(shifted))
        return x

    return jax.lax.platform_dependent(x_bthwc, cpu=by_axes, default=direct)
