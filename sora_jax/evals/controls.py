"""Clips spoilt on purpose: what every measure of video must rank below the clips.

A measure that a still, shuffled or blurred video can win is worse than none, so tables
show these controls beside the scores.

Letters: b clips, t frames, h height, w width, c channels.
"""

import numpy as np


def make(video_bthwc: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns all controls of uint8 clips by name."""
    return {
        "blurred": blurred(video_bthwc),
        "time-reversed": video_bthwc[:, ::-1],
        "frames shuffled": frames_shuffled(video_bthwc, seed),
        "still": np.repeat(video_bthwc[:, :1], video_bthwc.shape[1], axis=1),
    }


def blurred(video_bthwc: np.ndarray, sigma: float = 0.7) -> np.ndarray:
    """A mild Gaussian blur of every frame, uint8 to uint8; sigma in pixels."""
    radius = max(1, round(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * np.square(offsets / sigma))
    kernel /= kernel.sum()
    result = video_bthwc.astype(np.float32)
    for axis in (2, 3):
        padding = [(0, 0)] * 5
        padding[axis] = (radius, radius)
        padded = np.pad(result, padding, mode="edge")
        size = result.shape[axis]
        result = sum(
            np.float32(weight) * np.take(padded, range(i, i + size), axis=axis)
            for i, weight in enumerate(kernel)
        )
    return np.round(result).astype(np.uint8)


def frames_shuffled(video_bthwc: np.ndarray, seed: int = 0) -> np.ndarray:
    """Each clip's frames in an order of their own, never the true one."""
    rng = np.random.default_rng(seed)
    t = video_bthwc.shape[1]
    result = np.empty_like(video_bthwc)
    for clip, frames_thwc in enumerate(video_bthwc):
        order = rng.permutation(t)
        while t > 1 and (order == np.arange(t)).all():
            order = rng.permutation(t)
        result[clip] = frames_thwc[order]
    return result
