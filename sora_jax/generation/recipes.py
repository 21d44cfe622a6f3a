"""What a video was made of, inside the file and beside it, and back.

A recipe is a JSON object: prompt, negative prompt, seed, sizes, solver, and which
weights. It stands in the file's comment and beside it: clip.json of clip.mp4, or
clip.webm.json and clip.gif.json.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from sora_jax.core import paths
from sora_jax.data import gif, video_io

FORMATS = ("mp4", "webm", "gif")

# What names the weights; the rest is what a call was asked for.
WEIGHTS = ("config_digest", "step", "vae_digest", "text_encoder_digest", "weights")
ARGUMENTS = (
    "prompt", "negative_prompt", "seed", "num_frames", "height", "width", "fps",
    "num_inference_steps", "guidance_scale", "guidance_scale_2", "guidance_rescale",
    "shift", "sampler", "step_cache",
)  # fmt: skip


def check_format(path: pathlib.Path, fps: float) -> str:
    """Says what a video file of that name cannot keep of a rate; "" where it keeps it.

    Raises:
      ValueError: it is no file of these formats, or cannot have that rate.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ValueError(f"a video's file ends in one of {endings}, not {path.name!r}")
    if path.suffix.lower() != ".gif":
        return ""
    if fps > gif.FASTEST:
        raise ValueError(
            f"fps is {fps:g}; a GIF shows at most {gif.FASTEST:g} frames a second: give "
            "a lower --fps, or write .mp4 or .webm"
        )
    if 100 % fps == 0:
        return ""
    low = int(100 // fps)
    return (
        f"a GIF counts hundredths of a second: at {fps:g} frames a second each is shown "
        f"for {low} or {low + 1} of them"
    )


def sidecar_of(path: pathlib.Path) -> pathlib.Path:
    """The file beside a video that holds its recipe."""
    is_mp4 = path.suffix.lower() == ".mp4"
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
    check_format(path, recipe["fps"])
    frames_u8 = np.round(np.clip(frames_thwc, 0, 1) * 255).astype(np.uint8)
    text = json.dumps(dict(recipe), sort_keys=True)
    if path.suffix.lower() == ".gif":
        video = gif.encode(frames_u8, recipe["fps"], text)
    else:
        is_mp4 = path.suffix.lower() == ".mp4"
        encode = video_io.encode_mp4 if is_mp4 else video_io.encode_webm
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
    comment = video_io.read_comment(path)
    try:
        recipe = json.loads(comment or "")
        missing = [name for name in ("prompt", "seed", "fps") if name not in recipe]
    except (ValueError, TypeError):
        missing = ["recipe"]
    if missing:
        raise ValueError(f"{path} was not made here: it carries no {missing[0]}")
    return recipe


def arguments(recipe: Mapping) -> dict:
    """The arguments of a call that makes the video again.

    Raises:
      ValueError: it was made of a picture or of given noise, which it does not carry.
    """
    for name in ("image_sha256", "latents_sha256"):
        if recipe.get(name):
            what = "a picture" if name.startswith("image") else "given latents"
            raise ValueError(f"the video was made from {what}, which it does not carry")
    return {n: recipe[n] for n in ARGUMENTS if recipe.get(n) is not None}


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
    try:
        found = json.loads(sidecar_of(file).read_text())
        if isinstance(found, dict) and "prompt" in found:
            return found
    except (OSError, ValueError):
        pass
    try:
        return read(file)
    except (OSError, ValueError):
        return None


def is_finished(file: pathlib.Path, recipe: Mapping, overwrite: bool = False) -> bool:
    """Whether a clip was made before, in the same way; then it need not be made again.

    What an interruption has left of it is made again.

    Args:
      file: of the clip.
      recipe: how it is to be made now.
      overwrite: whether another file of that name may be lost.

    Raises:
      ValueError: it may not.
    """
    there = [path for path in (file, sidecar_of(file)) if path.exists()]
    if not there:
        return False
    found, problem = found_beside(file), None
    if found is None:
        problem = "is there already, and was not made here"
    else:
        # Clips of before there were these say nothing of them.
        found = {"step_cache": 0.0, "guidance_rescale": 0.0} | found
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
