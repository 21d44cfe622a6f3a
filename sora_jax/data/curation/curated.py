"""Curated clips as a source of shards: what a policy keeps, with scores.

The clips of one or more folders of shards are scored part by part, in processes; a part is
a file of the input. Then all are decided on together, since a duplicate is known only
beside the other clips. `shards.write` copies what is kept. Beside the shards it leaves

    decisions.jsonl      a line for each clip of the input: kept or not, why, all scores
    fingerprints.jsonl   what copies were found by, for the next curation
    curation.json        the policy, and how many clips each rule refused

An interrupted run continues after the parts that are scored. Clips that were curated
before by the same stages keep their scores and are not decoded again.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sora_jax.core import digests, paths, progress
from sora_jax.data import records, shards, workers
from sora_jax.data.curation import decisions, fingerprint, policy, report, stages

DECISIONS = "decisions.jsonl"
FINGERPRINTS = "fingerprints.jsonl"
SUMMARY = "curation.json"
_SCORED, _DECIDED = "scored.jsonl", "decided.jsonl"  # of a part
_KEPT_PER_FILE = 256  # clips of a file of the output, at least, as far as there are

# (folder of the input, its first record, one past the last): a file of the input.
_Part = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class CuratedClips:
    """The clips of folders of shards that a policy keeps; see `shards.Source`.

    Args:
      folders: the shards, in the order of the output.
      policy: what is kept.
      out: the folder that is written; the scores are stored in it meanwhile.
      num_workers: processes that score; 0: this one.

    Raises:
      ShardsError: the folders have different splits, or share an id.
    """

    folders: tuple[shards.Shards, ...]
    policy: policy.Policy
    out: pathlib.Path
    num_workers: int = 0
    unit, admits, bounds = "clips", "", workers.Bounds()

    def __post_init__(self):
        splits = {str(one.folder): one.manifest["split"] for one in self.folders}
        if len({*splits.values()}) > 1:
            raise shards.ShardsError(f"the folders hold different splits: {splits}")
        ids: set[str] = set()
        for folder in self.folders:
            of_folder = {folder.entry(index)["id"] for index in range(len(folder))}
            if twice := sorted(ids & of_folder):
                raise shards.ShardsError(
                    f"{folder.folder} has a clip {twice[0]!r}, as a folder before it has"
                )
            ids |= of_folder

    @property
    def split(self) -> str:
        """The split of the input."""
        return self.folders[0].manifest["split"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the clips: the policy, and the input's files."""
        inputs = [
            " ".join(file["sha256"] for file in folder.manifest["files"])
            for folder in self.folders
        ]
        return {
            "source": "curation",
            "inputs": [paths.sha256_bytes(files.encode()) for files in inputs],
            "policy": self.policy.settings(),
        }

    @functools.cached_property
    def items(self) -> dict[str, str]:
        """What the clips were made of; the settings determine them."""
        return {
            _item(folder.entry(index)["id"]): ""
            for folder in self.folders
            for index in range(len(folder))
        }

    def plan(self, items: Collection[str]) -> tuple[list[Any], list[shards.Skipped]]:
        """Scores and decides; returns groups of parts, each enough for a file."""
        del items
        parts = self._parts()
        self._score(parts)
        clips = [clip for number in range(len(parts)) for clip in self._scored(number)]
        decided = decisions.decide(self.policy, clips)
        self._record(clips, decided)
        groups, group, kept, start = [], [], 0, 0
        for number, (folder, first, end) in enumerate(parts):
            chosen = decided[start : start + end - first]
            start += end - first
            lines = [
                {"kept": d.kept, "why": "; ".join(d.reasons.values())} for d in chosen
            ]
            _store(self._folder(number) / _DECIDED, lines)
            group.append([number, folder, first, end])
            kept += sum(one.kept for one in chosen)
            if kept >= _KEPT_PER_FILE or number + 1 == len(parts):
                groups.append(group)
                group, kept = [], 0
        return groups, []

    def expected(self, part: list) -> int:
        """Returns how many clips of the input a group of parts has."""
        return sum(end - first for _, _, first, end in part)

    def only(self, part: list) -> "CuratedClips":
        """Returns itself: what a part needs is in files."""
        del part
        return self

    def clips(
        self, part: list, note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord | shards.Skipped]:
        """Yields the kept clips of a group of parts with their scores, and the others."""
        del avoid  # nothing is decoded here
        for number, folder, first, end in part:
            decided = _load(self._folder(number) / _DECIDED)
            for index, clip, decision in zip(
                range(first, end), self._scored(number), decided, strict=True
            ):
                if decision["kept"]:
                    record = self.folders[folder][index]
                    scores = {**record.scores, **clip.scores}
                    yield dataclasses.replace(record, scores=scores)
                else:
                    yield shards.Skipped(clip.id, decision["why"], _item(clip.id))
                note(finished=1)

    def _folder(self, number: int) -> pathlib.Path:
        # Each part has its own list of digests, since several processes write them.
        return self.out / ".partial" / "curation" / f"{number:05d}"

    def _parts(self) -> list[_Part]:
        parts = []
        for number, folder in enumerate(self.folders):
            first = 0
            for file in folder.manifest["files"]:
                parts.append((number, first, first + file["count"]))
                first += file["count"]
        return parts

    def _score(self, parts: Sequence[_Part]) -> None:
        """Scores the parts that an earlier run has not."""
        missing = [
            number
            for number in range(len(parts))
            if not (self._folder(number) / _SCORED).exists()
        ]
        total = sum(end - first for _, first, end in parts)
        ahead = sum(parts[number][2] - parts[number][1] for number in missing)
        with progress.Progress(total, "curate", "clips", start=total - ahead) as bar:
            for _ in workers.run(
                functools.partial(_score_part, self, parts),
                missing,
                num_workers=self.num_workers,
                on_finished=bar.update,
            ):
                pass

    def _scored(self, number: int) -> list[decisions.Scored]:
        lines = _load(self._folder(number) / _SCORED)
        return [decisions.Scored.from_json(line) for line in lines]

    def _record(
        self,
        clips: Sequence[decisions.Scored],
        decided: Sequence[decisions.Decision],
    ) -> None:
        """Writes what a reader of the folder wants to know of all clips."""
        _store(
            self.out / DECISIONS,
            (
                {
                    "id": clip.id,
                    "kept": decision.kept,
                    "why": dict(decision.reasons),
                    "scores": dict(clip.scores),
                    "licence": clip.licence,
                    "source": clip.source,
                    "sha256": clip.sha256,
                    "hash": clip.print.hash if clip.print else "",
                }
                for clip, decision in zip(clips, decided, strict=True)
            ),
        )
        _store(
            self.out / FINGERPRINTS,
            (
                {"id": clip.id, "sha256": clip.sha256, **clip.print.to_json()}
                for clip in clips
                if clip.print
            ),
        )
        summary = report.summarise(self.policy, clips, decided)
        digests.store(self.out / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _item(id: str) -> str:
    return id.rpartition("#")[0]


def _store(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    digests.store(path, "".join(json.dumps(line) + "\n" for line in lines))


def _load(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in digests.read(path).splitlines()]


# -- in the processes -----------------------------------------------------------------


def _score_part(
    source: CuratedClips,
    parts: Sequence[_Part],
    number: int,
    note: workers.Note,
    avoid: Mapping[str, str],
) -> None:
    folder, first, end = parts[number]
    clips = []
    for index in range(first, end):
        clips.append(_score_clip(source, source.folders[folder], index, note, avoid))
        note(finished=1)
    _store(source._folder(number) / _SCORED, (clip.to_json() for clip in clips))


def _score_clip(
    source: CuratedClips,
    folder: shards.Shards,
    index: int,
    note: workers.Note,
    avoid: Mapping[str, str],
) -> decisions.Scored:
    entry = folder.entry(index)
    known = {"id": entry["id"], "sha256": entry["sha256"]}
    if entry["id"] in avoid:
        return decisions.Scored(**known, damage=avoid[entry["id"]])
    (record,) = folder.read([index])
    if isinstance(record, records.CorruptRecord):
        return decisions.Scored(**known, damage=record.reason)
    fields = ("licence", "source", "num_frames", "height", "width")
    fields += ("subject", "edit_of")
    known |= {name: getattr(record, name) for name in fields}
    names = source.policy.stages
    earlier = _earlier(folder, names).get((record.id, record.sha256))
    if earlier:
        scores = {name: record.scores[name] for name in stages.scores_of(names)}
        return decisions.Scored(**known, scores=scores, print=earlier)
    note(item=record.id)
    try:
        with workers.limited_memory():
            frames_thwc = record.frames()
    except records.CorruptRecord as error:
        return decisions.Scored(**known, damage=error.reason)
    scores = stages.run(names, frames_thwc, record.fps)
    return decisions.Scored(**known, scores=scores, print=fingerprint.of(frames_thwc))


def _earlier(
    folder: shards.Shards, names: Collection[str]
) -> Mapping[tuple[str, str], fingerprint.Fingerprint]:
    """The fingerprints of a folder that was curated by the same stages, by id and SHA-256.

    Its clips have the scores too.
    """
    settings = folder.manifest["settings"]
    made_by = settings.get("policy", {}) if settings["source"] == "curation" else {}
    versions = {name: stages.STAGES[name].VERSION for name in names}
    if made_by.get("fingerprint") != fingerprint.VERSION or not (
        versions.items() <= made_by["stages"].items()
    ):
        return {}
    return _fingerprints(folder.folder / FINGERPRINTS)


@functools.lru_cache(maxsize=4)
def _fingerprints(
    path: str | os.PathLike,
) -> Mapping[tuple[str, str], fingerprint.Fingerprint]:
    return {
        (line["id"], line["sha256"]): fingerprint.Fingerprint.from_json(line)
        for line in _load(pathlib.Path(path))
    }
