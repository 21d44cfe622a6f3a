"""Animated GIFs, which any page or chat shows, with at most 256 colours.

Letters: t time, h height, w width.
"""

import io

import numpy as np
import PIL.Image

FASTEST = 50.0  # frames a second: players slow down shorter frames tenfold
# Seconds: equal frames are merged, and a frame lasts at most 65,535 hundredths.
LONGEST = 655.0
_COLOURS = 256
_SAMPLE = 1 << 16  # pixels that the colours are chosen from


def check(num_frames: int, fps: float) -> None:
    """Raises ValueError where a GIF cannot have this many frames at this rate."""
    if fps > FASTEST:
        raise ValueError(
            f"a GIF has at most {FASTEST:g} frames a second, not {fps:g}: give a lower "
            "fps, or write .mp4 or .webm"
        )
    if num_frames / fps > LONGEST:
        raise ValueError(
            f"a GIF is at most {LONGEST:g} seconds long, not {num_frames / fps:.0f}: "
            "write .mp4 or .webm"
        )


def durations(num_frames: int, fps: float) -> list[int]:
    """How long each frame is shown, in hundredths of a second, a GIF's unit.

    Each frame starts at the hundredth nearest to its time, so that the total length is
    right.
    """
    starts = np.round(100 * np.arange(num_frames + 1) / fps).astype(int)
    return np.diff(starts).tolist()


def encode(frames_thwc: np.ndarray, fps: float, comment: str = "") -> bytes:
    """Encodes uint8[t, h, w, 3] as a GIF that repeats; equal frames give equal bytes.

    All frames share a palette, so that still areas do not flicker. Equal neighbours are
    merged into one frame that is shown longer.

    Args:
      frames_thwc: the frames.
      fps: frames a second, at most `FASTEST`.
      comment: stored in the file; ASCII.

    Raises:
      ValueError: fps is too high, or the video too long.
    """
    t, h, w, _ = frames_thwc.shape
    check(t, fps)
    step = max(1, round((t * h * w / _SAMPLE) ** (1 / 3)))
    some_thwc = np.ascontiguousarray(frames_thwc[::step, ::step, ::step])
    sample = PIL.Image.fromarray(some_thwc.reshape(-1, some_thwc.shape[2], 3))
    # Unlike a median cut, this keeps the extreme colours, which dithering needs.
    palette = sample.quantize(_COLOURS, PIL.Image.Quantize.MAXCOVERAGE)
    first, *others = (
        PIL.Image.fromarray(frame_hwc).quantize(palette=palette)
        for frame_hwc in frames_thwc
    )
    file = io.BytesIO()
    first.save(
        file,
        "GIF",
        save_all=True,
        append_images=others,
        loop=0,
        duration=[10 * hundredths for hundredths in durations(t, fps)],
        comment=comment.encode("ascii"),
    )
    return file.getvalue()
