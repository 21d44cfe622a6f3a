"""Clips on disk: the finished parts of an evaluation, and folders of samples.

Letters: n clips, t frames, h height, w width, c channels.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from sora_jax.core import digests
from sora_jax.data import video_io
from sora_jax.evals import protocol
from sora_jax.evals.prompts import toyworld

MAKING = ("sampler", "num_inference_steps", "guidance_scale", "shift", "step_cache")
Parts = dict[str, np.ndarray]  # suite -> uint8 [n, t, h, w, 3]


@dataclasses.dataclass(frozen=True)
class Material:
    """What is to be scored, and how it was made.

    Attributes:
      suites: the prompts.
      videos: row -> suite -> clips (None: missing). The rows "model..." have all
        prompts, "untrained weights" the first ones.
      making: the values of `MAKING`, for the protocol; None where not known.
      facts: for the head of the report.
      codec: what lies between the generator and the score.
      seeds: the seeds of the model's rows.
      failures: one sentence for each thing that could not be used.
    """

    suites: list[toyworld.Suite]
    videos: Mapping[str, Mapping[str, Sequence[np.ndarray | None]]]
    making: Mapping[str, Any]
    facts: Mapping[str, Any]
    codec: str = "none"
    seeds: tuple[int, ...] = ()
    failures: tuple[str, ...] = ()


class Store:
    """Keeps what takes long to make, so that an interrupted evaluation goes on.

    A part is reused only where everything that made it is as it was.

    Args:
      folder: where the parts are kept.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def get(
        self, name: str, made_with: Mapping[str, Any], make: Callable[[], Parts]
    ) -> tuple[Parts, bool]:
        """Returns the part of that name, and whether it was finished before.

        Args:
          name: file name of the part.
          made_with: JSON values that decide its content.
          make: makes it: suite -> clips.
        """
        if (found := self.find(name, made_with)) is not None:
            return found, True
        parts = {suite: np.ascontiguousarray(clips) for suite, clips in make().items()}
        metadata = {"made_with": protocol.digest(made_with)}
        content = safetensors.numpy.save(parts, metadata=metadata)
        if jax.process_index() == 0:
            digests.store(self._file(name), content)
        return parts, False

    def find(self, name: str, made_with: Mapping[str, Any]) -> Parts | None:
        """Returns the part of that name.

        None where it is missing, made otherwise, or damaged: it is made anew then.
        """
        file = self._file(name)
        if not file.is_file() or _key_of(file) != protocol.digest(made_with):
            return None
        try:
            return safetensors.numpy.load(digests.read(file))
        except digests.Damaged:
            return None

    def _file(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.safetensors"


def _key_of(file: pathlib.Path) -> str | None:
    try:
        with safetensors.safe_open(file, "np") as opened:
            return (opened.metadata() or {}).get("made_with")
    except safetensors.SafetensorError:
        return None  # not ours, or damaged: it is made anew


@dataclasses.dataclass(frozen=True)
class Sample:
    """A clip of a folder: its prompt, how it was made, and its frames.

    `video_thwc` is None where the file could not be used.
    """

    file: str
    prompt: str
    recipe: Mapping[str, Any]
    video_thwc: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder of samples holds.

    Attributes:
      samples: every clip that has a prompt, in order of file names.
      failures: one sentence for each file that could not be used.
    """

    samples: tuple[Sample, ...]
    failures: tuple[str, ...]


def read_folder(folder: pathlib.Path) -> Folder:
    """Reads the MP4 files of a folder with the recipes beside them.

    `clip.mp4` needs `clip.json` with a "prompt", as `sora_jax.generate` writes it. A
    clip that cannot be decoded, or has another shape than most, stays in the list
    without frames: it counts as wrong.

    Raises:
      FileNotFoundError: there is no such folder, or no clip with a recipe in it.
    """
    files = sorted(folder.glob("*.mp4"))
    samples, failures = [], []
    for file in files:
        try:
            recipe = json.loads(file.with_suffix(".json").read_text())
            prompt = recipe["prompt"]
        except (OSError, ValueError, KeyError, TypeError):
            failures.append(
                f"{file.name}: no recipe with a prompt beside it "
                f"({file.with_suffix('.json').name}), so it is not scored"
            )
            continue
        try:
            video = video_io.decode(file).frames
        except video_io.UnreadableVideo as error:
            failures.append(f"{error}; it counts as wrong")
            video = None
        samples.append(Sample(file.name, str(prompt), recipe, video))
    if not samples:
        raise FileNotFoundError(
            f"{folder} holds no .mp4 with a .json recipe beside it"
            + (f" ({len(failures)} files could not be used)" if failures else "")
        )
    shapes = [s.video_thwc.shape for s in samples if s.video_thwc is not None]
    if not shapes:
        raise FileNotFoundError(f"no .mp4 in {folder} can be decoded: {failures[0]}")
    usual = max(set(shapes), key=shapes.count)
    for number, sample in enumerate(samples):
        if sample.video_thwc is not None and sample.video_thwc.shape != usual:
            failures.append(
                f"{sample.file}: {sample.video_thwc.shape[:3]} frames, height and width "
                f"where most clips have {usual[:3]}; it counts as wrong"
            )
            samples[number] = dataclasses.replace(sample, video_thwc=None)
    return Folder(tuple(samples), tuple(failures))


def read_material(folder: pathlib.Path) -> Material:
    """Reads the clips of a folder and sorts them by what their prompts state.

    Raises:
      FileNotFoundError, ValueError: there is nothing that can be scored.
    """
    found = read_folder(folder)
    suites, order, unmeasured = toyworld.suites_of_texts(
        [sample.prompt for sample in found.samples]
    )
    failures = list(found.failures)
    for index in unmeasured:
        sample = found.samples[index]
        failures.append(
            f"{sample.file}: {sample.prompt!r} states nothing that can be measured"
        )
    if not suites:
        raise ValueError(f"no prompt in {folder} states anything that can be measured")
    chosen = [found.samples[index] for index in order]
    remaining = iter(chosen)
    videos = {
        suite.name: [next(remaining).video_thwc for _ in suite.prompts]
        for suite in suites
    }
    making = {}
    for name in MAKING:
        # Clips of before there was a step cache say nothing of it.
        absent = 0.0 if name == "step_cache" else None
        values = [sample.recipe.get(name, absent) for sample in chosen]
        making[name] = values[0] if values.count(values[0]) == len(values) else None
    facts = {"Samples": folder, "Clips": len(found.samples)}
    return Material(
        suites, {"model": videos}, making, facts, codec="h264", failures=tuple(failures)
    )
