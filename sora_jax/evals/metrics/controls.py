"""Clips spoilt on purpose: what every measure of video must rank below the clips.

A measure that a still, shuffled or blurred video can win is worse than none, so tables
show these controls beside the scores (`control_tables.py` builds one of any clips).

Letters: b clips, t frames, h height, w width, c channels.
"""

from collections.abc import Callable, Sequence

import numpy as np

BLURRED, REVERSED, SHUFFLED, STILL = (
    "blurred",
    "time-reversed",
    "frames shuffled",
    "still",
)
NOISE, DRIFT, LOOPED, CUT = "noise", "drift", "looped", "cut inserted"
DROPPED, TWICE = "frame dropped", "frame twice"
CORE = (BLURRED, REVERSED, SHUFFLED, STILL)
LEAST_FRAMES = 4  # for a seam with something on both sides
_FADE = 0.3


def make(
    video_bthwc: np.ndarray, *, names: Sequence[str] = CORE, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns controls of uint8 clips by name.

    Args:
      video_bthwc: uint8.
      names: which of `CONTROLS`.
      seed: of what is random in them.

    Raises:
      ValueError: a name is none of them, or as the control.
    """
    if unknown := sorted(set(names) - set(CONTROLS)):
        raise ValueError(f"no control {unknown}; there are {', '.join(CONTROLS)}")
    return {name: CONTROLS[name](video_bthwc, seed) for name in names}


def seam_of(num_frames: int) -> int:
    """The frame at which controls of one seam have it: the middle one."""
    return num_frames // 2


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


def noised(video_bthwc: np.ndarray, seed: int = 0, sigma: float = 12.0) -> np.ndarray:
    """Gaussian noise of that standard deviation (of 255), other in each frame."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(video_bthwc.shape, np.float32)
    return np.round(video_bthwc + sigma * noise).clip(0, 255).astype(np.uint8)


def drifting(video_bthwc: np.ndarray, fade: float = _FADE) -> np.ndarray:
    """Clips that fade towards a light grey, linearly, by `fade` in the last frame.

    Frame t is (1 - a) I + a 190 with a = fade t / (T - 1): brightness rises (what is
    darker than 190), contrast, saturation and sharpness fall as 1 - a.
    """
    amount_t = fade * np.linspace(0, 1, video_bthwc.shape[1], dtype=np.float32)
    amount = amount_t[:, None, None, None]
    return np.round(video_bthwc * (1 - amount) + 190 * amount).astype(np.uint8)


def looped(video_bthwc: np.ndarray) -> np.ndarray:
    """The first half there and back, a seamless loop: 0, 1, ..., n, ..., 2, 1.

    n is half the number of frames; where that is odd, frame n stands twice.
    """
    t = video_bthwc.shape[1]
    there = list(range(t // 2 + 1))
    return video_bthwc[:, there + there[: t - t // 2][:0:-1]]


def with_cut(video_bthwc: np.ndarray) -> np.ndarray:
    """From the seam on, each clip goes on as the next one does: one cut.

    Raises:
      ValueError: there is only one clip.
    """
    if len(video_bthwc) < 2:
        raise ValueError("a cut to another clip needs 2 clips or more")
    seam = seam_of(video_bthwc.shape[1])
    other = np.roll(video_bthwc, -1, axis=0)
    return np.concatenate([video_bthwc[:, :seam], other[:, seam:]], axis=1)


def frame_dropped(video_bthwc: np.ndarray) -> np.ndarray:
    """The frame at the seam is left out; the clips are a frame shorter."""
    return np.delete(video_bthwc, seam_of(video_bthwc.shape[1]), axis=1)


def frame_twice(video_bthwc: np.ndarray) -> np.ndarray:
    """At the seam the frame before stands once more; the last frame is left out."""
    t = video_bthwc.shape[1]
    order = np.arange(t)
    order[seam_of(t) :] -= 1
    return video_bthwc[:, order]


# What each name does: (clips, seed) -> clips.
CONTROLS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    BLURRED: lambda video, seed: blurred(video),
    REVERSED: lambda video, seed: video[:, ::-1],
    SHUFFLED: frames_shuffled,
    STILL: lambda video, seed: np.repeat(video[:, :1], video.shape[1], axis=1),
    NOISE: noised,
    DRIFT: lambda video, seed: drifting(video),
    LOOPED: lambda video, seed: looped(video),
    CUT: lambda video, seed: with_cut(video),
    DROPPED: lambda video, seed: frame_dropped(video),
    TWICE: lambda video, seed: frame_twice(video),
}
