"""What a video was made of, inside the file and beside it, and back.

A recipe is a JSON object: prompt, negative prompt, seed, sizes, solver, and which
weights. It stands in the file's comment and beside it: clip.json of clip.mp4, or
clip.webm.json and clip.gif.json.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from sora_jax.core import paths
from sora_jax.data import gif, video_io
from sora_jax.generation import prompt_file
from sora_jax.generation import request as requests

FORMATS = ("mp4", "webm", "gif")

# What names the weights; the rest is what a call was asked for.
WEIGHTS = ("config_digest", "step", "vae_digest", "text_encoder_digest", "weights")
ARGUMENTS = ("prompt", "negative_prompt", "seed", *requests.SHARED)


def format_of(path: pathlib.Path) -> str:
    """The format that a video file's name says.

    Raises:
      ValueError: it is none of `FORMATS`.
    """
    found = path.suffix.lower().removeprefix(".")
    if found not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ValueError(f"a video's file ends in one of {endings}, not {path.name!r}")
    return found


def check_format(path: pathlib.Path, num_frames: int, fps: float) -> str:
    """Says where a format cannot keep the frame rate exactly; "" where it can.

    Raises:
      ValueError: it is no file of these formats, or cannot hold such a video.
    """
    if format_of(path) != "gif":
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
    """The file beside a video that holds its recipe."""
    is_mp4 = format_of(path) == "mp4"
    return path.with_suffix(".json") if is_mp4 else path.with_name(path.name + ".json")


def save(frames_thwc: np.ndarray, path: str | pathlib.Path, recipe: Mapping) -> None:
    """Writes one clip in the format that the name says, its recipe inside and beside it.

    The recipe's file is written last, so where it stands the clip is whole.

    Args:
      frames_thwc: float in [0, 1].
      path: where to; ends in .mp4, .webm or .gif.
      recipe: from `Output.recipes`.
    """
    path = pathlib.Path(path)
    kind = format_of(path)
    frames_u8 = np.round(np.clip(frames_thwc, 0, 1) * 255).astype(np.uint8)
    text = json.dumps(dict(recipe), sort_keys=True)
    if kind == "gif":
        video = gif.encode(frames_u8, recipe["fps"], text)
    else:
        encode = video_io.encode_mp4 if kind == "mp4" else video_io.encode_webm
        video = encode(frames_u8, recipe["fps"], metadata={"comment": text})
    sidecar_of(path).unlink(missing_ok=True)
    paths.write_atomically(path, video)
    sidecar = dict(recipe) | {"video_sha256": paths.sha256_file(path)}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    paths.write_atomically(sidecar_of(path), text)


def read(path: str | pathlib.Path) -> dict:
    """Reads the recipe that a video carries.

    Raises:
      ValueError: it is no video, or none of ours.
    """
    recipe = _parse(video_io.read_comment(path) or "")
    if recipe is None:
        raise ValueError(f"{path} was not made here: it carries no recipe")
    try:
        prompt_file.values_of(_given(recipe))
    except ValueError as error:
        raise ValueError(f"the recipe of {path} is damaged: {error}") from None
    return recipe


def _given(recipe: Mapping) -> dict:
    return {n: recipe[n] for n in ARGUMENTS if recipe.get(n) is not None}


def _parse(text: str) -> dict | None:
    """A recipe; None where the text is something else."""
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
      image: the picture that it is made from, where there is one.

    Raises:
      ValueError: it was made from a picture or from given latents, which it does not
        carry.
    """
    if recipe.get("image_sha256") and image is None:
        raise ValueError(
            "the video was made from a picture, which it does not carry: give --image"
        )
    if recipe.get("latents_sha256"):
        raise ValueError(
            "the video was made from given latents, which it does not carry"
        )
    return _given(recipe)


def check_weights(recipe: Mapping, source: Mapping) -> None:
    """Raises ValueError where a model has other weights than those of the recipe."""
    other = [name for name in WEIGHTS if recipe.get(name) != source.get(name)]
    if other:
        raise ValueError(
            f"the video was made by {recipe.get('model')!r} "
            f"({', '.join(f'{n} {recipe.get(n)}' for n in other)}), this model is "
            f"{source.get('model')!r} ({', '.join(f'{n} {source.get(n)}' for n in other)})"
        )


def found_beside(file: pathlib.Path) -> dict | None:
    """The recipe of a clip that was made before: beside it or inside, if any."""
    with contextlib.suppress(OSError, ValueError):
        if (found := _parse(sidecar_of(file).read_text())) is not None:
            return found
    with contextlib.suppress(OSError, ValueError):
        return read(file)
    return None


def is_finished(file: pathlib.Path, recipe: Mapping, overwrite: bool = False) -> bool:
    """Whether a clip was made before, in the same way; then it need not be made again.

    A clip that an interruption left half written is made again.

    Args:
      file: of the clip.
      recipe: how it is to be made now.
      overwrite: whether a file of that name that was made otherwise may be replaced.

    Raises:
      ValueError: there is such a file, and it may not be replaced.
    """
    there = [path for path in (file, sidecar_of(file)) if path.exists()]
    if not there:
        return False
    found, problem = found_beside(file), None
    if found is None:
        problem = "is there already, and was not made here"
    else:
        other = [
            f"{name} was {found.get(name)!r} and is {value!r}"
            for name, value in recipe.items()
            if name != "versions" and found.get(name) != value
        ]
        digest = found.get("video_sha256")
        if other:
            problem = f"is there already, made in another way ({'; '.join(other)})"
        elif file.exists() and digest and paths.sha256_file(file) != digest:
            problem = "was changed after it was made"
    if problem and not overwrite:
        raise ValueError(
            f"{there[0]} {problem}: choose another --out, remove it, or add --overwrite"
        )
    return not problem and len(there) == 2
