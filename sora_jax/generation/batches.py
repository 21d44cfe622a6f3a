"""Groups the clips of a list into calls, and leaves out those that exist.

A clip is a dict of the arguments of a call for one clip, and the "file" to write.
"""

import itertools
import pathlib
from collections.abc import Sequence

from sora_jax.core import job
from sora_jax.data import texts, video_io
from sora_jax.generation import pipeline, prompt_upsampler, recipes
from sora_jax.generation import request as requests


def shared(clip: dict) -> tuple:
    """What the clips of one call must have in common."""
    return tuple(clip.get(name) for name in requests.SHARED) + ("image" in clip,)


def arguments(clips: Sequence[dict], batch_size: int | None) -> dict:
    """The pipeline's arguments for clips that run together."""
    images = [video_io.read_image(clip["image"]) for clip in clips if "image" in clip]
    return {
        "prompt": [clip["prompt"] for clip in clips],
        "negative_prompt": [clip["negative_prompt"] for clip in clips],
        "seed": [clip["seed"] for clip in clips],
        "image": images or None,
        "batch_size": batch_size,
        **{name: clips[0].get(name) for name in requests.SHARED},
    }


def check_files(clips: Sequence[dict]) -> None:
    """Raises OSError, before any work, if the videos cannot be written.

    Those of a list are in one folder, so only the longest name is tried.
    """
    file = max((clip["file"] for clip in clips), key=lambda file: len(str(file)))
    job.check_writable(file, recipes.sidecar_of(file))


def draw_seeds(clips: Sequence[dict], resume: bool) -> None:
    """Draws the seeds of clips that ask for a random one.

    Args:
      clips: those of the list.
      resume: whether an existing clip keeps its seed.
    """
    for clip in clips:
        if clip["seed"] == requests.RANDOM:
            recipe = recipes.existing(clip["file"]) if resume else None
            clip["seed"] = requests.random_seed() if recipe is None else recipe["seed"]


def upsample(
    clips: Sequence[dict],
    upsampler: prompt_upsampler.Upsampler | None,
    resume: bool,
) -> None:
    """Rewrites the prompts of clips, in all processes alike.

    Args:
      clips: those of the list.
      upsampler: who rewrites them; None: nobody.
      resume: whether an existing clip keeps the prompt that its own was rewritten as.
    """
    if upsampler is None:
        return
    todo = []
    for clip in clips:
        recipe = recipes.existing(clip["file"]) if resume else None
        before = recipes.upsampled(recipe or {})
        if before and (before.original, before.upsampler) == (
            texts.normalise(clip["prompt"]),
            upsampler.id,
        ):
            clip["prompt"] = before
        else:
            todo.append(clip)
    prompts = [texts.normalise(clip["prompt"]) for clip in todo]
    made = prompt_upsampler.shared(upsampler, prompts, [clip["seed"] for clip in todo])
    for clip, prompt in zip(todo, made, strict=True):
        clip["prompt"] = prompt


def plan(
    pipe: pipeline.Pipeline,
    clips: Sequence[dict],
    *,
    batch_size: int | None,
    overwrite: bool,
) -> tuple[list[list[dict]], int, list[str]]:
    """Checks all clips, and groups those that are still to be made.

    Args:
      pipe: the model.
      clips: those of the list.
      batch_size: clips computed at a time; None: the model's.
      overwrite: see `recipes.is_finished`.

    Returns:
      The clips of each call, the number of solver steps of all, and notes for the user.
    """
    groups, steps, notes = [], 0, set()
    size = batch_size or pipe.settings.batch_size
    by_kind = sorted(clips, key=lambda clip: repr(shared(clip)))
    for _, alike in itertools.groupby(by_kind, key=shared):
        todo = []
        for clip in alike:
            file = pathlib.Path(clip["file"])
            try:
                request = pipe.check_inputs(**arguments([clip], batch_size))
                note = recipes.check_format(file, request.num_frames, request.fps)
            except ValueError as error:
                if len(clips) > 1:
                    raise ValueError(f"{file.name}: {error}") from None
                raise
            notes.add(note)
            if not recipes.is_finished(file, pipe.recipe(request, 0), overwrite):
                todo.append(clip)
                steps += request.num_inference_steps
        groups += [todo[i : i + size] for i in range(0, len(todo), size)]
    return groups, steps, sorted(notes - {""})
