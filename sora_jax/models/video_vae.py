"""The video autoencoder: causal in time, 1 + 4n frames to 1 + n latent frames.

One class has both architectures of Wan (arXiv 2503.20314): Wan 2.1, and Wan 2.2, which
folds pixels into channels first and has a mean / repeat shortcut around every level
(`residual_shortcuts`). The first frame is apart: temporal down- and upsampling skips it,
so an image is a video of one frame. Norms are over the channels of one voxel; nothing is
averaged over time, so no latent frame depends on later video frames.

A whole clip takes one pass, with the result that diffusers' AutoencoderKLWan computes
frame by frame with feature caches; or it is processed in chunks of any size
(`encode_stream`, `decode_stream`), with a state between them. Frames may be sharded by
height and width: the layers keep the sharding of their input.

Letters: b batch, t time, h height, w width, c channels.
"""

import dataclasses
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.models import conv, layers, streaming, vae_layers

Step = tuple[bool, bool]  # between levels: whether it halves time, and space


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options; the default is the toy, 4 x 8 x 8 with 32 channels.

    `latent_mean` and `latent_std` are measured once, after training. They are here since
    they are not parameters; empty means 0 and 1.
    """

    video_channels: configs.Size = 3
    latent_channels: configs.Size = 32
    patch_size: configs.Size = 2  # side of the squares of pixels folded into channels
    base_dim: configs.Size = 32  # channels of the first level
    decoder_base_dim: configs.Size | None = None  # None: base_dim
    channel_multipliers: tuple[configs.Size, ...] = (1, 2, 2)  # one per level
    num_res_blocks: configs.Size = (
        2  # per level of the encoder; the decoder has one more
    )
    # One entry for each step between levels: whether it halves time, and whether it halves
    # height and width (None: all of them do).
    temporal_downsample: tuple[bool, ...] = (True, True)
    spatial_downsample: tuple[bool, ...] | None = None
    residual_shortcuts: bool = True
    # Beyond Wan: a linear codec encodes pixels to the first so many latent channels, and
    # decodes these; the network adds to both. It needs channels of its own, since the
    # codec decodes what it adds to the codec's channels to wrong pixels. See LinearCodec.
    linear_channels: Annotated[int, configs.Range("[0, 1e6]")] = 0
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
            raise ValueError("every step must halve time, or height and width")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; it needs one for "
                    f"each of the {self.latent_channels} latent channels, or none"
                )
        if not 0 <= self.linear_channels <= self.latent_channels:
            raise ValueError(
                f"linear_channels is {self.linear_channels}; it must be from 0 to the "
                f"{self.latent_channels} latent channels"
            )

        if self.residual_shortcuts:
            self._check_shortcuts()
        elif not all(space for _, space in self.steps):
            raise ValueError("without residual_shortcuts every step must halve space")

    def _check_shortcuts(self) -> None:
        """Checks that the channels at the two ends of every shortcut divide."""
        blocks = [2 ** (time + 2 * space) for time, space in self.steps]
        encoder = self.widths(self.base_dim)
        decoder = self.widths(self.decoder_base_dim or self.base_dim)[::-1]
        shortcuts = [
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
        for many, few in shortcuts:
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
        """Whether each step between levels halves (time, space), finest first."""
        all_steps = (True,) * len(self.temporal_downsample)
        space = (
            all_steps if self.spatial_downsample is None else self.spatial_downsample
        )
        return tuple(zip(self.temporal_downsample, space, strict=True))

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, except for the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent voxel, along height and width."""
        return self.patch_size * 2 ** sum(space for _, space in self.steps)

    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Returns the latent's (time, height, width, channels) for a video's size.

        Raises:
          ValueError: the size is not valid; the message names the nearest valid one.
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


class DownBlock(nnx.Module):
    """A level of the encoder: residual blocks, then downsampling except at the last."""

    def __init__(
        self, config: Config, i: int, o: int, step: Step | None, *, rngs: nnx.Rngs
    ):
        widths = [i] + [o] * config.num_res_blocks
        self.resnets = nnx.List(
            [
                vae_layers.ResBlock(*pair, rngs=rngs)
                for pair in itertools.pairwise(widths)
            ]
        )
        self.downsampler = vae_layers.Downsample(o, *step, rngs=rngs) if step else None
        time, space = step or (False, False)
        self.shortcut = (o, 1 + time, 1 + space) if config.residual_shortcuts else None

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        y = x_bthwc
        for resnet in self.resnets:
            y = resnet(y, past)
        if self.downsampler is not None:
            y = self.downsampler(y, past)
        return (
            y + vae_layers.mean_shortcut(x_bthwc, *self.shortcut)
            if self.shortcut
            else y
        )


class UpBlock(nnx.Module):
    """A level of the decoder: residual blocks, then upsampling except at the last."""

    def __init__(
        self, config: Config, i: int, o: int, step: Step | None, *, rngs: nnx.Rngs
    ):
        widths = [i] + [o] * (config.num_res_blocks + 1)
        self.resnets = nnx.List(
            [
                vae_layers.ResBlock(*pair, rngs=rngs)
                for pair in itertools.pairwise(widths)
            ]
        )
        out = o if config.residual_shortcuts else o // 2
        self.upsampler = vae_layers.Upsample(o, out, *step, rngs=rngs) if step else None
        self.shortcut = (
            (o, *(1 + halved for halved in step))
            if config.residual_shortcuts and step
            else None
        )

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        y = x_bthwc
        for resnet in self.resnets:
            y = resnet(y, past)
        if self.upsampler is not None:
            y = self.upsampler(y, past)
        if self.shortcut is None:
            return y
        return y + vae_layers.repeat_shortcut(
            x_bthwc, *self.shortcut, is_first=past.is_first
        )


class Encoder(nnx.Module):
    """Folded pixels to mean and log variance of the latent."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.widths(config.base_dim)
        pixels = config.video_channels * config.patch_size**2
        steps = (*config.steps, None)
        self.conv_in = vae_layers.Conv(
            (3, 3, 3), pixels, widths[0], split=False, rngs=rngs
        )
        self.down_blocks = nnx.List(
            [
                DownBlock(config, *pair, step, rngs=rngs)
                for pair, step in zip(
                    itertools.pairwise((widths[0], *widths)), steps, strict=True
                )
            ]
        )
        self.mid_block = vae_layers.MidBlock(widths[-1], rngs=rngs)
        self.norm_out = vae_layers.norm(widths[-1], rngs)
        self.conv_out = vae_layers.conv_out(
            config.linear_channels > 0, widths[-1], 2 * config.latent_channels, rngs
        )

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        x_bthwc = self.conv_in.causal(x_bthwc, past)
        for block in self.down_blocks:
            x_bthwc = block(x_bthwc, past)
        x_bthwc = self.mid_block(x_bthwc, past)
        return self.conv_out.causal(jax.nn.silu(self.norm_out(x_bthwc)), past)


class Decoder(nnx.Module):
    """Latents to folded pixels."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.widths(config.decoder_base_dim or config.base_dim)[::-1]
        pixels = config.video_channels * config.patch_size**2
        steps = (*config.steps[::-1], None)
        self.conv_in = vae_layers.Conv(
            (3, 3, 3), config.latent_channels, widths[0], split=False, rngs=rngs
        )
        self.mid_block = vae_layers.MidBlock(widths[0], rngs=rngs)
        # Without shortcuts an upsampler also halves the channels.
        inputs = [widths[0]] + [
            width if config.residual_shortcuts else width // 2 for width in widths[:-1]
        ]
        self.up_blocks = nnx.List(
            [
                UpBlock(config, i, o, step, rngs=rngs)
                for i, o, step in zip(inputs, widths, steps, strict=True)
            ]
        )
        self.norm_out = vae_layers.norm(widths[-1], rngs)
        self.conv_out = vae_layers.conv_out(
            config.linear_channels > 0, widths[-1], pixels, rngs
        )

    def __call__(self, x_bthwc: jax.Array, past: streaming.Past) -> jax.Array:
        x_bthwc = self.mid_block(self.conv_in.causal(x_bthwc, past), past)
        for block in self.up_blocks:
            x_bthwc = block(x_bthwc, past)
        return self.conv_out.causal(jax.nn.silu(self.norm_out(x_bthwc)), past)


class VideoVAE(nnx.Module):
    """The autoencoder. See the head of this file; `Config` holds its sizes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = layers.Linear(2 * c, 2 * c, axes=(None, None), rngs=rngs)
        # Sampled latents start close to their mean, which noise would hide at first.
        self.quant_conv.bias[...] = jnp.repeat(jnp.asarray([0.0, -10.0]), c)
        self.post_quant_conv = layers.Linear(c, c, axes=(None, None), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        block = config.temporal_stride, config.spatial_stride, config.video_channels
        self.linear = (
            vae_layers.LinearCodec(*block, config.linear_channels, rngs=rngs)
            if config.linear_channels
            else None
        )

    def encode(self, video_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance of the latent, not normalized.

        Args:
          video_bthwc: pixels in [-1, 1], 1 + 4n frames of a size that the strides divide.

        Returns:
          mean_bthwc and logvar_bthwc, float32, the latter in [-30, 20].

        Raises:
          ValueError: the size is not valid; the message names the nearest valid one.
        """
        self.config.latent_shape(*video_bthwc.shape[1:4])
        return self.encode_chunk(video_bthwc)[0]

    def encode_chunk(
        self, video_bthwc: jax.Array, state: streaming.State | None = None
    ) -> tuple[tuple[jax.Array, jax.Array], streaming.State]:
        """Encodes the next frames of a video: ((mean_bthwc, logvar_bthwc), state).

        `state` is that of the previous chunk. The first chunk has none, and 1 + 4n
        frames; others have 4n.
        """
        past = streaming.Past(state)
        streaming.check_shards(video_bthwc, self.config.spatial_stride)
        x = _fold_pixels(video_bthwc, self.config.patch_size)
        x = self.quant_conv(self.encoder(x.astype(self.config.dtype), past))
        mean_bthwc, logvar_bthwc = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        if self.linear is not None:
            linear = self.linear.encode(video_bthwc, past.is_first)
            others = self.config.latent_channels - linear.shape[-1]
            mean_bthwc = mean_bthwc + jnp.pad(linear, ((0, 0),) * 4 + ((0, others),))
        return (mean_bthwc, jnp.clip(logvar_bthwc, -30.0, 20.0)), past.state()

    def encode_stream(self, video, chunk: int = streaming.CHUNK, layout=None):
        """Yields (mean_bthwc, logvar_bthwc) of a video that comes in parts.

        Args:
          video: an array, or an iterable of arrays to concatenate in time, on the host:
            pixels in [-1, 1], 1 + 4n frames in all.
          chunk: latent frames that are encoded at a time. Memory depends on it, not on
            the length of the video.
          layout: mesh axes of [b, t, h, w, c]; see `streaming.shard_frames`.

        Raises:
          ValueError: as `encode`, once the frames so far cannot be a whole video.
        """
        return streaming.encode(self, video, chunk, layout)

    def decode(self, latents_bthwc: jax.Array) -> jax.Array:
        """Returns the video of latents that are not normalized.

        The pixels are float32 and may leave [-1, 1]; they are clipped only when they
        become bytes, so that gradients are not cut off in training.
        """
        return self.decode_chunk(latents_bthwc)[0]

    def decode_chunk(
        self, latents_bthwc: jax.Array, state: streaming.State | None = None
    ) -> tuple[jax.Array, streaming.State]:
        """Decodes the next latents of a video: (video_bthwc, state).

        `state` is that of the previous chunk; the first chunk has none.
        """
        past = streaming.Past(state)
        x = self.post_quant_conv(latents_bthwc.astype(self.config.dtype))
        x = self.decoder(x, past).astype(jnp.float32)
        video_bthwc = _unfold_pixels(x, self.config.patch_size)
        if self.linear is not None:
            linear = latents_bthwc[..., : self.config.linear_channels]
            video_bthwc = video_bthwc + self.linear.decode(linear, past.is_first)
        return video_bthwc, past.state()

    def decode_stream(self, latents, chunk: int = streaming.CHUNK, layout=None):
        """Yields the frames of latents that come in parts: `decode` in constant memory.

        Args:
          latents: an array, or an iterable of arrays to concatenate in time, on the
            host, not normalized.
          chunk: latent frames that are decoded at a time.
          layout: mesh axes of [b, t, h, w, c]; see `streaming.shard_frames`.
        """
        return streaming.decode(self, latents, chunk, layout)

    def normalize(self, latents_bthwc: jax.Array) -> jax.Array:
        """Shifts and scales latents to mean 0 and standard deviation 1 per channel."""
        mean, std = self._statistics()
        return (latents_bthwc - mean) / std

    def denormalize(self, latents_bthwc: jax.Array) -> jax.Array:
        """Undoes `normalize`; apply it to a denoiser's latents before `decode`."""
        mean, std = self._statistics()
        return latents_bthwc * std + mean

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        c = self.config.latent_channels
        mean = jnp.asarray(self.config.latent_mean or (0.0,) * c, jnp.float32)
        std = jnp.asarray(self.config.latent_std or (1.0,) * c, jnp.float32)
        return mean, std


def _fold_pixels(video_bthwc: jax.Array, patch: int) -> jax.Array:
    """Moves patches into channels in Wan's order: colour, column, row."""
    x = conv.fold(video_bthwc, time=1, space=patch)
    x = conv.reshape(x, *x.shape[:5], patch, patch).swapaxes(-1, -2)
    return conv.reshape(x, *x.shape[:4], -1)


def _unfold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    x = conv.reshape(x_bthwc, *x_bthwc.shape[:4], -1, patch, patch).swapaxes(-1, -2)
    return conv.unfold(conv.reshape(x, *x.shape[:5], -1), time=1, space=patch)
