"""The kinds of clips that are scored, the model's and those that explain its scores.

A score is only a number beside others. The ground truth says what the oracle can read,
its reconstruction by the video VAE what the decoder lets through (the ceiling),
untrained weights and other clips' prompts what chance gives, and the training clip whose
caption is nearest what memory alone would give.

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
from sora_jax.evals import protocol
from sora_jax.evals.metrics import reconstruction, temporal
from sora_jax.evals.prompts import samples, toyworld
from sora_jax.generation import pipeline
from sora_jax.toyworld import families, render
from sora_jax.toyworld import scene as scenes
from sora_jax.training import trained_vae

Videos = dict[str, np.ndarray]  # suite -> uint8 [n, t, h, w, 3]
UNTRAINED = 32  # prompts of a suite that untrained weights get: chance needs no more


def clip_seed(seed: int, prompt: toyworld.Prompt) -> int:
    """The seed of one clip of a set: a pure function of the set's seed and the text."""
    return zlib.crc32(f"{seed}/{prompt.text}".encode())


def matching_scenes(
    suite: toyworld.Suite, *, tier: str, seed: int = 0
) -> list[scenes.Scene]:
    """For each prompt, a test scene of which it is true; no scene is taken twice.

    Scenes are drawn from the test split (`test_comp` for held-out prompts) until each
    prompt has one, so they are what the data set would show for that text.

    Raises:
      ValueError: a prompt is true of no scene of the tier.
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
        f"{len(waiting)} prompts of suite {suite.name} are true of no {tier} scene, "
        f"such as {missing.text!r}"
    )


def facts(slots: scenes.Slots) -> frozenset[tuple]:
    """All that is stated, as a set: a text is true of what has a superset of it."""
    found = {
        (number, field.name, getattr(subject, field.name))
        for number, subject in enumerate(slots.subjects)
        for field in dataclasses.fields(scenes.Subject)
    }
    found |= {
        (field.name, getattr(slots, field.name))
        for field in dataclasses.fields(scenes.Slots)
        if field.name != "subjects"
    }
    return frozenset(fact for fact in found if fact[-1] is not None)


def render_scenes(drawn: Mapping[str, Sequence[scenes.Scene]]) -> Videos:
    """Renders the scenes of each suite."""
    return {
        suite: np.stack([render.render(scene) for scene in members])
        for suite, members in drawn.items()
    }


def exact_motion(drawn: Sequence[scenes.Scene]) -> temporal.Motion:
    """The true optical flow of scenes."""
    flows, occluded = zip(*(render.flow(scene) for scene in drawn), strict=True)
    return temporal.Motion(np.stack(flows), ~np.stack(occluded))


def reconstruct(
    vae: trained_vae.LoadedVAE, videos: Videos, *, batch_size: int = 32
) -> Videos:
    """Encodes and decodes clips: what the best denoiser could show."""
    there_and_back = reconstruction.round_trip(vae.config, batch_size)
    return {
        suite: to_uint8(there_and_back(vae.params, video_nthwc)[0])
        for suite, video_nthwc in videos.items()
    }


def nearest_training_clips(
    suites: Sequence[toyworld.Suite], clips: shards.Shards
) -> Videos:
    """For each prompt the training clip one of whose captions is nearest to it."""
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
    """Makes a clip for each prompt, or finds the suites that were finished before.

    Args:
      store: where finished suites are kept.
      pipe: the generator.
      row: what the clips are, such as "seed 0"; part of the kept files' names.
      suites: the prompts.
      seed: seed of the whole set.
      saved: tells the weights from others of the same run and step, so that clips of
        a run that was trained anew are not taken for its own; None: nothing has to.
      progress: told how many clip steps have been done.
      batch_size: clips computed at a time.
      **asked: the arguments of `samples.MAKING`; what is None is the model's.
    """
    some = pipe.check_inputs(prompt=suites[0].texts[0], **asked) if suites else None
    calibration = some and pipe.recipe(some, 0).get("step_cache_digest")
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
            return {suite.name: to_uint8(output.frames)}

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
        found, finished_before = store.get(name, made_with, make)
        videos |= found
        if finished_before:
            progress(len(suite) * steps)
    return videos


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded.

    Raises:
      ValueError: values that are not finite.
    """
    if not np.isfinite(frames).all():
        raise ValueError("the frames hold NaN or infinity")
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def nearest_captions(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each text the index of the known text with the most in common.

    Words and pairs of neighbouring words are weighed by how rare they are among the
    known texts (cosine of tf-idf); pairs keep "red left of blue" apart from "blue left
    of red". The first of equals is taken.

    Raises:
      ValueError: there are no known texts.
    """
    if not known:
        raise ValueError("there are no captions to find a nearest one in")
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
