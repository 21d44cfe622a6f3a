"""Which clips of a list run in one call, and which are still to be made.

A clip is a dict of a call's arguments for one clip, and "file", where it is written.
"""

import itertools
import pathlib
from collections.abc import Sequence

from sora_jax.core import job
from sora_jax.data import video_io
from sora_jax.generation import pipeline, recipes
from sora_jax.generation import request as requests


def shared(clip: dict) -> tuple:
    """What a clip must have in common with its neighbours to run in one call."""
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
    """Raises OSError where the videos cannot be written; found before the hours of work.

    Those of a list are in one folder: the longest name stands for all.
    """
    file = max((clip["file"] for clip in clips), key=lambda file: len(str(file)))
    job.check_writable(file, recipes.sidecar_of(file))


def settle_seeds(clips: Sequence[dict], resume: bool) -> None:
    """Gives a seed to each clip that wants a random one.

    Args:
      clips: what is wanted.
      resume: whether a clip that was made before keeps the seed that it has.
    """
    for clip in clips:
        if clip["seed"] == requests.RANDOM:
            found = recipes.found_beside(clip["file"]) if resume else None
            clip["seed"] = requests.random_seed() if found is None else found["seed"]


def plan(
    pipe: pipeline.Pipeline,
    clips: Sequence[dict],
    *,
    batch_size: int | None,
    overwrite: bool,
) -> tuple[list[list[dict]], int, list[str]]:
    """Batches of clips that are still to be made, their solver steps in all, and notes.

    Everything is checked here, before anything is computed.

    Args:
      pipe: the model.
      clips: what is wanted.
      batch_size: clips that are computed at a time; None: the model's.
      overwrite: see `recipes.is_finished`.
    """
    found, steps, notes = [], 0, set()
    size = batch_size or pipe.settings.batch_size
    by_kind = sorted(clips, key=lambda clip: repr(shared(clip)))
    for _, group in itertools.groupby(by_kind, key=shared):
        todo = []
        for clip in group:
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
        found += [todo[i : i + size] for i in range(0, len(todo), size)]
    return found, steps, sorted(notes - {""})
