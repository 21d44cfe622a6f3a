"""How much a clip moves: optical flow by the pyramidal method of Lucas and Kanade.

At every pixel, the shift v between two frames solves, over a window around it,

    (sum g g^T + lambda I) v = -sum g (after - before),    g: the gradient of the frames,

summed over the colours, from a coarse level to the full size, several times a level. The
term lambda keeps the coarser level's shift where a window has no texture.

Speeds are in shorter sides of the frame a second, so that they compare between sizes and
frame rates. Long clips are looked at in runs of three frames, evenly spaced.

Letters: p pairs of frames, h height, w width, c channel.
"""

import numpy as np
from scipy import ndimage

from sora_jax.data import samples
from sora_jax.data.curation import pixels

NAME, VERSION = "motion", 1
SCORES = {
    "motion": "mean speed of all pixels, in shorter sides of the frame a second",
    "motion_camera": "speed of the median pixel, which follows the camera; same unit",
    "motion_local": "speed that 5 % of the pixels exceed, beyond the camera's; same unit",
    "motion_share": "share of pixels that move by 1 % of the shorter side a second",
    "jitter": "change of the camera's speed from frame to frame; same unit",
    "still": "share of frames that repeat the frame before",
}
_SIDE = 64  # pixels of the shorter side that is looked at, at most
_COARSEST = 12  # and on the coarsest level, at least
_RUNS = 5  # of three frames
_ITERATIONS, _WINDOW, _LAMBDA = 3, 1.5, 1e-3
_REST, _NOISE = 2.0, 1e-4  # window, and squared error of coding
_REPEATED = 0.5 / 255  # mean difference of a frame that repeats the one before
_MOVING = 0.01


def score(frames_thwc: np.ndarray, fps: float) -> dict[str, float]:
    """Returns the scores of a clip uint8[t, h, w, c]; a picture has no motion."""
    if len(frames_thwc) < 2:
        return dict.fromkeys(SCORES, 0.0)
    starts = range(0, max(1, len(frames_thwc) - 2), 2)
    starts = [starts[i] for i in samples.evenly(len(starts), _RUNS)]
    runs = [range(start, min(start + 3, len(frames_thwc))) for start in starts]
    before = np.array([t for run in runs for t in run[:-1]])
    # The shift of a pair follows that of the pair before it, unless a run begins.
    follows = np.array([t != run[0] for run in runs for t in run[:-1]])[1:]
    shown = np.unique([*before, *before + 1])
    seen_thwc = pixels.shrunk(frames_thwc[shown], _SIDE)
    before_phwc = seen_thwc[np.searchsorted(shown, before)]
    after_phwc = seen_thwc[np.searchsorted(shown, before + 1)]
    scale = fps / min(seen_thwc.shape[1:3])
    shift_phw2 = flow(before_phwc, after_phwc)
    shift_phw2 = _at_rest(before_phwc, after_phwc, shift_phw2) * scale
    camera_p2 = np.median(shift_phw2, (1, 2))
    speed_phw = np.linalg.norm(shift_phw2, axis=-1)
    beyond_phw = np.linalg.norm(shift_phw2 - camera_p2[:, None, None], axis=-1)
    changes = np.linalg.norm(np.diff(camera_p2, axis=0), axis=-1)[follows]
    repeats_p = np.abs(after_phwc - before_phwc).mean((1, 2, 3)) < _REPEATED
    return {
        "motion": float(speed_phw.mean()),
        "motion_camera": float(np.linalg.norm(camera_p2, axis=-1).mean()),
        "motion_local": float(np.percentile(beyond_phw, 95, axis=(1, 2)).mean()),
        "motion_share": float((speed_phw > _MOVING).mean()),
        "jitter": float(changes.mean()) if len(changes) else 0.0,
        "still": float(repeats_p.mean()),
    }


def flow(before_phwc: np.ndarray, after_phwc: np.ndarray) -> np.ndarray:
    """Returns the shift of each pixel, float32[p, h, w, 2] as (x, y) in pixels.

    Args:
      before_phwc, after_phwc: float32 in [0, 1].
    """
    levels = [(before_phwc, after_phwc)]
    while min(levels[-1][0].shape[1:3]) >= 2 * _COARSEST:
        levels.append(tuple(map(_halved, levels[-1])))
    shift_phw2 = np.zeros((*levels[-1][0].shape[:3], 2), np.float32)
    for before, after in reversed(levels):
        if shift_phw2.shape[:3] != before.shape[:3]:
            shift_phw2 = _doubled(shift_phw2, *before.shape[1:3])
        for _ in range(_ITERATIONS):
            shift_phw2 = shift_phw2 + _step(before, after, shift_phw2)
    return shift_phw2


def _at_rest(before_phwc, after_phwc, shift_phw2: np.ndarray) -> np.ndarray:
    """Gives pixels the camera's shift where it explains them no worse than their own.

    Windows spread the shift of a thing to what is beside it.
    """
    camera_p2 = np.median(shift_phw2, (1, 2)).astype(np.float32)
    camera_phw2 = np.broadcast_to(camera_p2[:, None, None], shift_phw2.shape)

    def error(shift: np.ndarray) -> np.ndarray:
        warped, _ = _warped(after_phwc, shift)
        squared = ((warped - before_phwc) ** 2).sum(-1)
        return ndimage.gaussian_filter(squared, (0, _REST, _REST), truncate=2.0)

    moves_phw = error(shift_phw2) + _NOISE < error(camera_phw2)
    return np.where(moves_phw[..., None], shift_phw2, camera_phw2)


def _step(before: np.ndarray, after: np.ndarray, shift_phw2: np.ndarray) -> np.ndarray:
    """The shift that is left after warping `after` back by a shift."""
    warped, inside_phw = _warped(after, shift_phw2)
    mean, change = (before + warped) / 2, warped - before
    down, across = np.gradient(mean, axis=(1, 2))
    products = (
        (across, across),
        (down, down),
        (across, down),
        (across, change),
        (down, change),
    )
    sums = np.stack([np.einsum("phwc,phwc->phw", a, b) for a, b in products])
    sums *= inside_phw  # what leaves the frame says nothing
    sigmas = (0, 0, _WINDOW, _WINDOW)
    xx, yy, xy, xt, yt = ndimage.gaussian_filter(sums, sigmas, truncate=2.0)
    xx, yy = xx + _LAMBDA, yy + _LAMBDA
    step_phw2 = np.stack([xy * yt - yy * xt, xy * xt - xx * yt], -1)
    # One level corrects what the coarser one left: about a pixel.
    return np.clip(step_phw2 / (xx * yy - xy * xy)[..., None], -1, 1)


def _warped(
    frames_phwc: np.ndarray, shift_phw2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Frames at shifted places, bilinear, and which places are inside the frame."""
    pairs, height, width = shift_phw2.shape[:3]
    x = np.arange(width, dtype=np.float32) + shift_phw2[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + shift_phw2[..., 1]
    inside_phw = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left = np.minimum(x.astype(int), width - 2)
    top = np.minimum(y.astype(int), height - 2)
    right_share = (x - left.astype(np.float32))[..., None]
    down_share = (y - top.astype(np.float32))[..., None]
    flat = frames_phwc.reshape(-1, frames_phwc.shape[-1])
    at = (np.arange(pairs)[:, None, None] * height + top) * width + left
    above = flat[at] * (1 - right_share) + flat[at + 1] * right_share
    below = flat[at + width] * (1 - right_share) + flat[at + width + 1] * right_share
    return above * (1 - down_share) + below * down_share, inside_phw


def _halved(frames_phwc: np.ndarray) -> np.ndarray:
    smooth = ndimage.gaussian_filter(frames_phwc, (0, 1, 1, 0), truncate=2.0)
    return smooth[:, ::2, ::2]


def _doubled(shift_phw2: np.ndarray, height: int, width: int) -> np.ndarray:
    y = np.minimum(np.arange(height) // 2, shift_phw2.shape[1] - 1)
    x = np.minimum(np.arange(width) // 2, shift_phw2.shape[2] - 1)
    doubled = 2 * shift_phw2[:, y][:, :, x]
    return ndimage.gaussian_filter(doubled, (0, 1, 1, 0), truncate=2.0)
