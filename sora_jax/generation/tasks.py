"""What each way of making a video gives: which latents are known, and what they are.

Pure functions. The sampler sees known tokens only and does not know which task they
come from.

Letters: b batch, t, h, w latent time, height and width, c latent channels; for a
picture h, w, c are pixels and colours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """The tokens that a task gives: where, and their clean latents.

    known_bthw: bool, the same in every row. latents_bthwc: read where known only.
    """

    known_bthw: np.ndarray
    latents_bthwc: jax.Array


def text_to_video() -> None:
    """Nothing is given but the text."""
    return None


def image_to_video(image_b1hwc: jax.Array, grid: tuple[int, int, int]) -> Given:
    """The first latent frame is a picture that was encoded alone, as one frame.

    A causal video encoder gives a video's first frame that very latent.

    Args:
      image_b1hwc: latents of the pictures, normalised as the denoiser sees them.
      grid: latent frames, height and width of the video.

    Raises:
      ValueError: the picture's latent does not have the video's size, or the video
        has one latent frame only, so that nothing is left to generate.
    """
    if image_b1hwc.shape[1:4] != (1, *grid[1:]):
        raise ValueError(
            f"the picture's latent is {image_b1hwc.shape[1:4]}; "
            f"the video's first latent frame is {(1, *grid[1:])}"
        )
    known_thw = known.mask(known.Pattern.FIRST_FRAME, grid)
    b = image_b1hwc.shape[0]
    rest = ((0, 0), (0, grid[0] - 1), (0, 0), (0, 0), (0, 0))
    return Given(
        np.broadcast_to(known_thw, (b, *grid)).copy(), jnp.pad(image_b1hwc, rest)
    )


def fit_picture(picture_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a picture until it covers height x width, and cuts its middle out.

    Args:
      picture_hwc: uint8, or float in [0, 1]; three colours.

    Returns:
      float32 [height, width, 3] in [-1, 1].

    Raises:
      ValueError: it is not a picture of three colours, or its numbers are not those.
    """
    picture_hwc = np.asarray(picture_hwc)
    if picture_hwc.ndim != 3 or picture_hwc.shape[2] != 3 or not picture_hwc.size:
        raise ValueError(
            f"a picture has shape [height, width, 3], not {picture_hwc.shape}"
        )
    if picture_hwc.dtype == np.uint8:
        picture_hwc = picture_hwc.astype(np.float32) / 255
    elif not np.issubdtype(picture_hwc.dtype, np.floating):
        raise ValueError(f"a picture is uint8 or float, not {picture_hwc.dtype}")
    elif not (picture_hwc.min() >= 0 and picture_hwc.max() <= 1):
        raise ValueError("a picture of floats has values in [0, 1]")
    scale = max(height / picture_hwc.shape[0], width / picture_hwc.shape[1])
    size = [
        max(least, round(side * scale))
        for least, side in zip((height, width), picture_hwc.shape[:2], strict=True)
    ]
    if tuple(size) != picture_hwc.shape[:2]:
        picture_hwc = jax.image.resize(picture_hwc, (*size, 3), "linear")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = np.asarray(picture_hwc)[top : top + height, left : left + width]
    return cut.astype(np.float32) * 2 - 1
