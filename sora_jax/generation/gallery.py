"""A gallery: one example of each way that a model can make or edit a video.

The examples begin with videos that the model makes from two prompts. What it was not
trained for is left out.

Letters: t frames, h height, w width of a video.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from sora_jax.core import paths
from sora_jax.data import gif
from sora_jax.data import samples as sampling
from sora_jax.generation import pipeline, tasks

PROMPTS = ("a red circle moves right slowly", "a blue square moves right slowly")
_COLUMNS, _SCALE, _GAP, _TEXT = 4, 2, 6, 12
_PAPER, _INK = "white", "#222222"
_FPS = 8.0


@dataclasses.dataclass(frozen=True)
class Example:
    """One video, and what it was made of.

    Attributes:
      name: of the task.
      given_thwc: what was given, uint8; no frames: only a text.
      made_thwc: the video, uint8.
    """

    name: str
    given_thwc: np.ndarray
    made_thwc: np.ndarray


def _keyframes(video, other):
    at = [0, len(video) // 2, len(video) - 1]
    return {"images": [video[frame] for frame in at], "at": at}


def _inside(video: np.ndarray) -> np.ndarray:
    """The middle of the frames, of half their size."""
    _, h, w, _ = video.shape
    return video[:, h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2]


def _lower(video: np.ndarray) -> np.ndarray:
    """All but the upper third of each frame."""
    mask = np.zeros(video.shape[:3], bool)
    mask[:, video.shape[1] // 3 :] = True
    return mask


# Of two videos, what each task is given, and whether the text is that of the second.
INPUTS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], dict[str, Any]], bool]] = {
    "keyframes": (_keyframes, False),
    "loop": (lambda video, other: {"num_frames": 17}, False),
    "reference": (lambda video, other: {"references": [other[0]]}, True),
    "extend": (lambda video, other: {"video": video, "frames": 8}, False),
    "extend_backwards": (lambda video, other: {"video": video, "frames": 8}, False),
    "connect": (
        lambda video, other: {"video": video[:5], "video_2": video[-3:], "frames": 4},
        False,
    ),
    "replace": (lambda video, other: {"video": video, "first": 3, "last": 5}, False),
    "fill": (
        lambda video, other: {"video": video[::2], "factor": 2, "fps": 4.0},
        False,
    ),
    "inpaint": (
        lambda video, other: {"video": video, "mask": _lower(video)},
        True,
    ),
    "outpaint": (
        lambda video, other: {
            "video": _inside(video),
            "height": video.shape[1],
            "width": video.shape[2],
        },
        False,
    ),
    "vary": (lambda video, other: {"video": video, "strength": 0.9}, False),
    "blend": (lambda video, other: {"video": video, "video_2": other}, True),
    "edit": (lambda video, other: {"video": video}, True),
}


def examples(
    pipe: pipeline.Pipeline,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[Example], dict[str, str]]:
    """Makes the examples.

    Args:
      pipe: the model.
      prompts: two, of things that differ.
      seed: of all videos.
      progress: called with the name of each.

    Returns:
      The examples, and why others are left out, by name.
    """
    first, second = (_video(pipe([text], seed=seed)) for text in prompts)
    found, refused = [Example("text", first[:0], first)], {}
    if "images" in pipe.settings.trained_patterns:
        image = _video(pipe([prompts[0]], seed=seed, num_frames=1))
        found.append(Example("image (num_frames 1)", first[:0], image))
    for name in tasks.TASKS:
        inputs, takes_second = INPUTS[name]
        given = inputs(first, second)
        text = prompts[takes_second]
        if name == "edit" and "edit" not in pipe.settings.trained_patterns:
            given = given | {"source": prompts[0]}
        progress(name)
        try:
            made = _video(pipe.run(name, [text], seed=seed, batch_size=1, **given))
        except tasks.Untrained as error:
            refused[name] = str(error)
            continue
        shown = given.get("video", given.get("images", given.get("references")))
        shown = first[:0] if shown is None else np.stack(list(shown))
        found.append(Example(name, shown, made))
    return found, refused


def _video(out: pipeline.Output) -> np.ndarray:
    return np.round(255 * out.frames[0]).astype(np.uint8)


def write(folder: pathlib.Path, found: Sequence[Example]) -> list[pathlib.Path]:
    """Writes a GIF of each example, and one of all.

    Returns:
      The files; the last is `gallery.gif`, with what was given at the left of each video.
    """
    files = []
    for example in found:
        name = example.name.split()[0]
        files.append(folder / f"{name}.gif")
        frames = _enlarged(example.made_thwc)
        paths.write_atomically(files[-1], gif.encode(frames, _FPS, example.name))
    files.append(folder / "gallery.gif")
    names = ", ".join(example.name for example in found)
    paths.write_atomically(files[-1], gif.encode(grid(found), _FPS, names))
    return files


def grid(found: Sequence[Example]) -> np.ndarray:
    """All examples side by side, uint8 [t, h, w, 3]: what was given, and the video.

    Each is shown from its first to its last frame, and again, as long as the longest.
    """
    length = max(len(example.made_thwc) for example in found)
    cells = [_cell(example, length) for example in found]
    width = max(cell.shape[2] for cell in cells)
    height = max(cell.shape[1] for cell in cells)
    rows = -(-len(cells) // _COLUMNS)
    page = np.full((length, rows * height, _COLUMNS * width, 3), 255, np.uint8)
    for place, cell in enumerate(cells):
        y, x = divmod(place, _COLUMNS)
        _, h, w, _ = cell.shape
        page[:, y * height : y * height + h, x * width : x * width + w] = cell
    return page


def _enlarged(video_thwc: np.ndarray) -> np.ndarray:
    return video_thwc.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)


def _cell(example: Example, length: int) -> np.ndarray:
    made, given = _enlarged(example.made_thwc), _enlarged(example.given_thwc)
    _, h, w, _ = made.shape
    top = _TEXT + _GAP
    shown = []
    for t in range(length):
        cell = PIL.Image.new("RGB", (2 * w + 3 * _GAP, top + h + _GAP), _PAPER)
        draw = PIL.ImageDraw.Draw(cell)
        draw.text((_GAP, 0), example.name, _INK, PIL.ImageFont.load_default(_TEXT))
        if len(given):
            place = sampling.evenly(length, len(given)) if len(given) < 4 else None
            index = t % len(given)
            if place is not None:  # pictures: each for its share of the time
                index = max(k for k, start in enumerate(place) if start <= t)
            before = PIL.Image.fromarray(given[index])
            at = (_GAP + (w - before.width) // 2, top + (h - before.height) // 2)
            cell.paste(before, at)
        now = PIL.Image.fromarray(made[t % len(made)])
        cell.paste(now, (w + 2 * _GAP, top))
        shown.append(np.asarray(cell))
    return np.stack(shown)
