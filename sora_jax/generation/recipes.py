"""What a video was made of, inside the file and beside it, and back.

A recipe is a JSON object: prompt, negative prompt, seed, sizes, solver, and which
weights. It stands in the MP4's comment and in clip.json beside clip.mp4.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from sora_jax.core import paths
from sora_jax.data import video_io

# What names the weights; the rest is what a call was asked for.
WEIGHTS = ("config_digest", "step", "vae_digest", "text_encoder_digest", "weights")
ARGUMENTS = (
    "prompt", "negative_prompt", "seed", "num_frames", "height", "width", "fps",
    "num_inference_steps", "guidance_scale", "guidance_scale_2", "guidance_rescale",
    "shift", "sampler", "step_cache",
)  # fmt: skip


def save(frames_thwc: np.ndarray, path: str | pathlib.Path, recipe: Mapping) -> None:
    """Writes one clip as MP4, and its recipe inside and beside it (clip.mp4, .json).

    The recipe's file is written last, so where it stands the clip is whole.

    Args:
      frames_thwc: float in [0, 1].
      path: where to; ends in .mp4.
      recipe: from `Output.recipes`.
    """
    path = pathlib.Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"a clip is written as .mp4, not {path.name!r}")
    frames_u8 = np.round(np.clip(frames_thwc, 0, 1) * 255).astype(np.uint8)
    text = json.dumps(dict(recipe), sort_keys=True)
    video = video_io.encode_mp4(frames_u8, recipe["fps"], metadata={"comment": text})
    paths.write_atomically(path, video)
    sidecar = dict(recipe) | {"video_sha256": paths.sha256_file(path)}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    paths.write_atomically(path.with_suffix(".json"), text)


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


def is_finished(file: pathlib.Path, recipe: dict) -> bool:
    """Whether a clip was made before; refuses one that was made in another way."""
    sidecar = file.with_suffix(".json")
    if not (file.exists() and sidecar.exists()):
        return False
    # Clips of before there was a step cache say nothing of it.
    found = {"step_cache": 0.0} | json.loads(sidecar.read_text())
    other = [
        f"{name} was {found.get(name)!r} and is {value!r}"
        for name, value in recipe.items()
        if name != "versions" and found.get(name) != value
    ]
    if other:
        raise ValueError(
            f"{file} is there already, made in another way ({'; '.join(other)}): "
            "choose another --out, or remove it"
        )
    return True
