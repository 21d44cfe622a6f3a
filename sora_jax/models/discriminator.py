"""A discriminator between real and decoded videos: a score for each of many windows.

Convolutions over space and time, with average pooling that halves both (the first frame
is apart, as in the video VAE), so that it detects flicker as well as blur. A picture is a
video of one frame. Norms are over the channels of one voxel.

Letters: b batch, t time, h height, w width, c channels.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.models import conv, layers, streaming
from sora_jax.models.vae_layers import Conv


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes: each of `num_layers` halvings doubles the channels, up to eight times."""

    video_channels: configs.Size = 3
    base_dim: configs.Size = 32
    num_layers: Annotated[int, configs.Range("[0, 16]")] = 3
    dtype: str = "float32"


class Discriminator(nnx.Module):
    """Scores windows of a video, high for real ones (arXiv 1611.07004, here in 3D)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        widths = [config.base_dim * min(2**i, 8) for i in range(config.num_layers + 1)]
        self.conv_in = Conv((3, 3, 3), config.video_channels, widths[0], rngs=rngs)
        self.norms = nnx.List([layers.RMSNorm(i, rngs=rngs) for i in widths])
        self.convs = nnx.List(
            [
                Conv((3, 3, 3), i, o, rngs=rngs)
                for i, o in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.conv_out = Conv((3, 3, 3), widths[-1], 1, split=False, rngs=rngs)

    def __call__(self, video_bthwc: jax.Array) -> jax.Array:
        """[b, t, h, w, c] in [-1, 1] -> scores of windows, float32 [b, t', h', w']."""
        past = streaming.Past()  # the whole video is one chunk
        x_bthwc = self.conv_in.causal(video_bthwc.astype(self.config.dtype), past)
        for norm, widen in zip(self.norms, self.convs, strict=False):
            x_bthwc = halve(jax.nn.leaky_relu(norm(x_bthwc), 0.2))
            x_bthwc = widen.causal(x_bthwc, past)
        x_bthwc = jax.nn.leaky_relu(self.norms[-1](x_bthwc), 0.2)
        x_bthwc = self.conv_out.causal(x_bthwc, past)
        return x_bthwc[..., 0].astype(jnp.float32)


def halve(x_bthwc: jax.Array) -> jax.Array:
    """Averages 2 x 2 pixels, and pairs of frames: 1 + 2n frames to 1 + n.

    Other numbers of frames stay. The last row or column of an odd size is dropped.
    """
    b, t, h, w, c = x_bthwc.shape
    x_bthwc = x_bthwc[:, :, : h - h % 2, : w - w % 2]
    x_bthwc = jnp.mean(conv.fold(x_bthwc, time=1, space=2), axis=-1)
    if t == 1 or t % 2 == 0:
        return x_bthwc
    pairs = jnp.mean(conv.fold(x_bthwc[:, 1:], time=2, space=1), axis=-1)
    return jnp.concatenate([x_bthwc[:, :1], pairs], axis=1)
