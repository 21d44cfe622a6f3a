"""Videos of a few prompts at every evaluation of a training run, as contact sheets."""

import copy
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections

from sora_jax.evals import pixels
from sora_jax.generation import contact_sheet, pipeline, prompt_file
from sora_jax.models import lora
from sora_jax.training import adapters, checkpoint, trackers

FOLDER = "samples"  # of a run folder
_MOST = 32  # prompts


class SampleSheet:
    """Draws RUN/samples/STEP.png; an evaluator of a denoiser's training.

    The seeds are 0, 1, ..., the same at every step. Programs are compiled once.

    Args:
      config: of the run.
      folder: of the run; its video VAE, and where needed its text encoder, are there.
      prompts: of the videos.
      tracked: gets the videos as well.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        folder: pathlib.Path,
        prompts: Sequence[str],
        tracked: trackers.Tracker,
    ):
        self._config, self._folder, self._prompts = config, folder, [*prompts]
        self._tracked = tracked

    def run(self, params: dict, step: int) -> Iterator[tuple[str, float]]:
        """Draws the sheet; yields nothing."""
        config, adapted = self._config, adapters.config_of(self._config)
        if adapted.rank:
            config = copy.deepcopy(config)
            config.lora.rank = 0
            own = jax.tree.map(jnp.copy, params["dit"])  # merging uses them up
            merged = lora.merge(own, params[lora.PART]["dit"], adapted.scale)
            params = params | {"dit": merged}
        kept = {n: params[n] for n in ("dit", "text_encoder") if n in params}
        run = checkpoint.LoadedRun(config, kept, step, self._folder)
        pipe = pipeline.Pipeline.from_run(run)
        out = pipe(self._prompts, seed=[*range(len(self._prompts))])
        if jax.process_index() == 0:
            videos = pixels.to_uint8(out.frames)
            (self._folder / FOLDER).mkdir(exist_ok=True)
            file = self._folder / FOLDER / f"{step:08d}.png"
            contact_sheet.write(file, [*videos], self._prompts)
            named = dict(zip(self._prompts, videos, strict=True))
            self._tracked.videos(step, named, out.recipes[0]["fps"])
        yield from ()


def of_run(c, folder: pathlib.Path, tracked: trackers.Tracker) -> SampleSheet | None:
    """The evaluator of a denoiser's run; None without `data.sample_prompts`.

    Raises:
      FileNotFoundError, ValueError: the file of prompts is missing or wrong.
    """
    if not c.data.sample_prompts:
        return None
    rows = prompt_file.read(c.data.sample_prompts)
    if len(rows) > _MOST:
        raise ValueError(
            f"data.sample_prompts {c.data.sample_prompts} has {len(rows)} prompts; a "
            f"sheet shows up to {_MOST}"
        )
    return SampleSheet(c, folder, [row["prompt"] for row in rows], tracked)
