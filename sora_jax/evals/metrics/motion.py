"""How much a video moves, how smoothly, and how that differs between two sets of clips.

A still video wins every measure of steadiness. So `dynamic_degree` measures the amount of
motion, and `smoothness` is the share of the change between frames that steady motion
explains: a still video has no change to explain and scores 0. `histograms` are motion
features of a clip for a Frechet distance that depends on motion alone.

The unit of length is the short side of the frame and that of time the second, so that
values depend neither on the frame size nor on the frame rate.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1), h height, w width, c
colour channels, x the two components of a displacement (right, down), d features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.evals import pixels
from sora_jax.evals.metrics import temporal

# VBench's rule (arXiv 2311.17982): the fastest twentieth of the pixels moves by more
# than 6 of 256 pixels between frames at 8 fps, in 4 of 16 pairs.
FASTEST = 0.05
THRESHOLD = 6 / 256 * 8  # short sides per second
_SHARE_OF_PAIRS = 4 / 16
# Mean change per pixel below which a clip counts as unchanged: a quarter of an 8-bit step.
_NO_CHANGE = 0.25 / 255
# Dynamic degree below which nothing moves. Estimates on noise stay below it, and the
# slowest zoom of the toy world is three times as fast.
STILL = 0.05  # short sides per second
# Interpolation between pixels averages noise; less so in frames that are low-passed.
_LOW_PASS = 1.5  # standard deviation, pixels
DIRECTIONS = 8


def dynamic_degree(motion: temporal.Motion, *, fps: float) -> dict[str, np.ndarray]:
    """Returns how much the clips move.

    With F the flow and s the short side, a pair of frames moves at the speed

        m = fps / s * mean of the largest ceil(0.05 h w) of |F|,

    where pixels that cannot be tracked count as still; otherwise noise would move most.

    Args:
      motion: of the clips, exact or estimated.
      fps: frames per second.

    Returns:
      Two values per clip, float64 [b]: dynamic_degree, the mean of m over the pairs in
      short sides per second; and dynamic, 1 where m exceeds `THRESHOLD` in a quarter of
      the pairs or more (rounded, at least one), otherwise 0. A shuffled video moves
      more than its original; smoothness tells them apart.

    Raises:
      ValueError: fps is not positive.
    """
    _check_fps(fps)
    flow_bphwx = np.asarray(motion.flow_bphwx, np.float64)
    b, p, h, w, _ = flow_bphwx.shape
    length = np.linalg.norm(flow_bphwx, axis=-1)
    length = np.where(motion.followed_bphw, length, 0).reshape(b, p, h * w)
    count = int(np.ceil(FASTEST * h * w))
    fastest = np.partition(length, h * w - count, axis=2)[:, :, -count:]
    speed_bp = fastest.mean(2) * (fps / min(h, w))
    least = max(1, round(_SHARE_OF_PAIRS * p))
    return {
        "dynamic_degree": speed_bp.mean(1),
        "dynamic": ((speed_bp > THRESHOLD).sum(1) >= least).astype(np.float64),
    }


def smoothness(
    video_bthwc: np.ndarray,
    backward: temporal.Motion | None = None,
    *,
    exact: bool = True,
) -> np.ndarray:
    """Returns the share of the change that steady motion explains: float64 [b].

    With B_t the flow from frame t back to frame t - 1, steady motion takes pixel x of
    frame t to x - B_t(x) in frame t + 1. Over the pixels that can be tracked, with I a
    frame low-passed by a Gaussian of 1.5 pixels (unfiltered where the motion is exact,
    since an exact flow has sharp edges that a low pass would blend),

        smoothness = 1 - min(1, sum |I_{t+1}(x - B_t(x)) - I_t(x)|
                                / sum |I_{t+1}(x) - I_t(x)|).

    The flow is estimated without frame t + 1, so it cannot adapt to that frame. The low
    pass keeps interpolation, which averages noise, from raising the score. 1 is perfectly
    steady motion. A clip that does not change scores 0, as does one without a tracked
    pixel. Smoothness cannot tell a clip from its reversal, nor a sharp clip from a
    blurred one (both sums scale with the contrast).

    Args:
      video_bthwc: uint8, or float32 in [-1, 1], 3 frames or more.
      backward: the motion of the reversed clips; by default it is estimated.
      exact: whether the given motion is the scene's own rather than an estimate.

    Raises:
      ValueError: fewer than three frames, or the motion is of other clips.
    """
    video_bthwc = pixels.as_unit(video_bthwc)
    if not len(video_bthwc) or video_bthwc.shape[1] < 3:
        raise ValueError(
            f"smoothness needs clips of 3 frames or more, got shape {video_bthwc.shape}"
        )
    low_pass = 0.0 if backward is not None and exact else _LOW_PASS
    backward = backward or temporal.estimate(video_bthwc[:, ::-1])
    expected = (len(video_bthwc), video_bthwc.shape[1] - 1, *video_bthwc.shape[2:4])
    if backward.followed_bphw.shape != expected:
        raise ValueError(
            f"the motion has shape {backward.followed_bphw.shape}, the clips need "
            f"{expected}"
        )
    # Pair t - 1 of the clips in their own order: the flow from frame t to t - 1.
    back_bphwx = backward.flow_bphwx[:, ::-1][:, :-1]
    followed_bphw = backward.followed_bphw[:, ::-1][:, :-1]
    result = []
    for clip_thwc, back_phwx, followed_phw in zip(
        video_bthwc, back_bphwx, followed_bphw, strict=True
    ):
        gone_on, changed, inside = map(
            np.asarray, _steady(clip_thwc[1:-1], clip_thwc[2:], back_phwx, low_pass)
        )
        used = followed_phw & inside
        change = changed[used].sum(dtype=np.float64)
        if change <= _NO_CHANGE * used.sum():
            result.append(0.0)
        else:
            unexplained = gone_on[used].sum(dtype=np.float64) / change
            result.append(1 - min(1.0, float(unexplained)))
    return np.array(result)


@functools.partial(jax.jit, static_argnums=3)
def _steady(here_phwc, next_phwc, back_phwx, low_pass):
    if low_pass:
        here_phwc, next_phwc = (
            temporal.low_pass(frames, low_pass) for frames in (here_phwc, next_phwc)
        )
    moved, inside = temporal.move_back(next_phwc, -back_phwx)
    gone_on = jnp.abs(moved - here_phwc).mean(-1)
    return gone_on, jnp.abs(next_phwc - here_phwc).mean(-1), inside


def histograms(motion: temporal.Motion, *, fps: float) -> np.ndarray:
    """Returns motion features of clips for a Frechet distance, similar to FVMD.

    Two histograms over eight directions (arXiv 2407.16124 builds them from point tracks):
    of the velocity V = fps / s * F_t(x), and of its change along the path,
    A = fps / s * (F_{t+1}(x + F_t(x)) - F_t(x)) / 2, by which each of two steps differs
    from their mean. Each vector adds its length to the two nearest directions, in linear
    shares. Pixels that cannot be tracked count as still. The sums are divided by the
    number of pixels. Their square root weakens the effect of the moving object's size.

    Args:
      motion: of clips of 3 frames or more.
      fps: frames per second.

    Returns:
      float64 [b, 16]; all zero for a still video.

    Raises:
      ValueError: fewer than three frames, or fps is not positive.
    """
    _check_fps(fps)
    b, p, h, w, _ = motion.flow_bphwx.shape
    if p < 2:
        raise ValueError(f"acceleration needs clips of 3 frames, got {p + 1}")
    result = []
    for flow_phwx, followed_phw in zip(
        motion.flow_bphwx, motion.followed_bphw, strict=True
    ):
        flow_phwx = np.float32(fps / min(h, w)) * flow_phwx * followed_phw[..., None]
        ahead = np.asarray(
            _along(flow_phwx, motion.flow_bphwx.dtype.type(fps / min(h, w)))
        )
        change = (ahead - flow_phwx[:-1]) / 2 * followed_phw[:-1, ..., None]
        result.append(np.concatenate([_by_direction(flow_phwx), _by_direction(change)]))
    return np.sqrt(np.array(result))


@jax.jit
def _along(velocity_phwx, scale):
    """The velocity of the next pair, at the position that each pixel has reached."""
    moved, _ = temporal.move_back(velocity_phwx[1:], velocity_phwx[:-1] / scale)
    return moved


def _by_direction(vectors_phwx: np.ndarray) -> np.ndarray:
    right, down = np.moveaxis(np.asarray(vectors_phwx, np.float64), -1, 0)
    length = np.hypot(right, down).ravel()
    place = (np.arctan2(down, right).ravel() / (2 * np.pi) * DIRECTIONS) % DIRECTIONS
    lower = np.floor(place).astype(int) % DIRECTIONS
    share = place - np.floor(place)
    total = np.bincount(lower, length * (1 - share), DIRECTIONS)
    total += np.bincount((lower + 1) % DIRECTIONS, length * share, DIRECTIONS)
    return total / length.size


def _check_fps(fps: float) -> None:
    if not fps > 0:
        raise ValueError(f"fps is {fps}, it must be positive")
