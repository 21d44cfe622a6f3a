"""What the denoiser is given of a video besides text, whatever task gives it.

Letters: b batch, t, h, w latent time, height and width, c latent channels; for an
image h, w, c are pixels and colours.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models import rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What a task gives the denoiser of a video besides text; None where it gives nothing.

    Attributes:
      known_bthw: bool, which latents of the video are known; the same in every row.
      latents_bthwc: clean latents, used where known.
      start: index of the video's first latent frame, 0 or, mid-clip, later.
      beside: latents that are given beside those of the video: frames that were encoded
        alone, references, the source of an edit.
      is_loop: whether the video's first latent frame comes after its last.
      blended: whether known latents are kept by the solver alone, for a denoiser that did
        not learn to be given them; see `compiled.path_of`.
    """

    known_bthw: jax.Array | None = None
    latents_bthwc: jax.Array | None = None
    start: jax.Array | int = 0
    beside: tuple[rows.Beside, ...] = ()
    is_loop: bool = dataclasses.field(default=False, metadata={"static": True})
    blended: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_seen(self) -> bool:
        """Whether the denoiser sees which tokens are given."""
        return bool(self.beside) or (self.known_bthw is not None and not self.blended)

    def of_clips(self, pick: Callable) -> "Given":
        """This, of fewer clips: `pick` takes and returns arrays whose first axis is clips."""
        known_bthw, latents_bthwc, beside = pick(
            (
                self.known_bthw,
                self.latents_bthwc,
                tuple(one.latents_bthwc for one in self.beside),
            )
        )
        return dataclasses.replace(
            self,
            known_bthw=known_bthw,
            latents_bthwc=latents_bthwc,
            beside=tuple(
                dataclasses.replace(one, latents_bthwc=latents)
                for one, latents in zip(self.beside, beside, strict=True)
            ),
        )


def head(latents_bthwc: jax.Array, grid: tuple[int, int, int], start: int = 0) -> Given:
    """The first latent frames of a video are known.

    Args:
      latents_bthwc: these.
      grid: latent frames, height and width of the video.
      start: see `Given`.
    """
    b, known = latents_bthwc.shape[:2]
    known_bthw = jnp.zeros((b, *grid), bool).at[:, :known].set(True)
    rest = ((0, 0), (0, grid[0] - known), (0, 0), (0, 0), (0, 0))
    return Given(known_bthw, jnp.pad(latents_bthwc, rest), start)


def image_to_video(image_b1hwc: jax.Array, grid: tuple[int, int, int]) -> Given:
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
    if grid[0] < 2:
        raise ValueError(
            "a video that begins with an image needs at least 2 latent frames, not 1: "
            "nothing else is left to generate"
        )
    return head(image_b1hwc, grid)


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
