"""The messages that `prepare` prints about a folder of clips."""

import itertools
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from sora_jax.core import digests
from sora_jax.data import shards

_LISTED = 20


def difference(out: pathlib.Path, source: shards.Source) -> list[str]:
    """Says what will be added to a finished folder, and what will not."""
    if not (change := shards.compare(out, source)):
        return []
    kinds = {
        "new, and are added": change.new,
        "changed, and keep their old clips": change.changed,
        "gone, and keep their clips": change.gone,
    }
    return [
        f"{out}: {source.unit} that are {what}: {_some(items)}"
        for what, items in kinds.items()
        if items
    ]


def summary(out: pathlib.Path, manifest: Mapping[str, Any], seconds: float) -> list:
    """Says what a finished folder holds and what was skipped."""
    report = json.loads(digests.read(out / "report.json"))
    skipped, cuts = report["skipped"], report["cuts"]
    lines = [f"skipped {one['file']}: {one['reason']}" for one in skipped[:_LISTED]]
    if (more := len(skipped) - _LISTED) > 0:
        lines.append(f"skipped {more} more; all are listed in {out / 'report.json'}")
    if any("the limit of" in one["reason"] for one in skipped):
        lines.append(
            "--max_gib, --max_seconds, --max_side and --max_minutes set limits, see --help"
        )
    if any("save it as UTF-8" in one["reason"] for one in skipped):
        lines.append(
            "--caption_encoding names the encoding of captions, such as cp1252"
        )
    for done in report["remarks"]:
        videos = f"{(n := len(done['files']))} video{'s' * (n != 1)}"
        lines.append(f"{videos} {done['what']}: {done['frames']} frames")
    if manifest["without_caption"]:
        lines.append(f"{manifest['without_caption']} clips have no caption")
    if cuts:
        where = [f"{clip} at frame {frames[0]}" for clip, frames in cuts.items()]
        lines.append(f"clips that seem to contain a cut: {_some(where)}")
    captions = ", ".join(f"{n} {tier}" for tier, n in manifest["captions"].items())
    lines.append(
        f"{out}: {manifest['num_clips']} clips of {manifest['num_frames']} frames, "
        f"{manifest['width']} wide, {manifest['height']} high, "
        f"{manifest['fps']:g} fps; captions: "
        f"{captions or 'none'}; {len(skipped)} skipped; {seconds:.1f} s"
    )
    return lines


def _some(names: Collection[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(itertools.islice(names, 3))}{more})"
