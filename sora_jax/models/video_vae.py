"""The video autoencoder: causal in time, 1 + 4n frames to 1 + n latent frames.

One class in the two layouts of Wan (arXiv 2503.20314): that of Wan 2.1, and that of
Wan 2.2, which folds pixels into channels first and carries a mean / repeat shortcut
past every level (`residual_shortcuts`). The first frame stands alone: it never takes
part in a change of the frame rate, so an image is a video of one frame. Norms look at
the channels of one voxel only; nothing is averaged over time, so that no latent frame
depends on later video frames.

A whole clip goes through in one pass, with the result that diffusers' AutoencoderKLWan
reaches frame by frame with its feature caches.

Letters: b batch, t time, h height, w width, c channels.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.models import attention, conv, layers

Step = tuple[bool, bool]  # from level to level: whether it halves time, and space


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and forms; the default is the toy, 4 x 8 x 8 with 32 channels.

    `latent_mean` and `latent_std` are measured once, after training, and kept here,
    with the sizes, since they are no parameters: empty means 0 and 1.
    """

    video_channels: int = 3
    latent_channels: int = 32
    patch_size: int = 2  # pixels a side that are folded into channels
    base_dim: int = 32  # channels of the first level
    decoder_base_dim: int | None = None  # the same where None
    channel_multipliers: tuple[int, ...] = (1, 2, 2)  # one a level
    num_res_blocks: int = 2  # a level of the encoder; the decoder has one more
    # One entry for each step from level to level: whether it halves time, and whether
    # it halves height and width (None: all of them do).
    temporal_downsample: tuple[bool, ...] = (True, True)
    spatial_downsample: tuple[bool, ...] | None = None
    residual_shortcuts: bool = True
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    dtype: str = "float32"  # compute type; parameters are float32

    def __post_init__(self):
        steps = len(self.channel_multipliers) - 1
        for name in ("temporal_downsample", "spatial_downsample"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != steps:
                raise ValueError(
                    f"{steps + 1} channel_multipliers have {steps} steps between them, "
                    f"but {name} has {len(entries)} entries"
                )
        if not all(map(any, self.steps)):
            raise ValueError("a step halves neither time nor height and width")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; it takes one for "
                    f"each of the {self.latent_channels} latent channels, or none"
                )

        if self.residual_shortcuts:
            self._check_shortcuts()
        elif not all(space for _, space in self.steps):
            raise ValueError("without residual_shortcuts every step halves space")

    def _check_shortcuts(self) -> None:
        """Checks that every shortcut averages, or repeats, a whole number of times."""
        blocks = [2 ** (time + 2 * space) for time, space in self.steps]
        encoder = self.widths(self.base_dim)
        decoder = self.widths(self.decoder_base_dim or self.base_dim)[::-1]
        ways = [
            (i * block, o)
            for i, o, block in zip(
                encoder[:1] + encoder, encoder, [*blocks, 1], strict=False
            )
        ] + [
            (o * block, i)
            for i, o, block in zip(
                decoder[:1] + decoder, decoder, blocks[::-1], strict=False
            )
        ]
        for many, few in ways:
            if many % few:
                raise ValueError(
                    f"channel_multipliers {self.channel_multipliers} leave a residual "
                    f"shortcut between {many} and {few} channels, which does not divide"
                )

    def widths(self, base: int) -> tuple[int, ...]:
        """Returns the channels of each level, finest first."""
        return tuple(base * multiplier for multiplier in self.channel_multipliers)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What each step from level to level halves, finest first: (time, space)."""
        every = (True,) * len(self.temporal_downsample)
        space = every if self.spatial_downsample is None else self.spatial_downsample
        return tuple(zip(self.temporal_downsample, space, strict=True))

    @property
    def temporal_stride(self) -> int:
        """Video frames in each latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels a side in each latent voxel."""
        return self.patch_size * 2 ** sum(space for _, space in self.steps)

    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Returns the latent's (time, height, width, channels) for a video's size.

        Raises:
          ValueError: the size is impossible; the message names the nearest possible.
        """
        stride, space = self.temporal_stride, self.spatial_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            below = 1 + max(num_frames - 1, 0) // stride * stride
            raise ValueError(
                f"num_frames is {num_frames}; the video VAE takes 1 + {stride}n frames, "
                f"so {below} or {below + stride}"
            )
        if height < 1 or width < 1 or height % space or width % space:
            nearest = [max(1, round(size / space)) * space for size in (height, width)]
            raise ValueError(
                f"height x width is {height} x {width}; the video VAE takes multiples "
                f"of {space}, the nearest being {nearest[0]} x {nearest[1]}"
            )
        t = 1 + (num_frames - 1) // stride
        return t, height // space, width // space, self.latent_channels


WAN_2_1 = Config(
    latent_channels=16,
    patch_size=1,
    base_dim=96,
    channel_multipliers=(1, 2, 4, 4),
    temporal_downsample=(False, True, True),
    residual_shortcuts=False,
)
WAN_2_2 = Config(
    latent_channels=48,
    patch_size=2,
    base_dim=160,
    decoder_base_dim=256,
    channel_multipliers=(1, 2, 4, 4),
    temporal_downsample=(False, True, True),
    residual_shortcuts=True,
)


def _normal(std: float):
    """Normal initializer that draws in one dimension.

    Compiling JAX's generator for five dimensions takes ten times as long, and there is
    a kernel for each of a hundred layers.
    """

    def init(key, shape, dtype):
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


class Conv(nnx.Module):
    """A convolution with bias: kernel [t,h,w,i,o] sees no later frame, [h,w,i,o] one.

    The kernel is split over the data-parallel devices by output channel, where `split`.
    """

    def __init__(
        self, taps: tuple[int, ...], i: int, o: int, *, split=True, init=None, rngs
    ):
        self.axes = (*(None,) * (len(taps) + 1), "embed" if split else None)
        init = init or _normal((math.prod(taps) * i) ** -0.5)
        self.kernel = layers.param(rngs, init, (*taps, i, o), self.axes)
        self.bias = layers.param(rngs, nnx.initializers.zeros, (o,), (None,))

    def __call__(
        self, x_bthwc: jax.Array, operation=conv.causal_conv3d, **options
    ) -> jax.Array:
        kernel = sharding.gather_weight(self.kernel[...], self.axes)
        y_bthwo = operation(x_bthwc, kernel.astype(x_bthwc.dtype), **options)
        return y_bthwo + self.bias[...].astype(y_bthwo.dtype)


def _norm(c: int, rngs: nnx.Rngs) -> layers.RMSNorm:
    # Wan divides by max(norm, 1e-12): next to no floor, which small activations need.
    return layers.RMSNorm(c, eps=1e-24, rngs=rngs)


class ResBlock(nnx.Module):
    """Two times norm, SiLU, convolution; added to the input."""

    def __init__(self, i: int, o: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.norm1 = _norm(i, rngs)
        self.conv1 = Conv((3, 3, 3), i, o, rngs=rngs)
        self.norm2 = _norm(o, rngs)
        self.conv2 = Conv((3, 3, 3), o, o, init=zeros, rngs=rngs)
        self.conv_shortcut = layers.Linear(i, o, rngs=rngs) if i != o else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x_bthwc)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x_bthwc) if self.conv_shortcut else x_bthwc)


class FrameAttention(nnx.Module):
    """Self-attention with one head among the voxels of each frame."""

    def __init__(self, c: int, *, rngs: nnx.Rngs):
        self.norm = _norm(c, rngs)
        self.to_qkv = layers.Linear(c, 3 * c, rngs=rngs)
        self.proj = layers.Linear(c, c, init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        b, t, h, w, c = x_bthwc.shape
        frames_nmc = conv.reshape(self.norm(x_bthwc), b * t, h * w, c)
        q, k, v = jnp.split(self.to_qkv(frames_nmc)[:, :, None], 3, axis=-1)
        y_nmc = self.proj(attention.attention(q, k, v)[:, :, 0])
        return x_bthwc + conv.reshape(y_nmc, b, t, h, w, c)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, c: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResBlock(c, c, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(c, rngs=rngs)])

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.attentions[0](self.resnets[0](x_bthwc))
        return self.resnets[1](x_bthwc)


class Downsample(nnx.Module):
    """Halves height and width (`space`), and 1 + 2n frames to 1 + n (`time`)."""

    def __init__(self, c: int, time: bool, space: bool, *, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), c, c, rngs=rngs) if space else None
        self.time_conv = Conv((3, 1, 1), c, c, rngs=rngs) if time else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        if self.conv is not None:
            padding = ((0, 1), (0, 1))
            x_bthwc = self.conv(x_bthwc, conv.conv2d, stride=2, padding=padding)
        if self.time_conv is None or x_bthwc.shape[1] == 1:
            return x_bthwc
        rest = self.time_conv(x_bthwc, conv.half_time_conv)
        return jnp.concatenate([x_bthwc[:, :1], rest], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width (`space`), and 1 + n frames to 1 + 2n (`time`)."""

    def __init__(self, i: int, o: int, time: bool, space: bool, *, rngs: nnx.Rngs):
        self.time_conv = Conv((3, 1, 1), i, 2 * i, rngs=rngs) if time else None
        self.conv = Conv((3, 3), i, o, rngs=rngs) if space else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        b, t, h, w, c = x_bthwc.shape
        if self.time_conv is not None and t > 1:
            # The convolution in time begins at the second frame; it does not see the
            # first one, and gives two frames for each, one after the other.
            pairs = conv.reshape(self.time_conv(x_bthwc[:, 1:]), b, t - 1, h, w, 2, c)
            rest = conv.reshape(
                pairs.transpose(0, 1, 4, 2, 3, 5), b, 2 * t - 2, h, w, c
            )
            x_bthwc = jnp.concatenate([x_bthwc[:, :1], rest], axis=1)
        if self.conv is None:
            return x_bthwc
        return self.conv(conv.double_space(x_bthwc), conv.conv2d)


def mean_shortcut(x_bthwc: jax.Array, o: int, time: int, space: int) -> jax.Array:
    """Shrinks by folding blocks into channels and averaging them to `o` channels."""
    front = -x_bthwc.shape[1] % time  # the first frame is alone in its block
    x_bthwc = jnp.pad(x_bthwc, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
    x_bthwcf = conv.fold(x_bthwc, time, space)
    return jnp.mean(conv.reshape(x_bthwcf, *x_bthwcf.shape[:4], o, -1), axis=-1)


def repeat_shortcut(x_bthwc: jax.Array, o: int, time: int, space: int) -> jax.Array:
    """Grows by repeating channels and unfolding them to blocks of `o` channels."""
    blocks = time * space * space
    repeats = o * blocks // x_bthwc.shape[-1]
    x = jnp.broadcast_to(x_bthwc[..., None], (*x_bthwc.shape, repeats))
    x = conv.reshape(x, *x_bthwc.shape[:4], o, blocks)
    return conv.unfold(x, time, space)[:, time - 1 :]


class DownBlock(nnx.Module):
    """A level of the encoder: residual blocks, then a halving except at the last."""

    def __init__(
        self, config: Config, i: int, o: int, step: Step | None, *, rngs: nnx.Rngs
    ):
        widths = [i] + [o] * config.num_res_blocks
        self.resnets = nnx.List(
            [ResBlock(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]
        )
        self.downsampler = Downsample(o, *step, rngs=rngs) if step else None
        time, space = step or (False, False)
        self.shortcut = (o, 1 + time, 1 + space) if config.residual_shortcuts else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        y = x_bthwc
        for resnet in self.resnets:
            y = resnet(y)
        if self.downsampler is not None:
            y = self.downsampler(y)
        return y + mean_shortcut(x_bthwc, *self.shortcut) if self.shortcut else y


class UpBlock(nnx.Module):
    """A level of the decoder: residual blocks, then a doubling except at the last."""

    def __init__(
        self, config: Config, i: int, o: int, step: Step | None, *, rngs: nnx.Rngs
    ):
        widths = [i] + [o] * (config.num_res_blocks + 1)
        self.resnets = nnx.List(
            [ResBlock(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]
        )
        out = o if config.residual_shortcuts else o // 2
        self.upsampler = Upsample(o, out, *step, rngs=rngs) if step else None
        self.shortcut = (
            (o, *(1 + halved for halved in step))
            if config.residual_shortcuts and step
            else None
        )

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        y = x_bthwc
        for resnet in self.resnets:
            y = resnet(y)
        if self.upsampler is not None:
            y = self.upsampler(y)
        return y + repeat_shortcut(x_bthwc, *self.shortcut) if self.shortcut else y


class Encoder(nnx.Module):
    """Folded pixels to the two moments of the latent."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.widths(config.base_dim)
        pixels = config.video_channels * config.patch_size**2
        steps = (*config.steps, None)
        self.conv_in = Conv((3, 3, 3), pixels, widths[0], split=False, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(config, *pair, step, rngs=rngs)
                for pair, step in zip(
                    itertools.pairwise((widths[0], *widths)), steps, strict=True
                )
            ]
        )
        self.mid_block = MidBlock(widths[-1], rngs=rngs)
        self.norm_out = _norm(widths[-1], rngs)
        self.conv_out = Conv(
            (3, 3, 3), widths[-1], 2 * config.latent_channels, split=False, rngs=rngs
        )

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.conv_in(x_bthwc)
        for block in self.down_blocks:
            x_bthwc = block(x_bthwc)
        x_bthwc = self.mid_block(x_bthwc)
        return self.conv_out(jax.nn.silu(self.norm_out(x_bthwc)))


class Decoder(nnx.Module):
    """Latents to folded pixels."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.widths(config.decoder_base_dim or config.base_dim)[::-1]
        pixels = config.video_channels * config.patch_size**2
        steps = (*config.steps[::-1], None)
        self.conv_in = Conv(
            (3, 3, 3), config.latent_channels, widths[0], split=False, rngs=rngs
        )
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        # Without shortcuts an upsampler halves the channels on the way.
        inputs = [widths[0]] + [
            width if config.residual_shortcuts else width // 2 for width in widths[:-1]
        ]
        self.up_blocks = nnx.List(
            [
                UpBlock(config, i, o, step, rngs=rngs)
                for i, o, step in zip(inputs, widths, steps, strict=True)
            ]
        )
        self.norm_out = _norm(widths[-1], rngs)
        self.conv_out = Conv((3, 3, 3), widths[-1], pixels, split=False, rngs=rngs)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.mid_block(self.conv_in(x_bthwc))
        for block in self.up_blocks:
            x_bthwc = block(x_bthwc)
        return self.conv_out(jax.nn.silu(self.norm_out(x_bthwc)))


class VideoVAE(nnx.Module):
    """The autoencoder. See the head of this file; `Config` holds its sizes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = layers.Linear(2 * c, 2 * c, axes=(None, None), rngs=rngs)
        # Sampled latents begin next to their mean, or the noise would drown it at first.
        self.quant_conv.bias[...] = jnp.repeat(jnp.asarray([0.0, -10.0]), c)
        self.post_quant_conv = layers.Linear(c, c, axes=(None, None), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance of the latent, as they are (not normalized).

        Args:
          video_bthwc: pixels in [-1, 1], 1 + 4n frames of a size that the strides divide.

        Returns:
          mean_bthwc and logvar_bthwc, float32, the latter in [-30, 20].

        Raises:
          ValueError: the size is impossible; the message names the nearest possible.
        """
        self.config.latent_shape(*video_bthwc.shape[1:4])
        x = _fold_pixels(video_bthwc, self.config.patch_size)
        x = self.quant_conv(self.encoder(x.astype(self.config.dtype)))
        mean_bthwc, logvar_bthwc = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean_bthwc, jnp.clip(logvar_bthwc, -30.0, 20.0)

    def decode(self, latents_bthwc: jax.Array) -> jax.Array:
        """Returns the video of latents that are not normalized.

        The pixels are float32 around [-1, 1]; they are clipped where they become bytes,
        so that training sees a gradient everywhere.
        """
        x = self.post_quant_conv(latents_bthwc.astype(self.config.dtype))
        x = self.decoder(x).astype(jnp.float32)
        return _unfold_pixels(x, self.config.patch_size)

    def normalize(self, latents_bthwc: jax.Array) -> jax.Array:
        """Shifts and scales encoded latents to mean 0 and deviation 1 per channel."""
        mean, std = self._statistics()
        return (latents_bthwc - mean) / std

    def denormalize(self, latents_bthwc: jax.Array) -> jax.Array:
        """Undoes `normalize`; what a denoiser made must pass here before `decode`."""
        mean, std = self._statistics()
        return latents_bthwc * std + mean

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        c = self.config.latent_channels
        mean = jnp.asarray(self.config.latent_mean or (0.0,) * c, jnp.float32)
        std = jnp.asarray(self.config.latent_std or (1.0,) * c, jnp.float32)
        return mean, std


def _fold_pixels(video_bthwc: jax.Array, patch: int) -> jax.Array:
    """Moves patches into channels in Wan's order: colour, column, row."""
    x = conv.fold(video_bthwc, 1, patch)
    x = conv.reshape(x, *x.shape[:5], patch, patch).swapaxes(-1, -2)
    return conv.reshape(x, *x.shape[:4], -1)


def _unfold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    x = conv.reshape(x_bthwc, *x_bthwc.shape[:4], -1, patch, patch).swapaxes(-1, -2)
    return conv.unfold(conv.reshape(x, *x.shape[:5], -1), 1, patch)
