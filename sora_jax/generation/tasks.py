"""Tasks: which latents are known in each way of making a video, and their values.

Pure functions. The sampler sees known tokens only, not the task.

Letters: b batch, t, h, w latent time, height and width, c latent channels; for an
image h, w, c are pixels and colours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KnownTokens:
    """The known tokens of a task.

    known_bthw: bool, the same in every row. latents_bthwc: clean latents, used where
    known.
    """

    known_bthw: np.ndarray
    latents_bthwc: jax.Array


def text_to_video() -> None:
    """No token is known."""
    return None


def image_to_video(image_b1hwc: jax.Array, grid: tuple[int, int, int]) -> KnownTokens:
    """The first latent frame is known: an image that was encoded as one frame.

    A causal video encoder gives the first frame of a video the same latent.

    Args:
      image_b1hwc: normalised latents of the images.
      grid: latent frames, height and width of the video.

    Raises:
      ValueError: the latent does not have the video's size, or the video has only one
        latent frame, so that nothing is left to generate.
    """
    if image_b1hwc.shape[1:4] != (1, *grid[1:]):
        raise ValueError(
            f"the image's latent is {image_b1hwc.shape[1:4]}; "
            f"the video's first latent frame is {(1, *grid[1:])}"
        )
    known_thw = known.mask(known.Pattern.FIRST_FRAME, grid)
    b = image_b1hwc.shape[0]
    rest = ((0, 0), (0, grid[0] - 1), (0, 0), (0, 0), (0, 0))
    return KnownTokens(
        np.broadcast_to(known_thw, (b, *grid)).copy(), jnp.pad(image_b1hwc, rest)
    )


def fit_image(image_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales an image to cover height x width, and crops its centre.

    Args:
      image_hwc: RGB, uint8 or float in [0, 1].

    Returns:
      float32 [height, width, 3] in [-1, 1].

    Raises:
      ValueError: it has another shape, type or range.
    """
    image_hwc = np.asarray(image_hwc)
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or not image_hwc.size:
        raise ValueError(
            f"an image has shape [height, width, 3], not {image_hwc.shape}"
        )
    if image_hwc.dtype == np.uint8:
        image_hwc = image_hwc.astype(np.float32) / 255
    elif not np.issubdtype(image_hwc.dtype, np.floating):
        raise ValueError(f"an image is uint8 or float, not {image_hwc.dtype}")
    elif not (image_hwc.min() >= 0 and image_hwc.max() <= 1):
        raise ValueError("an image of floats has values in [0, 1]")
    scale = max(height / image_hwc.shape[0], width / image_hwc.shape[1])
    size = [
        max(least, round(side * scale))
        for least, side in zip((height, width), image_hwc.shape[:2], strict=True)
    ]
    if tuple(size) != image_hwc.shape[:2]:
        image_hwc = jax.image.resize(image_hwc, (*size, 3), "linear")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = np.asarray(image_hwc)[top : top + height, left : left + width]
    return cut.astype(np.float32) * 2 - 1
