"""Which part of a video is kept, and which is made anew: masks of pixels and of latents.

What is kept is encoded with the rest in grey, so that its latents do not depend on what is
to be replaced. A latent is known only if all of its pixels are kept.

Letters: t frames, h height, w width, of videos or of latents.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

GREY = 127  # of pixels that are not kept


def draw(random: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Draws what is kept of a video, bool [t, h, w].

    A third each: all but a box, only a band over the whole height or width (for
    outpainting), all but a brush stroke. Boxes and strokes move in half of the videos.
    """
    t, h, w = shape
    kind = int(random.integers(3))
    kept = np.ones((t, h, w), bool)
    y, x = np.mgrid[:h, :w]
    moves = random.random() < 0.5
    if kind == 0:
        size = random.uniform(0.25, 0.65, 2) * (h, w)
        ends = random.uniform(0, 1, (2, 2)) * ((h, w) - size)
        for frame in range(t):
            share = frame / max(t - 1, 1) if moves else 0.0
            top, left = ends[0] + share * (ends[1] - ends[0])
            inside = (y >= top) & (y < top + size[0])
            kept[frame] = ~(inside & (x >= left) & (x < left + size[1]))
    elif kind == 1:
        axis = int(random.integers(2))
        length = (h, w)[axis]
        size = random.uniform(0.4, 0.75) * length
        first = random.choice([0.0, (length - size) / 2, length - size])
        along = (y, x)[axis]
        kept[:] = (along >= first) & (along < first + size)
    else:
        points = np.cumsum(random.normal(0, 0.18, (6, 2)) * (h, w), axis=0)
        points += random.uniform(0.25, 0.75, 2) * (h, w) - points.mean(0)
        radius = random.uniform(0.1, 0.2) * min(h, w)
        drift = random.normal(0, 0.2, 2) * (h, w) if moves else np.zeros(2)
        for frame in range(t):
            here = points + frame / max(t - 1, 1) * drift
            far = (y[..., None] - here[:, 0]) ** 2 + (x[..., None] - here[:, 1]) ** 2
            kept[frame] = far.min(-1) > radius**2
    return kept


def of_clip(clip_id: str, shape: Sequence[int]) -> np.ndarray:
    """The region that is kept of a clip, a function of its id and shape."""
    seed = hashlib.sha256(clip_id.encode()).digest()[:8]
    return draw(np.random.default_rng(int.from_bytes(seed, "little")), shape)


def blanked(frames_thwc: np.ndarray, kept_thw: np.ndarray) -> np.ndarray:
    """The frames, uint8, with grey where they are not kept."""
    return np.where(kept_thw[..., None], frames_thwc, np.uint8(GREY))


def of_latents(
    kept_thw: np.ndarray, spatial_stride: int, temporal_stride: int
) -> np.ndarray:
    """Which latents are known, bool: those of which all pixels are kept.

    The first latent frame shows one frame, each later one `temporal_stride` frames.
    """
    t, h, w = kept_thw.shape
    s = spatial_stride
    kept_thw = kept_thw.reshape(t, h // s, s, w // s, s).all((2, 4))
    rest = kept_thw[1:].reshape(-1, temporal_stride, *kept_thw.shape[1:]).all(1)
    return np.concatenate([kept_thw[:1], rest])
