"""Clips whose motion is known exactly."""

import numpy as np


def drifting(velocity, frames: int, size: int, wave: float = 1.0) -> np.ndarray:
    """A smooth texture that moves as a whole, sampled exactly: uint8 [t, h, w, 3].

    Args:
      velocity: (x, y) in pixels a frame.
      frames, size: t, and both of h and w.
      wave: how much longer its waves are than 10 to 24 pixels.
    """
    rng = np.random.default_rng(3)
    length = rng.uniform(2 * np.pi / 24, 2 * np.pi / 10, 6) / wave
    angle, phase = rng.uniform(0, 2 * np.pi, 6), rng.uniform(0, 2 * np.pi, (6, 3))
    y, x = np.mgrid[:size, :size] + 0.5
    clip = []
    for t in range(frames):
        across, down = x - velocity[0] * t, y - velocity[1] * t
        along = np.cos(angle) * across[..., None] + np.sin(angle) * down[..., None]
        clip.append(0.5 + 0.06 * np.sin((length * along)[..., None] + phase).sum(2))
    return np.round(255 * np.array(clip)).clip(0, 255).astype(np.uint8)
