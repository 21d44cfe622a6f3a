"""The layers of the video autoencoder.

Layers that look back in time read the frames before their input from a `streaming.Past`,
and write their own to it; at the start of a video it is empty.

Letters: b batch, t time, h height, w width, c channels, i input and o output channels.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.models import attention, conv, layers, streaming


def _normal(std: float):
    """Normal initializer that draws a flat array.

    Compiling JAX's generator for five dimensions takes ten times as long, and a hundred
    layers have kernels.
    """

    def init(key, shape, dtype):
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


class Conv(nnx.Module):
    """A convolution with bias: [t,h,w,i,o] causal over frames, [h,w,i,o] in each frame.

    With `split` the kernel's output channels are sharded over the data-parallel devices.
    """

    def __init__(
        self, taps: tuple[int, ...], i: int, o: int, *, split=True, init=None, rngs
    ):
        self.axes = (*(None,) * (len(taps) + 1), "embed" if split else None)
        init = init or _normal((math.prod(taps) * i) ** -0.5)
        self.kernel = layers.param(rngs, init, (*taps, i, o), self.axes)
        self.bias = layers.param(rngs, nnx.initializers.zeros, (o,), (None,))

    def __call__(self, x_bthwc: jax.Array, operation=conv.conv2d, **options):
        kernel = sharding.gather_weight(self.kernel[...], self.axes)
        y_bthwo = operation(x_bthwc, kernel.astype(x_bthwc.dtype), **options)
        return y_bthwo + self.bias[...].astype(y_bthwo.dtype)

    def causal(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        """Convolves the frames of x, with as many earlier ones as the kernel needs."""
        x_bthwc, missing = past.join(x_bthwc, len(self.kernel) - 1)
        return self(x_bthwc, conv.causal_conv3d, missing=missing)


def conv_out(is_added: bool, i: int, o: int, rngs: nnx.Rngs) -> Conv:
    """The last convolution; zero at first where a linear codec's result is added."""
    init = nnx.initializers.zeros if is_added else None
    return Conv((3, 3, 3), i, o, split=False, init=init, rngs=rngs)


class LinearCodec(nnx.Module):
    """Channels of each latent voxel as a linear map of its block of pixels, and back.

    The first frame of a video is a block of one frame, with its own maps. Initialized with
    the principal components of blocks (training/principal.py) it is the best linear codec,
    from which the autoencoder then starts. Float32.

    Args:
      time, space: frames of a block, and pixels along its height and width.
      pixels: channels of a pixel.
      c: latent channels that it encodes to, `Config.linear_channels`.
    """

    def __init__(self, time: int, space: int, pixels: int, c: int, *, rngs: nnx.Rngs):
        self.time, self.space = time, space
        first, rest = pixels * space**2, pixels * space**2 * time
        options = {"axes": (None, None), "rngs": rngs}
        self.encode_first = layers.Linear(first, c, **options)
        self.encode_rest = layers.Linear(rest, c, **options)
        self.decode_first = layers.Linear(c, first, **options)
        self.decode_rest = layers.Linear(c, rest, **options)

    def encode(self, video_bthwc: jax.Array, is_first: bool) -> jax.Array:
        """Encodes blocks of pixels; `is_first`: the video starts here."""
        x_bthwc = video_bthwc.astype(jnp.float32)
        first, rest = jnp.split(x_bthwc, [int(is_first)], axis=1)
        parts = []
        if is_first:
            parts.append(self.encode_first(self._fold(first, 1)))
        if rest.shape[1]:
            parts.append(self.encode_rest(self._fold(rest, self.time)))
        return jnp.concatenate(parts, axis=1)

    def decode(self, latents_bthwc: jax.Array, is_first: bool) -> jax.Array:
        """Decodes latents to pixels; `is_first`: the video starts here."""
        x_bthwc = latents_bthwc.astype(jnp.float32)
        first, rest = jnp.split(x_bthwc, [int(is_first)], axis=1)
        parts = []
        if is_first:
            parts.append(self._unfold(self.decode_first(first), 1))
        if rest.shape[1]:
            parts.append(self._unfold(self.decode_rest(rest), self.time))
        return jnp.concatenate(parts, axis=1)

    def _fold(self, x_bthwc: jax.Array, time: int) -> jax.Array:
        x = conv.fold(x_bthwc, time=time, space=self.space)
        return conv.reshape(x, *x.shape[:4], -1)

    def _unfold(self, x_bthwm: jax.Array, time: int) -> jax.Array:
        blocks = time * self.space**2
        x = conv.reshape(x_bthwm, *x_bthwm.shape[:4], -1, blocks)
        return conv.unfold(x, time=time, space=self.space)


def norm(c: int, rngs: nnx.Rngs) -> layers.RMSNorm:
    """RMSNorm over the channels of a voxel."""
    # Wan divides by max(norm, 1e-12): a tiny eps, which small activations need.
    return layers.RMSNorm(c, eps=1e-24, rngs=rngs)


class ResBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, with a residual connection."""

    def __init__(self, i: int, o: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.norm1 = norm(i, rngs)
        self.conv1 = Conv((3, 3, 3), i, o, rngs=rngs)
        self.norm2 = norm(o, rngs)
        self.conv2 = Conv((3, 3, 3), o, o, init=zeros, rngs=rngs)
        self.conv_shortcut = layers.Linear(i, o, rngs=rngs) if i != o else None

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        h = self.conv1.causal(jax.nn.silu(self.norm1(x_bthwc)), past)
        h = self.conv2.causal(jax.nn.silu(self.norm2(h)), past)
        return h + (self.conv_shortcut(x_bthwc) if self.conv_shortcut else x_bthwc)


class FrameAttention(nnx.Module):
    """Self-attention with one head over the voxels of each frame."""

    def __init__(self, c: int, *, rngs: nnx.Rngs):
        self.norm = norm(c, rngs)
        self.to_qkv = layers.Linear(c, 3 * c, rngs=rngs)
        self.proj = layers.Linear(c, c, init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        frames_nmc = conv.join_voxels(self.norm(x_bthwc))
        q, k, v = jnp.split(self.to_qkv(frames_nmc)[:, :, None], 3, axis=-1)
        y_nmc = self.proj(attention.attention(q, k, v)[:, :, 0])
        return x_bthwc + conv.split_voxels(y_nmc, x_bthwc)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, c: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResBlock(c, c, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(c, rngs=rngs)])

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        x_bthwc = self.attentions[0](self.resnets[0](x_bthwc, past))
        return self.resnets[1](x_bthwc, past)


class Downsample(nnx.Module):
    """Halves height and width (`space`), and frames (`time`): 1 + 2n to 1 + n.

    The first frame of a video stays as it is.
    """

    def __init__(self, c: int, time: bool, space: bool, *, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), c, c, rngs=rngs) if space else None
        self.time_conv = Conv((3, 1, 1), c, c, rngs=rngs) if time else None

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        if self.conv is not None:
            x_bthwc = self.conv(x_bthwc, stride=2, padding=((0, 1), (0, 1)))
        if self.time_conv is None:
            return x_bthwc
        begin = x_bthwc[:, : int(past.is_first)]
        x_bthwc, _ = past.join(x_bthwc, 1)
        if x_bthwc.shape[1] == 1:
            return begin
        rest = self.time_conv(x_bthwc, conv.half_time_conv)
        return jnp.concatenate([begin, rest], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width (`space`), and frames (`time`): 1 + n to 1 + 2n.

    The first frame of a video stays as it is.
    """

    def __init__(self, i: int, o: int, time: bool, space: bool, *, rngs: nnx.Rngs):
        self.time_conv = Conv((3, 1, 1), i, 2 * i, rngs=rngs) if time else None
        self.conv = Conv((3, 3), i, o, rngs=rngs) if space else None

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        if self.time_conv is not None:
            x_bthwc = self._double_time(x_bthwc, past)
        if self.conv is None:
            return x_bthwc
        return self.conv(conv.double_space(x_bthwc))

    def _double_time(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        # The temporal convolution starts at the second frame, does not see the first, and
        # makes two consecutive frames of each.
        first, rest = jnp.split(x_bthwc, [int(past.is_first)], axis=1)
        joined, missing = past.join(rest, len(self.time_conv.kernel) - 1)
        if not rest.shape[1]:
            return first
        pairs = self.time_conv(joined, conv.causal_conv3d, missing=missing)
        pairs = conv.reshape(pairs, *rest.shape[:4], 2, -1).swapaxes(-1, -2)
        return jnp.concatenate([first, conv.unfold(pairs, time=2, space=1)], axis=1)


def mean_shortcut(x_bthwc: jax.Array, o: int, time: int, space: int) -> jax.Array:
    """Downsamples by folding blocks into channels and averaging these to `o`."""
    front = -x_bthwc.shape[1] % time  # the first frame has a block of its own
    x_bthwc = jnp.pad(x_bthwc, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
    x_bthwcf = conv.fold(x_bthwc, time=time, space=space)
    return jnp.mean(conv.reshape(x_bthwcf, *x_bthwcf.shape[:4], o, -1), axis=-1)


def repeat_shortcut(
    x_bthwc: jax.Array, o: int, time: int, space: int, *, is_first: bool
) -> jax.Array:
    """Upsamples by repeating channels and unfolding them to blocks of `o` channels.

    The first frame of a video stays one frame, the last of its block.
    """
    blocks = time * space * space
    repeats = o * blocks // x_bthwc.shape[-1]
    x = jnp.broadcast_to(x_bthwc[..., None], (*x_bthwc.shape, repeats))
    x = conv.reshape(x, *x_bthwc.shape[:4], o, blocks)
    return conv.unfold(x, time=time, space=space)[:, is_first * (time - 1) :]
