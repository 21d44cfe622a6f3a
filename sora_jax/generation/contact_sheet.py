"""Contact sheets: several videos as rows of frames in one picture, with their prompts.

Letters: t frames, h height, w width, c channels (RGB).
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from sora_jax.core import paths
from sora_jax.data import samples

_FRAMES = 6  # of a video, evenly spaced, the first and the last among them
_SIDE = 96  # pixels of a frame's longer side, at least
_MARGIN, _GAP, _TEXT = 16, 4, 14
_PAPER, _INK = "white", "#222222"


def write(
    path: pathlib.Path, videos: Sequence[np.ndarray], captions: Sequence[str]
) -> None:
    """Draws a row of frames for each video, below its caption.

    Frames of small videos are enlarged by whole factors, so that pixels stay pixels.

    Args:
      path: the .png file to write.
      videos: uint8 [t, h, w, c], which may differ in size.
      captions: one for each.
    """
    font = PIL.ImageFont.load_default(_TEXT)
    strips = [_strip(video) for video in videos]
    line = _TEXT + 2 * _GAP
    width = max(strip.width for strip in strips)
    height = sum(line + strip.height + _MARGIN for strip in strips)
    sheet = PIL.Image.new("RGB", (width + 2 * _MARGIN, height + _MARGIN), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    y = _MARGIN
    for strip, caption in zip(strips, captions, strict=True):
        text = " ".join(caption.split())
        while font.getlength(text) > width:
            text = f"{text[:-4].rstrip()}..."
        draw.text((_MARGIN, y), text, _INK, font)
        sheet.paste(strip, (_MARGIN, y + line))
        y += line + strip.height + _MARGIN
    with paths.replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def _strip(video_thwc: np.ndarray) -> PIL.Image.Image:
    """The row of frames of one video."""
    t, h, w, _ = video_thwc.shape
    factor = -(-_SIDE // max(h, w))
    chosen = samples.evenly(t, _FRAMES)
    step = w * factor + _GAP
    row = PIL.Image.new("RGB", (step * len(chosen) - _GAP, h * factor), _PAPER)
    for place, index in enumerate(chosen):
        frame = PIL.Image.fromarray(video_thwc[index])
        large = frame.resize((w * factor, h * factor), PIL.Image.Resampling.NEAREST)
        row.paste(large, (place * step, 0))
    return row
