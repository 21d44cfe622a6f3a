"""LPIPS: how different two pictures look, by the features of a trained classifier.

arXiv 1801.03924, version 0.1: at five depths of VGG16 or AlexNet the channels of each
pixel are scaled to unit length, squared differences are weighted by a learned vector, and
the means over all pixels are added. The LPIPS of a video is the mean over its frames.

Letters: b clips, t frames, h height, w width, c channels; kernels are [h,w,i,o].
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models import conv, layers

# Mean and deviation of the classifiers' training data, rescaled from [0, 1] to [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A convolution and a ReLU; `theirs` is its number in torchvision's `features`."""

    theirs: int
    inputs: int
    outputs: int
    size: int = 3
    stride: int = 1
    padding: int = 1


def _vgg16() -> Iterator[tuple[_Layer, ...]]:
    number, before = 0, 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        widths = (before, *(width,) * count)
        numbers = range(number, number + 2 * count, 2)
        yield tuple(map(_Layer, numbers, widths, widths[1:]))
        number, before = number + 2 * count + 1, width  # one more for the pooling layer


@dataclasses.dataclass(frozen=True)
class _Trunk:
    """Layers by depth; a depth in `pooled` starts with max pooling, pool x pool, stride 2.

    least: the smallest frame side, in pixels, for which the last depth is not empty.
    """

    depths: tuple[tuple[_Layer, ...], ...]
    pool: int
    pooled: tuple[int, ...]
    least: int


_TRUNKS = {
    "vgg16": _Trunk(tuple(_vgg16()), 2, (1, 2, 3, 4), 16),
    "alexnet": _Trunk(
        (
            (_Layer(0, 3, 64, 11, 4, 2),),
            (_Layer(3, 64, 192, 5, 1, 2),),
            (_Layer(6, 192, 384),),
            (_Layer(8, 384, 256),),
            (_Layer(10, 256, 256),),
        ),
        3,
        (1, 2),
        31,
    ),
}
NETWORKS = tuple(_TRUNKS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Which classifier's features: "vgg16" or "alexnet"."""

    network: str = "vgg16"

    def __post_init__(self):
        if self.network not in _TRUNKS:
            raise ValueError(
                f"network is {self.network!r}; it must be one of {', '.join(NETWORKS)}"
            )

    @property
    def least(self) -> int:
        """The smallest frame side that the network takes, in pixels."""
        return _TRUNKS[self.network].least

    def check(self, height: int, width: int) -> None:
        """Raises ValueError where frames are too small."""
        if min(height, width) < self.least:
            raise ValueError(
                f"LPIPS with {self.network} needs frames of at least {self.least} x "
                f"{self.least} pixels, not {height} x {width}"
            )


class LPIPS(nnx.Module):
    """The distance, always computed in float32."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        trunk = _TRUNKS[config.network]
        self.convs = nnx.List(
            [_Conv(layer, rngs) for layer in itertools.chain(*trunk.depths)]
        )
        widths = [depth[-1].outputs for depth in trunk.depths]
        self.heads = nnx.List([_Head(width, rngs) for width in widths])

    def __call__(self, first_bthwc: jax.Array, second_bthwc: jax.Array) -> jax.Array:
        """Distance of clips [b, t, h, w, 3] in [-1, 1], mean over frames: float32 [b].

        With VGG16 a gradient stores about 1.2 KB of features for each pixel.

        Raises:
          ValueError: the frames are too small for the network.
        """
        b, t, h, w, _ = first_bthwc.shape
        self.config.check(h, w)
        frames = (conv.reshape(x, b * t, h, w, 3) for x in (first_bthwc, second_bthwc))
        return jnp.mean(conv.reshape(self._frames(*frames), b, t), axis=1)

    def _frames(self, first_bhwc, second_bhwc):
        total_b = 0.0
        pairs = zip(self._depths(first_bhwc), self._depths(second_bhwc), strict=True)
        for head, (a_bhwc, b_bhwc) in zip(self.heads, pairs, strict=True):
            gap_bhwc = jnp.square(_unit(a_bhwc) - _unit(b_bhwc))
            total_b = total_b + jnp.mean(gap_bhwc * head.weight[...], (1, 2)).sum(-1)
        return total_b

    def _depths(self, x_bhwc) -> list[jax.Array]:
        """Returns the features after each depth."""
        trunk, convs, features = _TRUNKS[self.config.network], iter(self.convs), []
        x_bhwc = x_bhwc.astype(jnp.float32)
        x_bhwc = (x_bhwc - jnp.array(_SHIFT)) / jnp.array(_SCALE)
        for number, depth in enumerate(trunk.depths):
            if number in trunk.pooled:
                x_bhwc = _max_pool(x_bhwc, trunk.pool)
            for layer in depth:
                x_bhwc = next(convs)(x_bhwc, layer)
            features.append(x_bhwc)
        return features


class _Conv(nnx.Module):
    """relu(convolution + bias)."""

    def __init__(self, layer: _Layer, rngs: nnx.Rngs):
        shape = (layer.size, layer.size, layer.inputs, layer.outputs)
        init = layers.fan_in_normal(int(np.prod(shape[:3])))
        self.kernel = layers.param(rngs, init, shape, (None,) * 4)
        zeros = nnx.initializers.zeros
        self.bias = layers.param(rngs, zeros, (layer.outputs,), (None,))

    def __call__(self, x_bhwc: jax.Array, layer: _Layer) -> jax.Array:
        y_bhwc = jax.lax.conv_general_dilated(
            x_bhwc,
            self.kernel[...],
            (layer.stride,) * 2,
            [(layer.padding,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,  # equal on every platform
        )
        return jax.nn.relu(y_bhwc + self.bias[...])


class _Head(nnx.Module):
    """The weight of each channel of a depth."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        uniform = nnx.initializers.uniform(1.0)
        self.weight = layers.param(rngs, uniform, (width,), (None,))


def _unit(x_bhwc: jax.Array) -> jax.Array:
    """Scales channels to unit length; gradients are finite where the length is zero."""
    square = jnp.sum(jnp.square(x_bhwc), axis=-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x_bhwc / (length + 1e-10)


def _max_pool(x_bhwc: jax.Array, size: int) -> jax.Array:
    """Max pooling, size x size, stride 2; incomplete windows are dropped."""
    b, h, w, c = x_bhwc.shape
    ends = [2 * ((side - size) // 2) + 1 for side in (h, w)]
    windows = (
        jax.lax.slice(
            x_bhwc, (0, row, col, 0), (b, row + ends[0], col + ends[1], c), (1, 2, 2, 1)
        )
        for row, col in itertools.product(range(size), repeat=2)
    )
    return functools.reduce(jnp.maximum, windows)


def network_of(trunk: Mapping[str, np.ndarray], name: str) -> str:
    """Returns which network has these weights, by its first kernel, called `name`.

    Raises:
      ValueError: the kernel is missing, or has no known network's shape.
    """
    shape = tuple(trunk[name].shape) if name in trunk else None
    for network, known in _TRUNKS.items():
        size, width = known.depths[0][0].size, known.depths[0][0].outputs
        if shape in ((width, 3, size, size), (size, size, 3, width)):
            return network
    raise ValueError(
        f"{name} is " + ("missing" if shape is None else f"of shape {shape}") + "; "
        f"weights for LPIPS are of {' or '.join(NETWORKS)}"
    )


def from_torch(
    config: Config, trunk: Mapping[str, np.ndarray], heads: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns our parameters, by dotted name, from those of torchvision and lpips.

    Args:
      config: the network.
      trunk: torchvision's `vgg16` or `alexnet`; its `classifier` is not needed.
      heads: `weights/v0.1/vgg.pth` or `alex.pth` of the lpips package.

    Raises:
      ValueError: tensors are missing, unexpected or of another shape; it names all.
    """
    trunk = {n: a for n, a in trunk.items() if not n.startswith("classifier.")}
    depths = _TRUNKS[config.network].depths
    params, problems = {}, []

    def take(source, theirs, shape, ours, arrange):
        if theirs not in source:
            problems.append(f"{theirs} is missing")
        elif tuple(source[theirs].shape) != shape:
            actual = tuple(source[theirs].shape)
            problems.append(f"{theirs} has shape {actual}, not {shape}")
        else:
            params[ours] = np.ascontiguousarray(arrange(source[theirs]), np.float32)
        expected.add(theirs)

    expected: set[str] = set()
    for number, layer in enumerate(itertools.chain(*depths)):
        shape = (layer.outputs, layer.inputs, layer.size, layer.size)
        theirs, ours = f"features.{layer.theirs}", f"convs.{number}"
        take(
            trunk,
            f"{theirs}.weight",
            shape,
            f"{ours}.kernel",
            lambda array: array.transpose(2, 3, 1, 0),
        )
        take(trunk, f"{theirs}.bias", shape[:1], f"{ours}.bias", np.asarray)
    for number, depth in enumerate(depths):
        width = depth[-1].outputs
        take(
            heads,
            f"lin{number}.model.1.weight",
            (1, width, 1, 1),
            f"heads.{number}.weight",
            np.ravel,
        )
    extra = sorted((trunk.keys() | heads.keys()) - expected)
    problems += [f"{name} is unexpected" for name in extra]
    if problems:
        raise ValueError(
            f"these are not the weights of LPIPS with {config.network}: "
            + "; ".join(problems)
        )
    return params
