"""Clips on disk: finished parts of an evaluation, and folders of samples.

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
    """The clips to score, and how they were sampled.

    Attributes:
      suites: the prompts.
      videos: row -> suite -> clips (None: missing). The rows "model..." have all
        prompts, "untrained weights" the first ones.
      making: the values of `MAKING`, for the protocol; None where unknown.
      facts: for the head of the report.
      codec: of the files from which the clips were read.
      seeds: of the model's rows.
      failures: one sentence for each clip or file that could not be used.
    """

    suites: list[toyworld.Suite]
    videos: Mapping[str, Mapping[str, Sequence[np.ndarray | None]]]
    making: Mapping[str, Any]
    facts: Mapping[str, Any]
    codec: str = "none"
    seeds: tuple[int, ...] = ()
    failures: tuple[str, ...] = ()


class Store:
    """Stores finished parts of an evaluation, so that it can be resumed.

    A part is reused only if everything that decides its content is unchanged.

    Args:
      folder: of the files.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def get(
        self, name: str, made_with: Mapping[str, Any], make: Callable[[], Parts]
    ) -> tuple[Parts, bool]:
        """Returns the part of that name, and whether it was stored before.

        Args:
          name: file name of the part.
          made_with: JSON values that decide its content.
          make: returns it: suite -> clips.
        """
        if (stored := self.find(name, made_with)) is not None:
            return stored, True
        parts = {suite: np.ascontiguousarray(clips) for suite, clips in make().items()}
        metadata = {"made_with": protocol.digest(made_with)}
        content = safetensors.numpy.save(parts, metadata=metadata)
        if jax.process_index() == 0:
            digests.store(self._file(name), content)
        return parts, False

    def find(self, name: str, made_with: Mapping[str, Any]) -> Parts | None:
        """Returns the stored part; None if it is missing, outdated or damaged."""
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
        return None  # damaged


@dataclasses.dataclass(frozen=True)
class Sample:
    """A clip of a folder: its prompt, recipe and frames.

    `video_thwc` is None if the file could not be used.
    """

    file: str
    prompt: str
    recipe: Mapping[str, Any]
    video_thwc: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of samples.

    Attributes:
      samples: every clip with a prompt, in order of file names.
      failures: one sentence for each file that could not be used.
    """

    samples: tuple[Sample, ...]
    failures: tuple[str, ...]


def read_folder(folder: pathlib.Path) -> Folder:
    """Reads the MP4 files of a folder with the recipes beside them.

    `clip.mp4` needs `clip.json` with a "prompt", as `sora_jax.generate` writes it. A
    clip that cannot be decoded, or whose shape differs from the most common one, is
    listed without frames and counts as wrong.

    Raises:
      FileNotFoundError: there is no such folder, or no clip with a recipe in it.
    """
    files = sorted(folder.glob("*.mp4"))
    samples, failures = [], []
    for file in files:
        try:
            recipe = json.loads(file.with_suffix(".json").read_text())
            prompt = recipe["prompt"]
            prompt = recipe.get("original_prompt", prompt)
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
    common = max(set(shapes), key=shapes.count)
    for number, sample in enumerate(samples):
        if sample.video_thwc is not None and sample.video_thwc.shape != common:
            failures.append(
                f"{sample.file}: frames, height and width are {sample.video_thwc.shape[:3]}"
                f" but {common[:3]} in most clips; it counts as wrong"
            )
            samples[number] = dataclasses.replace(sample, video_thwc=None)
    return Folder(tuple(samples), tuple(failures))


def read_material(folder: pathlib.Path) -> Material:
    """Reads the clips of a folder and groups them by what their prompts state.

    Raises:
      FileNotFoundError, ValueError: no clip can be scored.
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
        # Older recipes, without this field, used no step cache.
        absent = 0.0 if name == "step_cache" else None
        values = [sample.recipe.get(name, absent) for sample in chosen]
        making[name] = values[0] if values.count(values[0]) == len(values) else None
    rewriters = {sample.recipe.get("upsampler") for sample in chosen} - {None}
    if rewriters:  # clips of rewritten prompts are no rivals of those of plain ones
        making["upsampler"] = ", ".join(sorted(map(str, rewriters)))
    facts = {"Samples": folder, "Clips": len(found.samples)}
    return Material(
        suites, {"model": videos}, making, facts, codec="h264", failures=tuple(failures)
    )
