"""Rendering and optical flow of a scene.

Letters: T frames, K objects, H height, W width, C = 3 colours. Shapes are drawn from
signed distances (pixels, negative inside): alpha = clip(0.5 - distance * zoom, 0, 1),
later objects over earlier ones.

Bits are the same on every machine: transcendental functions run in float64 and only on
the axes; arrays use single float32 IEEE operations (+ - * / sqrt min max), never fused or
reordered sums.
"""

import math
from collections.abc import Mapping

import numpy as np

from sora_jax.toyworld.scene import PALETTE, Background, Scene

# Proportions for radius 1, chosen for similar areas: half side of the square, reach of the
# triangle's corners, half width of the cross's arms, half width and middle of the ring.
SQUARE, TRIANGLE, CROSS, RING = 0.9, 1.15, 0.34, (0.225, 0.775)

AREA = {
    "circle": math.pi,
    "square": 4 * SQUARE**2,
    "triangle": 0.75 * math.sqrt(3.0) * TRIANGLE**2,
    "cross": 8 * CROSS - 4 * CROSS**2,
    "ring": 4 * math.pi * RING[0] * RING[1],
}


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius) -> np.ndarray:
    """Signed distance in pixels of points (dx, dy) from a shape around the origin.

    Exact for circle and ring, and on the flat sides of the others (corners are the
    maximum of half planes, so they stay sharp). `radius` broadcasts against `dx` and
    `dy`. Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "ring":
        from_middle = np.abs(np.sqrt(dx * dx + dy * dy) - RING[1] * radius)
        return from_middle - RING[0] * radius
    ax = np.abs(dx)
    if shape == "triangle":
        half = dx.dtype.type(0.5)
        slanted = ax * dx.dtype.type(0.75**0.5) - dy * half
        return np.maximum(slanted, dy) - half * TRIANGLE * radius
    ay = np.abs(dy)
    if shape == "square":
        return np.maximum(ax, ay) - SQUARE * radius
    if shape == "cross":
        thin = CROSS * radius
        return np.minimum(
            np.maximum(ax - radius, ay - thin), np.maximum(ax - thin, ay - radius)
        )
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(AREA)}")


def _world_axes(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World x[T, W] and y[T, H] of the pixel centres, and zoom[T], in float64."""
    zoom = np.exp(scene.camera[:, 2])
    offset = np.arange(scene.size) + 0.5 - scene.size / 2
    scaled = offset / zoom[:, None]
    return scene.camera[:, :1] + scaled, scene.camera[:, 1:2] + scaled, zoom


def _background(
    background: Background, x_tw: np.ndarray, y_th: np.ndarray
) -> np.ndarray:
    """Grey[T, H, W]; sin(a + b) is split so that sines are taken on the axes only."""
    grey = np.float32(background.base)
    for kx, ky, phase, amplitude in background.waves:
        across, down = kx * x_tw + phase, ky * y_th
        sin_x = (amplitude * np.sin(across)).astype(np.float32)[:, None, :]
        cos_x = (amplitude * np.cos(across)).astype(np.float32)[:, None, :]
        sin_y = np.sin(down).astype(np.float32)[:, :, None]
        cos_y = np.cos(down).astype(np.float32)[:, :, None]
        grey = grey + sin_x * cos_y
        grey = grey + cos_x * sin_y
    return grey


def _frames(scene: Scene, frames: slice, colours: Mapping) -> np.ndarray:
    # Without camera motion, all frames share one row of axes and one background.
    seen = frames if (scene.camera != scene.camera[:1]).any() else slice(0, 1)
    x_tw, y_th, zoom = (axis[seen] for axis in _world_axes(scene))
    grey = _background(scene.background, x_tw, y_th)
    for shot, background in enumerate(scene.later, 1):
        is_shot = scene.camera[seen, 3] == shot
        if is_shot.any():
            grey[is_shot] = _background(background, x_tw[is_shot], y_th[is_shot])
    rgb = [grey, grey, grey]
    scale = zoom.astype(np.float32)[:, None, None]
    for k, thing in enumerate(scene.objects):
        dx = (x_tw - scene.pos[frames, k, :1]).astype(np.float32)[:, None, :]
        dy = (y_th - scene.pos[frames, k, 1:]).astype(np.float32)[:, :, None]
        radius, here = np.float32(thing.radius), None
        if scene.scale is not None:
            size = scene.scale[frames, k].astype(np.float32)[:, None, None]
            radius, here = radius * size, size > 0
        away = distance(thing.shape, dx, dy, radius)
        alpha = np.clip(np.float32(0.5) - away * scale, 0.0, 1.0, dtype=np.float32)
        if here is not None:
            alpha = np.where(here, alpha, np.float32(0))
        for channel, value in enumerate(colours[thing.colour]):
            below = rgb[channel]
            rgb[channel] = below + alpha * (np.float32(value) - below)
    video = np.empty((*rgb[0].shape, 3), np.uint8)
    for channel in range(3):
        video[..., channel] = rgb[channel] + np.float32(0.5)
    return video


def render(
    scene: Scene, colours: Mapping[str, tuple[int, int, int]] = PALETTE
) -> np.ndarray:
    """The clip, uint8[T, H, W, 3].

    Args:
      scene: what it shows.
      colours: RGB by name.
    """
    changing = [scene.pos, scene.camera]
    if scene.scale is not None:
        changing.append(scene.scale)
    if all((array == array[:1]).all() for array in changing):
        frame = _frames(scene, slice(0, 1), colours)
        return np.repeat(frame, scene.num_frames, axis=0)
    return _frames(scene, slice(None), colours)


# -- Optical flow ----------------------------------------------------------------------


def _owner(scene: Scene, t: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The object on top at world points of frame t, -1 for the background."""
    owner = np.full(np.broadcast_shapes(x.shape, y.shape), -1)
    for k, thing in enumerate(scene.objects):
        size = 1.0 if scene.scale is None else scene.scale[t, k]
        if size > 0:
            dx, dy = x - scene.pos[t, k, 0], y - scene.pos[t, k, 1]
            owner[distance(thing.shape, dx, dy, thing.radius * size) < 0] = k
    return owner


def flow(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Optical flow and occlusion.

    Returns displacement float32[T-1, H, W, 2] as (x, y) in pixels from frame t to
    t + 1, and occluded bool[T-1, H, W]: true where the content is covered in the next
    frame or leaves it.
    """
    x_tw, y_th, zoom = _world_axes(scene)
    size, steps = scene.size, scene.num_frames - 1
    moved = np.empty((steps, size, size, 2), np.float32)
    occluded = np.empty((steps, size, size), bool)
    pixel = np.arange(size) + 0.5
    for t in range(steps):
        x, y = np.broadcast_arrays(x_tw[t][None, :], y_th[t][:, None])
        owner = _owner(scene, t, x, y)
        # The last row is the background, which does not move in the world.
        shift = np.concatenate([scene.pos[t + 1] - scene.pos[t], np.zeros((1, 2))])
        x, y = x + shift[owner, 0], y + shift[owner, 1]
        new_x = (x - scene.camera[t + 1, 0]) * zoom[t + 1] + size / 2
        new_y = (y - scene.camera[t + 1, 1]) * zoom[t + 1] + size / 2
        moved[t, ..., 0] = new_x - pixel[None, :]
        moved[t, ..., 1] = new_y - pixel[:, None]
        outside = (new_x < 0) | (new_x > size) | (new_y < 0) | (new_y > size)
        occluded[t] = outside | (_owner(scene, t + 1, x, y) != owner)
    return moved, occluded
