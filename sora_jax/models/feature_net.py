"""The toy state network: predicts the state of a toy-world clip through 96 features.

It has the role of I3D in FVD: a Frechet distance needs features that describe the content
of a clip, and a network that predicts what is where and how it moves has them.
`experiments/train_state_network.py` trained it; its weights are in `sora_jax/evals`.

Squares of 4 x 4 pixels of single frames are encoded, then time is folded into the
channels, so that each later layer sees all frames of the clip at a position, in order.

Letters: b clips, t frames, h height, w width, c channels, d features, k colours,
s shapes, n objects counted, m moments (first, middle, last frame), x (right, down).
"""

import dataclasses
import math

import jax
from flax import nnx

from sora_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the toy state network; the defaults are those of the shipped weights.

    Attributes:
      num_frames, size: of the input clips; size in pixels, a multiple of 8.
      frame_channels: widths of the two layers over squares of single frames.
      clip_channels: channels of the layers over the folded clip: one at each place, then
        two convolutions.
      features: width of the layer that the Frechet distance uses.
      colours, shapes: numbers of those in the toy world.
      max_count: the largest count of objects of one colour.
    """

    num_frames: int = 9
    size: int = 32
    frame_channels: tuple[int, int] = (64, 48)
    clip_channels: tuple[int, int, int] = (96, 64, 48)
    features: int = 96
    colours: int = 7
    shapes: int = 4
    max_count: int = 5

    def __post_init__(self):
        if self.size % 8:
            raise ValueError(f"size is {self.size}; it must be a multiple of 8")


class StateNetwork(nnx.Module):
    """Reads the state of toy-world clips.

    Each head has one slot for every colour of the palette, so that objects need no
    order.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        first, second = config.frame_channels
        third, fourth, fifth = config.clip_channels
        places = (config.size // 8) ** 2
        self.frame1 = _Layer(4 * 4 * 3, first, rngs)
        self.frame2 = _Layer(first, second, rngs)
        self.clip1 = _Layer(config.num_frames * second, third, rngs)
        self.clip2 = _Conv(3, third, fourth, rngs)
        self.clip3 = _Conv(3, fourth, fifth, rngs)
        self.to_features = _linear(places * fifth, config.features, rngs)
        self.heads = nnx.Dict(
            {
                name: _linear(config.features, math.prod(shape), rngs)
                for name, shape in head_shapes(config).items()
            }
        )

    def features(self, video_bthwc: jax.Array) -> jax.Array:
        """Returns features [b, d] of clips [b, t, h, w, 3] in [-1, 1], float32.

        Raises:
          ValueError: the clips are not of the configured shape.
        """
        config = self.config
        expected = (config.num_frames, config.size, config.size, 3)
        if video_bthwc.shape[1:] != expected:
            raise ValueError(
                f"the state network takes clips of {expected}, got "
                f"{video_bthwc.shape[1:]}"
            )
        x_bthwc = self.frame2(self.frame1(_squares(video_bthwc, 4)))
        b, t, h, w, c = x_bthwc.shape
        x_bhwc = x_bthwc.transpose(0, 2, 3, 1, 4).reshape(b, h, w, t * c)
        x_bhwc = self.clip3(self.clip2(self.clip1(x_bhwc)), stride=2)
        return self.to_features(x_bhwc.reshape(b, -1))

    def __call__(self, video_bthwc: jax.Array) -> dict[str, jax.Array]:
        """Returns the features and what the heads read from them.

        Returns:
          features [b, d];
          count [b, k, n]: logits of the number of objects of a colour (0 .. max);
          shape [b, k, s]: logits of the shape of a colour's objects;
          position [b, k, m, x]: their centre in the first, middle and last frame, in
            frame widths from the frame's centre;
          velocity [b, k, x]: pixels a frame;
          radius [b, k]: pixels;
          camera [b, 3]: motion of the background right and down in pixels a frame,
            and the growth of its scale in the whole clip (natural logarithm);
          side [b, 4]: logits of where the first of two colours is from the second:
            left, right, above, below;
          quality [b, 2]: blur in pixels and noise (pixel values in [-1, 1]) of the
            clip. What is to be read despite blur leaves the features; this brings it
            back, so that they tell blurred clips from sharp ones.
        """
        features_bd = self.features(video_bthwc)
        x = jax.nn.gelu(features_bd)
        read = {
            name: self.heads[name](x).reshape(len(x), *shape)
            for name, shape in head_shapes(self.config).items()
        }
        return {"features": features_bd, **read}


def head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each head's output for one clip."""
    k = config.colours
    return {
        "count": (k, config.max_count + 1),
        "shape": (k, config.shapes),
        "position": (k, 3, 2),
        "velocity": (k, 2),
        "radius": (k,),
        "camera": (3,),
        "side": (4,),
        "quality": (2,),
    }


class _Layer(nnx.Module):
    """gelu(norm(x W)) over the last axis."""

    def __init__(self, i: int, o: int, rngs: nnx.Rngs):
        self.linear = _linear(i, o, rngs)
        self.norm = layers.LayerNorm(o, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.norm(self.linear(x)))


class _Conv(nnx.Module):
    """gelu(norm(k x k convolution)) of pictures."""

    def __init__(self, k: int, i: int, o: int, rngs: nnx.Rngs):
        init = layers.fan_in_normal(k * k * i)
        self.kernel = layers.param(rngs, init, (k, k, i, o), (None,) * 4)
        self.norm = layers.LayerNorm(o, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array, *, stride: int = 1) -> jax.Array:
        y_bhwc = jax.lax.conv_general_dilated(
            x_bhwc,
            self.kernel[...],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.gelu(self.norm(y_bhwc))


def _linear(i: int, o: int, rngs: nnx.Rngs) -> layers.Linear:
    return layers.Linear(i, o, axes=(None, None), rngs=rngs)


def _squares(x: jax.Array, side: int) -> jax.Array:
    """Moves squares of pixels into channels: [..., h, w, c] to a coarser grid."""
    *lead, h, w, c = x.shape
    x = x.reshape(*lead, h // side, side, w // side, side, c)
    x = x.swapaxes(-4, -3)
    return x.reshape(*lead, h // side, w // side, side * side * c)
