"""Video files with recipes: what is needed to make a video again.

A recipe is a JSON object of the arguments of the call and digests of the weights. It is
stored in the video file's comment and beside it: clip.json for clip.mp4, clip.webm.json,
clip.gif.json and clip.png.json.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from sora_jax.core import paths
from sora_jax.data import gif, pictures, video_io
from sora_jax.generation import prompt_file
from sora_jax.generation import request as requests

VIDEO_FORMATS = ("mp4", "webm", "gif")
FORMATS = (*VIDEO_FORMATS, "png")  # a PNG holds a video of one frame

# Fields that identify the weights; the others are arguments of the call.
WEIGHTS = ("config_digest", "step", "vae_digest", "text_encoder_digest", "weights")
WEIGHTS += ("lora", "lora_2")
_REWRITTEN = ("original_prompt", "upsampler")  # fields of a prompt that was rewritten
ARGUMENTS = ("prompt", "negative_prompt", "seed", *requests.SHARED)


def format_of(path: pathlib.Path) -> str:
    """The format of a video file, by its suffix.

    Raises:
      ValueError: it is not one of `FORMATS`.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ValueError(f"a video's file ends in one of {endings}, not {path.name!r}")
    return kind


def check_format(path: pathlib.Path, num_frames: int, fps: float) -> str:
    """Returns a note if the format cannot keep the frame rate exactly, else "".

    Raises:
      ValueError: the suffix is unknown, or the format cannot hold such a video.
    """
    kind = format_of(path)
    if kind == "png" and num_frames > 1:
        raise ValueError(
            f"a .png is one frame, and the video has {num_frames}: give num_frames 1, or "
            "another file"
        )
    if kind != "gif":
        return ""
    gif.check(num_frames, fps)
    shown = sorted(set(gif.durations(num_frames, fps)))
    if len(shown) == 1:
        return ""
    return (
        f"a GIF times its frames in hundredths of a second: at {fps:g} frames a second "
        f"each is shown for {' or '.join(map(str, shown))} of them"
    )


def sidecar_of(path: pathlib.Path) -> pathlib.Path:
    """The recipe file of a video."""
    is_mp4 = format_of(path) == "mp4"
    return path.with_suffix(".json") if is_mp4 else path.with_name(path.name + ".json")


def save(frames_thwc: np.ndarray, path: str | pathlib.Path, recipe: Mapping) -> None:
    """Writes one clip in the format of its suffix, with the recipe inside and beside it.

    The recipe file is written last: if it exists, the video is complete.

    Args:
      frames_thwc: float in [0, 1].
      path: ends in one of `FORMATS`.
      recipe: from `Output.recipes`.
    """
    path = pathlib.Path(path)
    kind = format_of(path)
    check_format(path, len(frames_thwc), recipe["fps"])
    frames_u8 = np.round(np.clip(frames_thwc, 0, 1) * 255).astype(np.uint8)
    text = json.dumps(dict(recipe), sort_keys=True)
    if kind == "gif":
        video = gif.encode(frames_u8, recipe["fps"], text)
    elif kind == "png":
        (frame_hwc,) = frames_u8
        video = pictures.encode_png(frame_hwc, text)
    else:
        encode = video_io.encode_mp4 if kind == "mp4" else video_io.encode_webm
        video = encode(frames_u8, recipe["fps"], metadata={"comment": text})
    store(path, recipe, lambda temporary: temporary.write_bytes(video))


def store(
    path: pathlib.Path, recipe: Mapping, write: Callable[[pathlib.Path], object]
) -> None:
    """Writes a video and, at last, its recipe beside it.

    write: writes the video to the path that it is given.
    """
    sidecar_of(path).unlink(missing_ok=True)
    with paths.replacing(path) as temporary:
        write(temporary)
        paths.sync(temporary)
    sidecar = dict(recipe) | {"video_sha256": paths.sha256_file(path)}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    paths.write_atomically(sidecar_of(path), text)


def frames_of(path: str | pathlib.Path) -> np.ndarray:
    """The frames of a file that `save` wrote, uint8 [t, h, w, 3]."""
    if format_of(pathlib.Path(path)) == "png":
        return pictures.read_image(path)[None]
    return video_io.decode(path).frames


def read(path: str | pathlib.Path) -> dict:
    """Reads the recipe that a video carries.

    Raises:
      ValueError: it is not a video with a recipe.
    """
    is_png = pathlib.Path(path).suffix.lower() == ".png"
    comment = pictures.read_comment(path) if is_png else video_io.read_comment(path)
    recipe = _parse(comment or "")
    if recipe is None:
        raise ValueError(f"{path} contains no recipe: generate did not make it")
    if "storyboard" in recipe:
        raise ValueError(
            f"{path} is of a storyboard, which makes it again: --storyboard"
        )
    try:
        prompt_file.values_of(_arguments(recipe))
        for name in _REWRITTEN:
            if not isinstance(recipe.get(name, ""), str):
                raise ValueError(f"{name} is text, not {recipe[name]!r}")
    except ValueError as error:
        raise ValueError(f"the recipe of {path} is damaged: {error}") from None
    return recipe


def _arguments(recipe: Mapping) -> dict:
    return {n: recipe[n] for n in ARGUMENTS if recipe.get(n) is not None}


def _parse(text: str) -> dict | None:
    """A recipe, or None if the text is something else."""
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(recipe, dict) or not recipe.keys() >= {"prompt", "seed", "fps"}:
        return None
    return recipe


def arguments(recipe: Mapping, image: str | None = None) -> dict:
    """The arguments of a call that makes the video again.

    Args:
      recipe: the video's.
      image: the image that it was made from, if any.

    Raises:
      ValueError: it was made from an image or from latents, which it does not contain.
    """
    if recipe.get("image_sha256") and image is None:
        raise ValueError(
            "the video was made from an image, which it does not contain: give --image"
        )
    if recipe.get("latents_sha256"):
        raise ValueError("the video was made from latents, which it does not contain")
    values = _arguments(recipe)
    if (rewritten := upsampled(recipe)) is not None:
        values["prompt"] = rewritten
    return values


def upsampled(recipe: Mapping) -> requests.Upsampled | None:
    """How the prompt of a recipe was rewritten; None if it was not."""
    if not all(isinstance(recipe.get(name), str) for name in ("prompt", *_REWRITTEN)):
        return None
    return requests.Upsampled(recipe["prompt"], *(recipe[name] for name in _REWRITTEN))


def check_weights(recipe: Mapping, source: Mapping) -> None:
    """Raises ValueError if a model has other weights than those of the recipe."""
    other = [name for name in WEIGHTS if recipe.get(name) != source.get(name)]
    if other:
        raise ValueError(
            f"the video was made by {recipe.get('model')!r} "
            f"({', '.join(f'{n} {recipe.get(n)}' for n in other)}), this model is "
            f"{source.get('model')!r} ({', '.join(f'{n} {source.get(n)}' for n in other)})"
        )


def existing(file: pathlib.Path) -> dict | None:
    """The recipe of an existing clip, from its recipe file or from inside, or None."""
    with contextlib.suppress(OSError, ValueError):
        if (recipe := _parse(sidecar_of(file).read_text())) is not None:
            return recipe
    with contextlib.suppress(OSError, ValueError):
        return read(file)
    return None


def is_finished(file: pathlib.Path, recipe: Mapping, overwrite: bool = False) -> bool:
    """Whether a clip exists with the same recipe and need not be made again.

    A half-written clip, left by an interruption, is made again.

    Args:
      file: of the clip.
      recipe: of the clip to make.
      overwrite: whether a file with another recipe may be replaced.

    Raises:
      ValueError: there is such a file, and it may not be replaced.
    """
    there = [path for path in (file, sidecar_of(file)) if path.exists()]
    if not there:
        return False
    before, problem = existing(file), None
    if before is None:
        problem = "exists and has no recipe"
    else:
        other = [
            f"{name} was {before.get(name)!r} and is {recipe.get(name)!r}"
            for name in dict.fromkeys((*recipe, *WEIGHTS))
            if name != "versions" and before.get(name) != recipe.get(name)
        ]
        digest = before.get("video_sha256")
        if other:
            problem = f"exists with another recipe ({'; '.join(other)})"
        elif file.exists() and digest and paths.sha256_file(file) != digest:
            problem = "was changed after it was made"
    if problem and not overwrite:
        raise ValueError(
            f"{there[0]} {problem}: choose another --out, remove it, or add --overwrite"
        )
    return not problem and len(there) == 2
