"""Controls: copies of clips spoilt on purpose, which every metric must rank below them.

A metric that a still, shuffled or blurred video can win is misleading, so tables show
these controls beside the scores. `control_tables.py` builds such a table of any clips.

Letters: b clips, t frames, h height, w width, c channels.
"""

from collections.abc import Callable, Sequence

import numpy as np

BLURRED, REVERSED = "blurred", "time-reversed"
SHUFFLED, STILL = "frames shuffled", "still"
NOISE, DRIFT, LOOPED, CUT = "noise", "drift", "looped", "cut inserted"
DROPPED, TWICE = "frame dropped", "frame twice"
CORE = (BLURRED, REVERSED, SHUFFLED, STILL)
LEAST_FRAMES = 4  # for a seam with two frames on each side
_FADE, _FADE_LEVEL = 0.3, 190  # share in the last frame, and grey level, of a drift
_NOISE = 12.0  # standard deviation, of 255


def make(
    video_bthwc: np.ndarray, *, names: Sequence[str] = CORE, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns controls of uint8 clips by name.

    Args:
      video_bthwc: uint8.
      names: which of `CONTROLS`.
      seed: of those that are random.

    Raises:
      ValueError: an unknown name, or a single clip for `with_cut`.
    """
    if unknown := sorted(set(names) - set(CONTROLS)):
        raise ValueError(f"unknown control {unknown}; known: {', '.join(CONTROLS)}")
    return {name: CONTROLS[name](video_bthwc, seed) for name in names}


def seam_of(num_frames: int) -> int:
    """Returns the frame of the seam in controls that have one: the middle frame."""
    return num_frames // 2


def blur(video: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Gaussian blur of frames [..., h, w, c] with edges repeated, in pixels: float32."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * np.square(offsets / sigma))
    kernel /= kernel.sum()
    result = video.astype(np.float32)
    for axis in (video.ndim - 3, video.ndim - 2):
        padding = [(0, 0)] * video.ndim
        padding[axis] = (radius, radius)
        padded = np.pad(result, padding, mode="edge")
        size = video.shape[axis]
        result = sum(
            np.float32(weight) * np.take(padded, range(i, i + size), axis=axis)
            for i, weight in enumerate(kernel)
        )
    return result


def blurred(video_bthwc: np.ndarray) -> np.ndarray:
    """A mild Gaussian blur of every frame."""
    return np.round(blur(video_bthwc, 0.7, 2)).astype(np.uint8)


def frames_shuffled(video_bthwc: np.ndarray, seed: int) -> np.ndarray:
    """The frames of each clip in a random order, never the original one."""
    rng = np.random.default_rng(seed)
    t = video_bthwc.shape[1]
    result = np.empty_like(video_bthwc)
    for clip, frames_thwc in enumerate(video_bthwc):
        order = rng.permutation(t)
        while t > 1 and (order == np.arange(t)).all():
            order = rng.permutation(t)
        result[clip] = frames_thwc[order]
    return result


def noised(video_bthwc: np.ndarray, seed: int) -> np.ndarray:
    """Gaussian noise, independent in each frame."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(video_bthwc.shape, np.float32)
    return np.round(video_bthwc + _NOISE * noise).clip(0, 255).astype(np.uint8)


def drifting(video_bthwc: np.ndarray) -> np.ndarray:
    """Clips that fade linearly towards a light grey, by 0.3 in the last frame.

    Frame t is (1 - a) I + 190 a with a = 0.3 t / (T - 1). Brightness below 190 rises;
    contrast, saturation and sharpness fall as 1 - a.
    """
    amount_t = _FADE * np.linspace(0, 1, video_bthwc.shape[1], dtype=np.float32)
    amount = amount_t[:, None, None, None]
    faded = video_bthwc * (1 - amount) + _FADE_LEVEL * amount
    return np.round(faded).astype(np.uint8)


def looped(video_bthwc: np.ndarray) -> np.ndarray:
    """The first half forwards and backwards, a seamless loop: 0, 1, ..., n, ..., 2, 1.

    n is half the number of frames; if that number is odd, frame n is repeated.
    """
    t = video_bthwc.shape[1]
    forwards = list(range(t // 2 + 1))
    return video_bthwc[:, forwards + forwards[: t - t // 2][:0:-1]]


def with_cut(video_bthwc: np.ndarray) -> np.ndarray:
    """From the seam on, each clip continues as the next one does: one cut.

    Raises:
      ValueError: there is only one clip.
    """
    if len(video_bthwc) < 2:
        raise ValueError("a cut to another clip needs 2 clips or more")
    seam = seam_of(video_bthwc.shape[1])
    other = np.roll(video_bthwc, -1, axis=0)
    return np.concatenate([video_bthwc[:, :seam], other[:, seam:]], axis=1)


def frame_dropped(video_bthwc: np.ndarray) -> np.ndarray:
    """The frame at the seam is dropped; the clips are a frame shorter."""
    return np.delete(video_bthwc, seam_of(video_bthwc.shape[1]), axis=1)


def frame_twice(video_bthwc: np.ndarray) -> np.ndarray:
    """The frame before the seam is repeated; the last frame is dropped."""
    t = video_bthwc.shape[1]
    order = np.arange(t)
    order[seam_of(t) :] -= 1
    return video_bthwc[:, order]


# Name -> (clips, seed) -> clips.
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
