"""What an evaluation leaves behind: scores.json, clips.jsonl and report.html."""

import datetime
import json
import pathlib
from collections.abc import Sequence

import jax

from sora_jax.core import config as configs
from sora_jax.core import paths
from sora_jax.evals import protocol, report, samples, scoring, summary


def facts() -> dict[str, str]:
    """On what it was measured, and when."""
    return {
        "Device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "Measured": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def write(
    out: pathlib.Path,
    material: samples.Material,
    result: scoring.Result,
    manifest: protocol.Manifest,
    source: str,
    model: str | None,
    also: Sequence[str] = (),
) -> None:
    """Writes scores, verdicts and the report, and prints the tables.

    Args:
      out: the folder.
      material: prompts and clips.
      result: their scores.
      manifest: how they were measured.
      source: the folder that was measured.
      model: the same, where it is a run: its config and training curves are shown.
      also: more run folders whose curves are shown.
    """
    failures = [
        *material.failures,
        *(note for row in result.rows for note in row.notes),
    ]
    tables = summary.tables(result.rows, material.suites)
    scores = {
        "protocol": manifest.to_dict(),
        "digest": manifest.digest(),
        **summary.to_json(result.rows),
        "failures": failures,
    }
    paths.write_atomically(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    lines = summary.verdict_lines(result.rows, material.suites)
    paths.write_atomically(out / "clips.jsonl", "".join(map("{}\n".format, lines)))
    runs = [*([model] if model else []), *also]
    page = report.write(
        title=f"{pathlib.Path(source).resolve().name}: evaluation",
        facts=material.facts | facts(),
        figures=summary.figures(result.rows, material.seeds),
        entries=summary.entries(
            material.suites, result.videos, result.rows, manifest.fps
        ),
        tables=tables,
        charts=[chart for run in runs for chart in summary.charts(pathlib.Path(run))],
        failures=failures,
        config=configs.to_text(configs.read(model)) if model else "",
        protocol=manifest.to_dict() | {"digest": manifest.digest()},
    )
    paths.write_atomically(out / "report.html", page)
    print(summary.as_text(tables))
    print("".join(f"\nnot used: {sentence}" for sentence in failures))
    print(
        f"protocol {manifest.digest()[:16]}; {out / 'scores.json'}, {out / 'report.html'}"
    )
