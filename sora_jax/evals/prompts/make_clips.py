"""Makes the clips that are scored: a model's samples, and baselines for its scores.

Ground truth shows what the oracle can read, its reconstruction by the video VAE what the
decoder lets through (the ceiling), untrained weights and shuffled prompts the chance
level, and the training clip with the nearest caption what memorizing would reach.

Letters: n clips, t frames, h height, w width, c channels.
"""

import collections
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sora_jax.data import records, shards
from sora_jax.evals import pixels, protocol
from sora_jax.evals.metrics import reconstruction, temporal
from sora_jax.evals.prompts import samples, toyworld
from sora_jax.generation import pipeline
from sora_jax.toyworld import families, render
from sora_jax.toyworld import scene as scenes
from sora_jax.training import trained_vae

Videos = dict[str, np.ndarray]  # suite -> uint8 [n, t, h, w, 3]
_BATCH = 32  # clips that the VAE takes at a time
UNTRAINED = 32  # prompts per suite for untrained weights: enough for the chance level


def clip_seed(seed: int, prompt: toyworld.Prompt) -> int:
    """Returns the seed of one clip, a function of the set's seed and the prompt."""
    return zlib.crc32(f"{seed}/{prompt.text}".encode())


def matching_scenes(
    suite: toyworld.Suite, *, tier: str, seed: int = 0
) -> list[scenes.Scene]:
    """Returns a test scene for each prompt, one that shows what the prompt states.

    Scenes are drawn without repetition from the test split (`test_comp` for held-out
    prompts), so they are distributed as the data set is for that text.

    Raises:
      ValueError: no scene of the tier shows what a prompt states.
    """
    split = "test_comp" if suite.held_out else "test"
    waiting = {n: facts(prompt.slots) for n, prompt in enumerate(suite.prompts)}
    result: dict[int, scenes.Scene] = {}
    for index in range(2_000 * (len(suite) + 100)):
        if not waiting:
            return [result[number] for number in range(len(suite))]
        scene = families.scene(tier, split, index, {suite.family: 1.0}, seed)
        truth = facts(scene.truth)
        number = next((n for n, stated in waiting.items() if stated <= truth), None)
        if number is not None:
            result[number] = scene
            del waiting[number]
    missing = suite.prompts[next(iter(waiting))]
    raise ValueError(
        f"no {tier} scene shows {len(waiting)} prompts of suite {suite.name}, such as "
        f"{missing.text!r}"
    )


def facts(slots: scenes.Slots) -> frozenset[tuple]:
    """Returns what is stated as a set; a scene shows a text if it has all its facts."""
    stated = {
        (number, field.name, getattr(subject, field.name))
        for number, subject in enumerate(slots.subjects)
        for field in dataclasses.fields(scenes.Subject)
    }
    stated |= {
        (field.name, getattr(slots, field.name))
        for field in dataclasses.fields(scenes.Slots)
        if field.name != "subjects"
    }
    return frozenset(fact for fact in stated if fact[-1] is not None)


def render_scenes(drawn: Mapping[str, Sequence[scenes.Scene]]) -> Videos:
    """Renders the scenes of each suite."""
    return {
        suite: np.stack([render.render(scene) for scene in members])
        for suite, members in drawn.items()
    }


def exact_motion(drawn: Sequence[scenes.Scene]) -> temporal.Motion:
    """Returns the exact optical flow of scenes."""
    flows, occluded = zip(*(render.flow(scene) for scene in drawn), strict=True)
    return temporal.Motion(np.stack(flows), ~np.stack(occluded))


def reconstruct(vae: trained_vae.LoadedVAE, videos: Videos) -> Videos:
    """Encodes and decodes clips: an upper bound for any denoiser."""
    round_trip = reconstruction.round_trip(vae.config, _BATCH)
    return {
        suite: pixels.to_uint8(round_trip(vae.params, video_nthwc)[0])
        for suite, video_nthwc in videos.items()
    }


def nearest_training_clips(
    suites: Sequence[toyworld.Suite], clips: shards.Shards
) -> Videos:
    """Returns for each prompt the training clip with the nearest caption."""
    known, owner = [], []
    for index in range(len(clips)):
        for text in records.captions_of(clips.captions(index), records.TIERS):
            known.append(text)
            owner.append(index)
    nearest = nearest_captions([text for s in suites for text in s.texts], known)
    chosen = iter(owner[number] for number in nearest)
    return {
        suite.name: np.stack([clips[next(chosen)].frames() for _ in suite.prompts])
        for suite in suites
    }


def sample(
    store: samples.Store,
    pipe: pipeline.Pipeline,
    row: str,
    suites: Sequence[toyworld.Suite],
    seed: int,
    *,
    saved: str | None,
    progress: Callable[[int], None],
    batch_size: int,
    **asked,
) -> Videos:
    """Samples a clip for each prompt, or reads suites that were sampled before.

    Args:
      store: keeps finished suites.
      pipe: the pipeline.
      row: name of the clips, such as "model, seed 0"; part of the stored files' names.
      suites: the prompts.
      seed: of the whole set.
      saved: id of the weights, so that clips of a run that was trained anew are not
        reused; None: not needed.
      progress: takes the number of clip steps that were computed.
      batch_size: clips per batch.
      **asked: the arguments of `samples.MAKING`; None: the model's own.
    """
    first = pipe.check_inputs(prompt=suites[0].texts[0], **asked) if suites else None
    calibration = first and pipe.recipe(first, 0).get("step_cache_digest")
    steps = asked["num_inference_steps"] or pipe.settings.num_inference_steps
    videos = {}
    for suite in suites:

        def make(suite=suite):
            seeds = [clip_seed(seed, prompt) for prompt in suite.prompts]
            output = pipe(
                suite.texts,
                seed=seeds,
                batch_size=batch_size,
                progress=progress,
                **asked,
            )
            return {suite.name: pixels.to_uint8(output.frames)}

        made_with = {
            "row": row,
            "seed": seed,
            "prompts": protocol.text_digest(suite.texts),
            "asked": asked,
            "settings": dataclasses.asdict(pipe.settings) | {"batch_size": None},
            "source": pipe.source,
            "saved": saved,
        }
        if calibration:
            made_with["step_cache"] = calibration
        name = f"{row}-{suite.name}".replace(" ", "-")
        clips, was_stored = store.get(name, made_with, make)
        videos |= clips
        if was_stored:
            progress(len(suite) * steps)
    return videos


def nearest_captions(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """Returns for each text the index of the most similar known text.

    By the cosine of tf-idf over words and bigrams; bigrams distinguish "red left of
    blue" from "blue left of red". The first of equally similar texts is taken.

    Raises:
      ValueError: there are no known texts.
    """
    if not known:
        raise ValueError("there are no captions to search")
    postings: dict[str, list[int]] = collections.defaultdict(list)
    for number, text in enumerate(known):
        for gram in _grams(text):
            postings[gram].append(number)
    indices = {gram: np.array(numbers) for gram, numbers in postings.items()}
    weights = {
        gram: math.log(1 + len(known) / len(numbers))
        for gram, numbers in postings.items()
    }
    length_n = np.zeros(len(known))
    for gram, numbers in indices.items():
        length_n[numbers] += weights[gram] ** 2
    length_n = np.sqrt(np.maximum(length_n, 1e-12))
    nearest = []
    for text in texts:
        score_n = np.zeros(len(known))
        for gram in _grams(text):
            if gram in indices:
                score_n[indices[gram]] += weights[gram] ** 2
        nearest.append(int(np.argmax(score_n / length_n)))
    return nearest


def _grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))}
