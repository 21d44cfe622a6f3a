"""The files of an evaluation: scores.json, clips.jsonl and report.html."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.core import config as configs
from sora_jax.core import digests, paths
from sora_jax.data import shards
from sora_jax.evals import protocol
from sora_jax.evals.features import networks
from sora_jax.evals.html import page
from sora_jax.evals.prompts import samples, scoring, summary
from sora_jax.training import trained_vae


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs whose config and training curves a report shows.

    Attributes:
      source: the evaluated folder.
      is_run: whether it is a run folder.
      also: further run folders.
    """

    source: pathlib.Path
    is_run: bool
    also: Sequence[pathlib.Path] = ()

    @property
    def name(self) -> str:
        return self.source.resolve().name

    @property
    def folders(self) -> list[pathlib.Path]:
        return [*([self.source] if self.is_run else []), *self.also]

    @property
    def config(self) -> str:
        """The resolved text of the run's config."""
        return configs.to_text(configs.read(self.source)) if self.is_run else ""

    def charts(self) -> list[page.Chart]:
        """The training curves of all runs."""
        return [chart for run in self.folders for chart in summary.training_charts(run)]

    def differences(self) -> page.Differences | None:
        """The differences between the configs; None if there is only one.

        Raises:
          FileNotFoundError: a folder is not a run folder.
        """
        read = {str(run): configs.read(run) for run in self.folders}
        if len(read) < 2:
            return None
        return page.Differences([*read], configs.differing(read))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
      material: prompts and clips.
      result: their scores.
      manifest: how they were measured.
      runs: the runs whose config and training curves are shown.
    """

    material: samples.Material
    result: scoring.Result
    manifest: protocol.Manifest
    runs: Runs

    @property
    def failures(self) -> list[str]:
        """A sentence for each thing that could not be used."""
        notes = (note for row in self.result.rows for note in row.notes)
        return [*self.material.failures, *notes]

    def write(self, out: pathlib.Path, more: Mapping[str, Any] | None = None) -> str:
        """Writes verdicts, the report and, last, the scores; returns the tables as text.

        Args:
          out: the output folder.
          more: further fields of scores.json.
        """
        material, result, digest = self.material, self.result, self.manifest.digest()
        tables = summary.tables(result.rows, material.suites)
        lines = summary.verdict_lines(result.rows, material.suites)
        digests.store(out / "clips.jsonl", "".join(map("{}\n".format, lines)))
        html = page.render(
            title=f"{self.runs.name}: evaluation",
            facts=material.facts | page.facts(),
            figures=summary.figures(result.rows, material.seeds),
            entries=summary.entries(
                material.suites, result.videos, result.rows, self.manifest.fps
            ),
            tables=tables,
            charts=self.runs.charts(),
            failures=self.failures,
            config=self.runs.config,
            differences=self.runs.differences(),
            protocol=self.manifest.to_dict() | {"digest": digest},
        )
        paths.write_atomically(out / "report.html", html)
        scores = {
            "protocol": self.manifest.to_dict(),
            "digest": digest,
            **summary.to_json(result.rows),
            "failures": self.failures,
            **(more or {}),
        }
        digests.store(out / "scores.json", json.dumps(scores, indent=1) + "\n")
        return page.as_text(tables)


class Scorer:
    """Scores clips of one list of prompts; their references are made once.

    Args:
      clips: the training set.
      tier: the toy world's tier.
      network: features for FVD-toy.
      runs: the runs of the report.
    """

    def __init__(
        self,
        clips: shards.Shards,
        tier: str,
        network: networks.ToyFeatures,
        runs: Runs,
    ):
        self.runs, self.fps = runs, clips.manifest["fps"]
        self._clips, self._tier, self._network = clips, tier, network
        self._reference: scoring.Reference | None = None

    def made_with(self) -> dict[str, str]:
        """What the scores depend on besides the clips: the network and the training set."""
        digest = self._clips.manifest["digest"]
        return {"features": self._network.sha256, "shards": digest}

    def score(self, material: samples.Material) -> Evaluation:
        """Scores the clips."""
        if self._reference is None:
            vae = trained_vae.load(self.runs.source) if self.runs.is_run else None
            self._reference = scoring.make_reference(
                material, self._clips, self._tier, self._network, vae
            )
        result = scoring.score(material, self._reference, self._network)
        manifest = scoring.manifest(material, result, self._network, self.fps)
        return Evaluation(material, result, manifest, self.runs)
