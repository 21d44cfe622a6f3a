"""Temporal consistency: flicker and warping error along the motion of a video.

Both compare a frame with the next one moved back along the optical flow, so that motion
itself is no error, as it is in a plain frame difference. The flow is exact where the
scene is known, and estimated (pyramidal Lucas-Kanade) elsewhere. A still video has no
error at all. So `measure` also returns the amount of motion and the share of pixels that
could be tracked; tables show them together, beside still and shuffled controls.

Letters: b clips, t frames, p pairs of neighbouring frames (t - 1), h height, w width,
c colour channels, x the two components of a displacement (right, down) in pixels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.evals import pixels

# Flat areas have nothing to track: where gradients are well below sqrt(1e-4) = 0.01 of
# full scale per pixel, the flow of the coarser level stays.
_FLATNESS = 1e-4
_WINDOW_SIGMA = 2.0
_ITERATIONS = 5
# Forward-backward check of Sundaram, Brox and Keutzer (2010), section 4.
_CHECK_SCALE, _CHECK_OFFSET = 0.01, 0.5
# Computed at a time, so that memory does not grow with the length of a clip.
_PIXELS_AT_ONCE, _PAIRS_AT_ONCE = 1 << 21, 256
_PAIRS_STEP = 16  # so that clips of all lengths share a few compiled shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Motion:
    """The motion between neighbouring frames of a batch of clips.

    Attributes:
      flow_bphwx: where each pixel of frame t is in frame t + 1, as a displacement.
      followed_bphw: False where the pixel is occluded or leaves the frame, and where
        forward and backward estimates contradict each other.
    """

    flow_bphwx: np.ndarray
    followed_bphw: np.ndarray


def estimate(video_bthwc: np.ndarray) -> Motion:
    """Estimates the motion by dense pyramidal Lucas-Kanade (Bouguet 2001).

    A Gaussian window of sigma 2 px around each pixel, over all colour channels, gives one
    2 x 2 system. Levels of half the size, down to 8 px, give the initial flow.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
    """
    return _estimate(video_bthwc, both=False)[0]


def estimate_both(video_bthwc: np.ndarray) -> tuple[Motion, Motion]:
    """Estimates the motion of clips and of the reversed clips, at the cost of one.

    The second is equal to `estimate(video_bthwc[:, ::-1])`.
    """
    return _estimate(video_bthwc, both=True)


def _estimate(video_bthwc, *, both: bool) -> tuple[Motion, ...]:
    video_bthwc = pixels.as_unit(video_bthwc)
    _check_pairs(video_bthwc)
    b, t, h, w, c = video_bthwc.shape
    first, second = (
        part.reshape(-1, h, w, c) for part in (video_bthwc[:, :-1], video_bthwc[:, 1:])
    )
    count = len(first)
    most = max(1, min(_PAIRS_AT_ONCE, _PIXELS_AT_ONCE // (h * w)))
    size = min(most, -(-count // _PAIRS_STEP) * _PAIRS_STEP)
    parts = []
    for start in range(0, count, size):
        pair = [frames[start : start + size] for frames in (first, second)]
        # A short last chunk is padded, so that one shape is compiled.
        fill = size - len(pair[0])
        padded = (np.concatenate([x, np.repeat(x[-1:], fill, axis=0)]) for x in pair)
        found = _estimate_pairs(*padded, both)
        parts.append([np.asarray(array)[: size - fill] for array in found])
    arrays = [np.concatenate(part) for part in zip(*parts, strict=True)]
    arrays = [array.reshape(b, t - 1, *array.shape[1:]) for array in arrays]
    motions = [Motion(*arrays[:2])]
    if both:
        motions.append(Motion(*(array[:, ::-1] for array in arrays[2:])))
    return tuple(motions)


def measure(
    video_bthwc: np.ndarray, motion: Motion | None = None
) -> dict[str, np.ndarray]:
    """Measures how far each clip changes along its own motion.

    Args:
      video_bthwc: uint8, or float32 in [-1, 1].
      motion: the exact motion of the scene; by default it is estimated.

    Returns:
      One value per clip, [b], brightness in units of full scale:
        warping_error: mean squared difference of frame t and frame t + 1 moved back
          along the flow, over the pixels that can be tracked (arXiv 1808.00449, eq. 8).
        flicker: mean absolute difference of their luminances.
        motion: the mean length of the flow in pixels per frame.
        followed: share of pixels that could be tracked.
      Clips without a tracked pixel have NaN errors; callers must report these clips.
    """
    video_bthwc = pixels.as_unit(video_bthwc)
    _check_pairs(video_bthwc)
    motion = motion or estimate(video_bthwc)
    expected = (len(video_bthwc), video_bthwc.shape[1] - 1, *video_bthwc.shape[2:4])
    if motion.followed_bphw.shape != expected:
        raise ValueError(
            f"the motion has shape {motion.followed_bphw.shape}, the clips need "
            f"{expected}"
        )
    most = _PIXELS_AT_ONCE // int(np.prod(video_bthwc.shape[1:4]))
    chunks = [
        _measure_batch(video_bthwc[rows], motion.flow_bphwx[rows])
        for rows in _slices(len(video_bthwc), max(1, min(64, most)))
    ]
    squared, absolute, inside = (
        np.concatenate([np.asarray(chunk[i]) for chunk in chunks]) for i in range(3)
    )
    usable = motion.followed_bphw & inside
    count_b = usable.sum((1, 2, 3))

    def masked_mean(values_bphw):
        total_b = np.where(usable, values_bphw, 0).sum((1, 2, 3), dtype=np.float64)
        return np.where(count_b > 0, total_b / np.maximum(count_b, 1), np.nan)

    return {
        "warping_error": masked_mean(squared),
        "flicker": masked_mean(absolute),
        "motion": np.linalg.norm(motion.flow_bphwx, axis=-1).mean((1, 2, 3)),
        "followed": usable.mean((1, 2, 3)),
    }


def move_back(
    image_bhwc: jax.Array, flow_bhwx: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Samples an image at (pixel + flow), bilinearly.

    Returns:
      The image [b, h, w, c], with edges repeated, and whether each position lies in the
      frame, bool [b, h, w].
    """
    b, h, w, _ = image_bhwc.shape
    x = jnp.arange(w, dtype=jnp.float32) + flow_bhwx[..., 0]
    y = jnp.arange(h, dtype=jnp.float32)[:, None] + flow_bhwx[..., 1]
    # The last pixel reaches half a pixel beyond its centre.
    inside = (x >= -0.5) & (x <= w - 0.5) & (y >= -0.5) & (y <= h - 0.5)
    x, y = jnp.clip(x, 0, w - 1), jnp.clip(y, 0, h - 1)
    x0 = jnp.minimum(x.astype(jnp.int32), max(w - 2, 0))
    y0 = jnp.minimum(y.astype(jnp.int32), max(h - 2, 0))
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    row = jnp.arange(b)[:, None, None]

    def at(y, x):
        return image_bhwc[row, jnp.minimum(y, h - 1), jnp.minimum(x, w - 1)]

    top = at(y0, x0) * (1 - fx) + at(y0, x0 + 1) * fx
    bottom = at(y0 + 1, x0) * (1 - fx) + at(y0 + 1, x0 + 1) * fx
    return top * (1 - fy) + bottom * fy, inside


def low_pass(image_bhwc: jax.Array, sigma: float) -> jax.Array:
    """Gaussian filter over height and width, edges repeated."""
    radius = round(2.5 * sigma)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * np.square(offsets / sigma)).astype(np.float32)
    kernel /= kernel.sum()

    def along(image, axis):
        size = image.shape[axis]
        padding = [(0, 0)] * 4
        padding[axis] = (radius, radius)
        padded = jnp.pad(image, padding, mode="edge")
        shifted = (
            weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i, weight in enumerate(kernel)
        )
        return functools.reduce(jnp.add, shifted)

    return along(along(image_bhwc, 1), 2)


def _check_pairs(video_bthwc):
    if not len(video_bthwc) or video_bthwc.shape[1] < 2:
        raise ValueError(
            "temporal measures need a clip of 2 frames or more, got shape "
            f"{video_bthwc.shape}"
        )


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


@functools.partial(jax.jit, static_argnums=2)
def _estimate_pairs(first_bhwc, second_bhwc, both):
    """Flow and tracked pixels from the first to the second images (and back)."""
    forward = _lucas_kanade(first_bhwc, second_bhwc)
    backward = _lucas_kanade(second_bhwc, first_bhwc)
    found = (forward, _followed(forward, backward))
    return (*found, backward, _followed(backward, forward)) if both else found


def _followed(flow_bhwx, return_bhwx):
    back_at_target, inside = move_back(return_bhwx, flow_bhwx)
    contradiction = jnp.square(flow_bhwx + back_at_target).sum(-1)
    length = jnp.square(flow_bhwx).sum(-1) + jnp.square(back_at_target).sum(-1)
    return (contradiction < _CHECK_SCALE * length + _CHECK_OFFSET) & inside


@jax.jit
def _measure_batch(video_bthwc, flow_bphwx):
    b, t, h, w, c = video_bthwc.shape
    first = video_bthwc[:, :-1].reshape(-1, h, w, c)
    second = video_bthwc[:, 1:].reshape(-1, h, w, c)
    moved, inside = move_back(second, flow_bphwx.reshape(-1, h, w, 2))
    difference = moved - first
    luminance = difference @ jnp.array([0.299, 0.587, 0.114], jnp.float32)
    return (
        jnp.square(difference).mean(-1).reshape(b, t - 1, h, w),
        jnp.abs(luminance).reshape(b, t - 1, h, w),
        inside.reshape(b, t - 1, h, w),
    )


def _lucas_kanade(first_bhwc, second_bhwc):
    """Displacement [b, h, w, 2] of every pixel of the first images."""
    pyramid = [(first_bhwc, second_bhwc)]
    while min(pyramid[-1][0].shape[1:3]) >= 16:
        pyramid.append(tuple(map(_halve, pyramid[-1])))
    flow = jnp.zeros((*pyramid[-1][0].shape[:3], 2), jnp.float32)
    for first, second in reversed(pyramid):
        b, h, w, _ = first.shape
        if flow.shape[1:3] != (h, w):
            growth = jnp.array([w / flow.shape[2], h / flow.shape[1]], jnp.float32)
            flow = jax.image.resize(flow, (b, h, w, 2), "linear") * growth
        flow = _refine(first, second, flow)
    return flow


def _refine(first_bhwc, second_bhwc, flow_bhwx):
    """Gauss-Newton steps of one level; the gradients are those of the first image."""
    down, right = jnp.gradient(first_bhwc, axis=(1, 2))
    products = [
        (a * b).sum(-1) for a, b in ((right, right), (right, down), (down, down))
    ]

    def step(flow, _):
        moved, inside = move_back(second_bhwc, flow)
        change = moved - first_bhwc
        forces = [(right * change).sum(-1), (down * change).sum(-1)]
        # Pixels that left the frame hold no information for their neighbours.
        terms = jnp.stack([*products, *forces], -1) * inside[..., None]
        xx, xy, yy, x, y = jnp.moveaxis(low_pass(terms, _WINDOW_SIGMA), -1, 0)
        xx, yy = xx + _FLATNESS, yy + _FLATNESS
        update = jnp.stack([yy * x - xy * y, xx * y - xy * x], -1)
        update = update / (xx * yy - xy * xy)[..., None]
        # The linear model of the brightness holds for a pixel at most.
        return flow - jnp.clip(update, -1, 1), None

    return jax.lax.scan(step, flow_bhwx, length=_ITERATIONS)[0]


def _halve(image_bhwc):
    b, h, w, c = image_bhwc.shape
    return jax.image.resize(image_bhwc, (b, h // 2, w // 2, c), "linear")
