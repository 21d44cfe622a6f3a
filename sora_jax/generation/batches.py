"""Groups the clips of a list into calls, and leaves out those that exist.

A clip is a dict of the arguments of a call for one clip, and the "file" to write.
"""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Sequence

import jax

from sora_jax.core import job
from sora_jax.data import texts, video_io
from sora_jax.generation import pipeline, prompt_upsampler, recipes
from sora_jax.generation import request as requests

_UPSAMPLED_AT_ONCE = 32  # prompts, whose texts are lost together


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
    upsampler: prompt_upsampler.Upsampler,
    kept: pathlib.Path | None,
) -> None:
    """Rewrites the prompts of clips, in all processes alike.

    Args:
      clips: those of the list.
      upsampler: who rewrites them.
      kept: file of what was rewritten, by prompt, upsampler and seed, so that nothing is
        asked for twice; None: none.
    """
    before = {}
    for line in texts.lines(kept) if kept and kept.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):  # the last one may be cut off
            original, by, seed, text = json.loads(line)
            before[original, by, seed] = text

    def key(clip: dict) -> tuple[str, str, int]:
        return texts.normalise(clip["prompt"]), upsampler.id, clip["seed"]

    todo = [clip for clip in clips if key(clip) not in before]
    for part in itertools.batched(todo, _UPSAMPLED_AT_ONCE):
        keys = [key(clip) for clip in part]
        made = prompt_upsampler.shared(
            upsampler, [k[0] for k in keys], [k[2] for k in keys]
        )
        before |= {k: prompt.text for k, prompt in zip(keys, made, strict=True)}
        if kept and jax.process_index() == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with open(kept, "a") as file:
                file.writelines(json.dumps([*k, before[k]]) + "\n" for k in keys)
    for clip in clips:
        original, by, _ = key(clip)
        clip["prompt"] = requests.Upsampled(before[key(clip)], original, by)


def rewritten(clips: Sequence[dict]) -> list[str]:
    """Says how the prompts of clips were rewritten."""
    prompts = [clip["prompt"] for clip in clips]
    changed = [p for p in prompts if p.text != p.original]
    lines = [f"{prompt.original} -> {prompt.text}" for prompt in changed]
    if len(changed) < len(prompts):
        kept = [p.text for p in prompts if p.text == p.original]
        lines.append(f"prompts that stay as they are: {'; '.join(kept)}")
    return lines


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
