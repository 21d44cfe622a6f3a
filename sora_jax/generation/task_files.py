"""Reads what a task is given from files: videos, pictures, masks.

Names are those of the flags of `generate`; the result has those of `tasks.TASKS`.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.data import video_io
from sora_jax.generation import recipes, tasks


def needed(task: str) -> tuple[str, ...]:
    """The flags that name a task's files."""
    inputs = tasks.find(task).inputs
    return tuple("keyframes" if name == "images" else name for name in inputs)


def check(task: str, named: Mapping[str, Any]) -> None:
    """Raises ValueError if a flag does not belong to a task, or one of a file is missing.

    Args:
      task: its name.
      named: values of flags.
    """
    taken = {*needed(task), *tasks.find(task).options} - {"at"}
    if wrong := sorted(named.keys() - taken):
        raise ValueError(f"--{wrong[0]} has no meaning for --task {task}")
    for flag in needed(task):
        if flag not in named:
            raise ValueError(f"--task {task} needs --{flag}")


def read(named: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the files that flags name; the frame rate is the video's.

    Args:
      named: values of flags, checked.

    Raises:
      ValueError, OSError: a file cannot be read, or a value is no list of numbers.
    """
    found = dict(named)
    for name in ("video", "video_2"):
        if name in found:
            film = video_io.decode(pathlib.Path(found[name]))
            found[name] = film.frames
            found.setdefault("fps", film.fps)
    if "mask" in found:
        file = pathlib.Path(found["mask"])
        is_video = file.suffix.lower().removeprefix(".") in recipes.VIDEO_FORMATS
        seen = video_io.decode(file).frames if is_video else video_io.read_image(file)
        found["mask"] = seen.mean(-1) > 127
    if "keyframes" in found:
        found |= keyframes(found.pop("keyframes"))
    if "references" in found:
        files = found["references"]
        if not files:
            raise ValueError("--references is empty: name one or two pictures")
        found["references"] = alike([*map(video_io.read_image, files)])
    if "curve" in found:
        try:
            found["curve"] = [float(share) for share in found["curve"]]
        except ValueError:
            raise ValueError(
                f"--curve is numbers such as 0,0.5,1, not {','.join(found['curve'])}"
            ) from None
    return found


def keyframes(items: Sequence[str]) -> dict[str, Any]:
    """Images and their frames, from FRAME=IMAGE each; scaled to one size."""
    if not items:
        raise ValueError("--keyframes is empty: give FRAME=IMAGE, such as 0=a.png")
    found = []
    for item in items:
        frame, sign, file = item.partition("=")
        if not sign or not frame.strip().isdecimal():
            raise ValueError(
                f"--keyframes are FRAME=IMAGE, such as 0=a.png, not {item!r}"
            )
        found.append((int(frame), video_io.read_image(pathlib.Path(file))))
    images = alike([image for _, image in found])
    return {"at": [frame for frame, _ in found], "images": images}


def alike(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images, scaled and cropped to the size of the first."""
    height, width = images[0].shape[:2]
    return [tasks.fitted(image[None], height, width)[0] for image in images]


def digest(value: Any, name: str) -> str:
    """The SHA-256 of the pixels of a video, a mask or images."""
    pixels = np.ascontiguousarray(tasks.pixels(value, name))
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def again(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a task is given to make a video of a recipe again.

    Args:
      recipe: of the video.
      given: what was read from files, and options in place of the recipe's.

    Raises:
      ValueError: a file is another one than that of the recipe, or the recipe is damaged.
    """
    kind, inputs = tasks.find(recipe["task"]), recipe.get("inputs")
    names = {*kind.inputs, *kind.options}
    if not isinstance(inputs, dict) or inputs.keys() - {"fps"} != names:
        raise ValueError(f"the recipe lacks what task {recipe['task']!r} was given")
    for name in kind.inputs:
        stored = inputs[name]
        if not isinstance(stored, dict) or not isinstance(stored.get("sha256"), str):
            raise ValueError(f"the recipe lacks the SHA-256 of {name}")
        if digest(given[name], name) != stored["sha256"]:
            raise ValueError(
                f"{name} is not the one that the video was made of: its SHA-256 differs"
            )
    options = {n: inputs[n] for n in kind.options if inputs[n] not in (None, "")}
    rate = {"fps": inputs["fps"]} if "fps" in inputs else {}
    return options | dict(given) | rate
