"""How the camera moves, tracked on the grey texture of a clip.

Letters: T frames, H height, W width, D = T - 1 pairs of neighbouring frames.

Each frame is aligned with the next under shift and zoom by Gauss-Newton, on low-passed
grey without the coloured pixels, for all pairs at once. The motions of the pairs form the
camera's path.
"""

import dataclasses

import numpy as np

LOW_CHROMA = 45.0  # Spread of a pixel's channels above which it is not background.
FAINT = 2.0  # Standard deviation of grey (of 255) below which nothing can be tracked.
_STEPS = 12
_SMOOTH = 1.2  # Standard deviation of the low pass, pixels.
_EDGE = 2  # Pixels at the frame's edge that are left out.


@dataclasses.dataclass(frozen=True)
class Path:
    """The camera's motion between frames, and how well it explains the texture.

    `shift` float64[D, 2] is the motion in pixels, `zoom` float64[D] the change of log
    magnification, `error` float64[D] the share of the texture's change that the motion
    does not explain (1 without texture).
    """

    shift: np.ndarray
    zoom: np.ndarray
    error: np.ndarray


def _low_pass(grey: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooths [T, H, W] over the weighted pixels; also returns the smoothed weight."""
    reach = int(np.ceil(2.5 * _SMOOTH))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTH) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    both = np.stack([grey * weight, weight])
    for axis in (2, 3):
        padding = [(0, 0)] * 4
        padding[axis] = (reach, reach)
        padded = np.pad(both, padding)
        size = both.shape[axis]
        both = sum(
            k * (padded[:, :, i : i + size] if axis == 2 else padded[..., i : i + size])
            for i, k in enumerate(kernel)
        )
    return both[0] / np.maximum(both[1], 1e-3), both[1]


def _sample(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of [D, C, H, W] at pixel positions [D, H, W] (clamped)."""
    height, width = image.shape[2:]
    x = np.clip(x - 0.5, 0, width - 1.001)
    y = np.clip(y - 0.5, 0, height - 1.001)
    left, top = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    flat = image.reshape(*image.shape[:2], -1)
    at = (top * width + left).reshape(len(x), 1, -1)

    def corner(offset: int) -> np.ndarray:
        return np.take_along_axis(flat, at + offset, axis=2).reshape(image.shape)

    upper = corner(0) * (1 - fx) + corner(1) * fx
    lower = corner(width) * (1 - fx) + corner(width + 1) * fx
    return upper * (1 - fy) + lower * fy


def track(video: np.ndarray) -> Path:
    """The camera's motion in uint8[T, H, W, 3]; one frame gives an empty path."""
    frames, size = video.shape[:2]
    if frames == 1:
        return Path(np.zeros((0, 2)), np.zeros(0), np.zeros(0))
    rgb = video.astype(np.float32)
    spread = rgb.max(axis=3) - rgb.min(axis=3)
    neutral = (spread < LOW_CHROMA).astype(np.float32)
    grey, weight = _low_pass(rgb.mean(axis=3), neutral)
    grey_y, grey_x = np.gradient(grey, axis=(1, 2))
    seen = ((weight > 0.6) & (neutral > 0)).astype(np.float32)
    later = np.stack([grey, grey_x, grey_y, seen], axis=1)[1:]
    first, first_seen = grey[:-1], seen[:-1].copy()
    first_seen[:, :_EDGE] = first_seen[:, -_EDGE:] = 0
    first_seen[:, :, :_EDGE] = first_seen[:, :, -_EDGE:] = 0
    offset = np.arange(size, dtype=np.float32) + 0.5 - size / 2
    u, v = offset[None, None, :], offset[None, :, None]
    # Content at offset p moves to exp(z) (p - shift); z is the zoom.
    motion = np.zeros((frames - 1, 3))
    error = np.ones(frames - 1)
    for _ in range(_STEPS):
        scale = np.exp(motion[:, 2])[:, None, None]
        x = scale * (u - motion[:, 0, None, None]) + np.zeros_like(v)
        y = scale * (v - motion[:, 1, None, None]) + np.zeros_like(u)
        inside = (abs(x) < size / 2) & (abs(y) < size / 2)
        image, along, down, good = np.moveaxis(
            _sample(later, x + size / 2, y + size / 2), 1, 0
        )
        used = first_seen * good * inside
        rest = (image - first) * used
        slopes = np.stack([-scale * along, -scale * down, along * x + down * y], axis=1)
        slopes = (slopes * used[:, None]).reshape(frames - 1, 3, -1)
        rest = rest.reshape(frames - 1, -1)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-3 * np.eye(3)
        step = -np.linalg.solve(normal, slopes @ rest[..., None])[..., 0]
        area = np.maximum(used.sum(axis=(1, 2)), 1.0)
        mean = (first * used).sum(axis=(1, 2)) / area
        texture = (((first - mean[:, None, None]) * used) ** 2).sum(axis=(1, 2))
        bare = texture < FAINT**2 * area
        error = np.where(bare, 1.0, (rest**2).sum(axis=1) / np.maximum(texture, 1e-6))
        if np.abs(step).max(initial=0.0) < 1e-3:
            break
        motion += np.clip(step, (-1, -1, -0.1), (1, 1, 0.1))
    return Path(motion[:, :2], motion[:, 2], error)
