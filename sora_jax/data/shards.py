"""Clips in ArrayRecord files: written atomically, read by index, verified.

A finished folder of clips holds
    clips-<split>.array_record-00000    the records, one clip each
    dataset_info.json, features.json    so that TFDS reads the folder
    index/00000.jsonl                   captions, sizes and scores, without the videos
    items.json                          the items that clips were made of, see `Source`
    manifest.json                       settings, files, counts, digest
    report.json                         what was skipped, and why
and `tfds.builder_from_directory(folder).as_data_source()` returns the same clips. Neither
needs or imports TensorFlow.

Items that are added to a source later become additional files; existing files do not
change, so jobs that read them are not disturbed.

Reading checks ArrayRecord's own hash of every chunk and the SHA-256 of each clip.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import google.protobuf.message
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from sora_jax.core import digests, paths, progress
from sora_jax.data import array_files, beam, records, texts, workers
from sora_jax.data.array_files import ShardsError


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that did not become a clip.

    Attributes:
      file: its name, and which part of it, such as "a.mp4 from 3.00 s on".
      reason: why it was skipped.
      item: of the source that it is a part of, if any.
    """

    file: str
    reason: str
    item: str | None = None


@dataclasses.dataclass(frozen=True)
class Remark:
    """A note about the clips of a file, such as "interlaced, ..."."""

    file: str
    what: str
    frames: int


class Source(Protocol):
    """A source of clips; picklable and deterministic.

    Attributes:
      split: name of the split that is written.
      settings: JSON values that determine the clips of an item; a folder that was
        written with other settings is refused.
      items: what clips are made of, such as videos: a name, and a hash of all that the
        clips depend on. The clips of an item are called `<name>#<anything>`. A source
        that its settings determine completely has the single item "".
      admits: the limits on items, as one word; an item that gave no clip is tried again
        when they change.
      unit: plural name of what `expected` counts.
      bounds: what an item may use in its process; an item beyond it gives no clip.
    """

    split: str
    unit: str
    settings: Mapping[str, Any]
    items: Mapping[str, str]
    admits: str
    bounds: workers.Bounds

    def plan(self, items: Collection[str]) -> tuple[list[Any], list[Skipped]]:
        """Returns the parts (JSON values; each becomes a file of records) of these items,
        and what cannot be used."""

    def expected(self, part: Any) -> int:
        """Returns how many items a part has, each counted by one `note(finished=1)`."""

    def only(self, part: Any) -> "Source":
        """Returns a source that knows no more than it needs for the clips of a part."""

    def clips(
        self, part: Any, note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord | Skipped | Remark]:
        """Yields the clips of a part, what was skipped, and remarks."""


# -- clips ----------------------------------------------------------------------------


def _stored_tiers(used: Collection[str]) -> tuple[str, ...]:
    """Returns the tiers that have fields, given those with text.

    Tiers of models have them only where they are used, so that the bytes of other clips
    do not depend on them.
    """
    return tuple(
        tier
        for tier in records.TIERS
        if tier in used or tier not in records.MODEL_TIERS
    )


@functools.cache
def _features(tiers: tuple[str, ...], related: bool) -> tfds.features.FeaturesDict:
    text = tfds.features.Text
    more = {"relations_json": text(optional=True)} if related else {}
    by_tier = {tier: text(optional=tier in records.MODEL_TIERS) for tier in tiers}
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "video": tfds.features.Scalar(dtype=np.object_),
            "fps": np.float32,
            "num_frames": np.int32,
            "height": np.int32,
            "width": np.int32,
            "captions": by_tier,
            "caption_sources": by_tier,
            "shots": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
            "scores_json": text(),
            "licence": text(),
            "source": text(),
            "sha256": text(),
            "state_json": text(),
            **more,
        }
    )


def _to_example(clip: records.ClipRecord) -> bytes:
    tiers = _stored_tiers(clip.captions.keys() | clip.caption_sources.keys())
    example = {
        "id": clip.id,
        "video": clip.video,
        "fps": clip.fps,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "captions": {t: clip.captions.get(t, "") for t in tiers},
        "caption_sources": {t: clip.caption_sources.get(t, "") for t in tiers},
        "shots": np.asarray(clip.shots, np.int32).reshape(-1, 2),
        "scores_json": json.dumps(dict(clip.scores), sort_keys=True),
        "licence": clip.licence,
        "source": clip.source,
        "sha256": clip.sha256,
        "state_json": clip.state_json or "",
    }
    # Only where there are some, so that the bytes of other clips stay as they are.
    if found := records.relations(clip):
        example["relations_json"] = json.dumps(found, sort_keys=True)
    features = _features(tiers, bool(found))
    written = features.serialize_example(features.encode_example(example))
    # Fields in a fixed order, so that an interrupted job gives the same files.
    parsed = tf_example_pb2.Example.FromString(written)
    return parsed.SerializeToString(deterministic=True)


def _from_example(raw: bytes) -> records.ClipRecord:
    # Reads the protocol buffer itself, thirty times faster than TFDS's parser.
    fields = tf_example_pb2.Example.FromString(raw).features.feature

    def text(name: str) -> str:
        return fields[name].bytes_list.value[0].decode()

    def texts(name: str) -> dict[str, str]:
        tiers = (tier for tier in records.TIERS if f"{name}/{tier}" in fields)
        by_tier = {tier: text(f"{name}/{tier}") for tier in tiers}
        return {tier: value for tier, value in by_tier.items() if value}

    def integer(name: str) -> int:
        return fields[name].int64_list.value[0]

    found = {}
    if "relations_json" in fields:
        found = json.loads(text("relations_json"))
    shots = iter(fields["shots"].int64_list.value)
    return records.ClipRecord(
        id=text("id"),
        video=fields["video"].bytes_list.value[0],
        fps=fields["fps"].float_list.value[0],
        num_frames=integer("num_frames"),
        height=integer("height"),
        width=integer("width"),
        captions=texts("captions"),
        caption_sources=texts("caption_sources"),
        shots=tuple(zip(shots, shots, strict=True)),
        scores=json.loads(text("scores_json")),
        licence=text("licence"),
        source=text("source"),
        sha256=text("sha256"),
        state_json=text("state_json") or None,
        **found,
    )


def _clip_entry(clip: records.ClipRecord) -> dict[str, Any]:
    entry = {
        "id": clip.id,
        "sha256": clip.sha256,
        "fps": clip.fps,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "captions": dict(clip.captions),
    }
    scores = {"scores": dict(clip.scores)} if clip.scores else {}
    return entry | scores | records.relations(clip)


def _write_part(
    source: Source,
    out: str,
    plan_sha256: str,
    parts: Sequence[Any] | Mapping[int, Any],
    part: int,
    note: workers.Note,
    avoid: Mapping[str, str],
) -> None:
    """Writes the file of a part.

    A runner of Beam may go on when the job that started it is gone, so it is checked at
    the beginning and the end that the folder is still that of this plan.
    """
    folder = pathlib.Path(out)
    summary = {"skipped": [], "remarks": [], "cuts": {}}

    def clips():
        _check_plan(folder, plan_sha256)
        for clip in source.clips(parts[part], note, avoid):
            if not isinstance(clip, records.ClipRecord):
                kind = "skipped" if isinstance(clip, Skipped) else "remarks"
                summary[kind].append(dataclasses.asdict(clip))
                continue
            if len(clip.shots) > 1:
                summary["cuts"][clip.id] = [first for first, _ in clip.shots[1:]]
            yield _to_example(clip), _clip_entry(clip)
        _check_plan(folder, plan_sha256)

    array_files.store_part(folder, part, clips(), summary)


def _check_plan(out: pathlib.Path, sha256: str) -> None:
    file = _plan_file(out)
    if not file.exists() or paths.sha256_file(file) != sha256:
        raise ShardsError(f"{out} was finished or started anew by another job")


def _plan_file(out: pathlib.Path) -> pathlib.Path:
    return out / ".partial" / "plan.json"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the items of a source differ from those that a folder was made of.

    Attributes:
      new: items to make clips of: new ones, and those that gave no clip and have
        changed or are now within the limits.
      changed: items with clips that have changed; their old clips are kept.
      gone: items with clips that the source no longer has; their clips are kept.
    """

    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]


def compare(out_dir: str | os.PathLike, source: Source) -> Difference | None:
    """Compares a source with the items of a finished folder; None if it is not finished.

    Raises:
      ShardsError: the folder was made with other settings.
      digests.Damaged, FileNotFoundError: one of its files is damaged or missing.
    """
    out = pathlib.Path(out_dir)
    if not (out / "manifest.json").exists():
        return None
    array_files.claim(out, "manifest.json", _settings(source))
    done = json.loads(digests.read(out / "items.json"))
    different = {
        item
        for item, digest in source.items.items()
        if done.get(item) not in (digest, _without_clips(digest, source.admits))
    }
    with_clips = {item for item, digest in done.items() if " " not in digest}
    return Difference(
        tuple(sorted(different - with_clips)),
        tuple(sorted(different & with_clips)),
        tuple(sorted(with_clips - set(source.items))),
    )


def _without_clips(digest: str, admits: str) -> str:
    """The entry in items.json of an item that gave no clip; others have their digest."""
    return f"{digest} {admits}"


def write(
    out_dir: str | os.PathLike,
    source: Source,
    *,
    num_workers: int = 0,
    engine: beam.Engine | None = None,
) -> dict[str, Any]:
    """Writes all clips of a source as shards; resumes an interrupted run.

    Args:
      out_dir: a new folder, one that an interrupted run has left, or a finished one. New
        items of the source are added to a finished folder as further files, which take
        effect when all of them are complete.
      source: of the clips.
      num_workers: processes; 0: work in this one.
      engine: makes the parts instead of such processes.

    Returns:
      The manifest. `report.json` in the folder lists what was skipped, remarks on files,
      and the clips that contain a cut.

    Raises:
      ShardsError: the folder was made with other settings, an item changed since the
        interrupted run, or there is nothing usable.
      beam.BeamError: the engine has not made all parts.
    """
    out, manifest = pathlib.Path(out_dir), None
    if claim(out, source):
        manifest = array_files.read_manifest(out, "manifest.json", "shards")
    while (plan := _plan(out, source, manifest)) is not None:
        _write_parts(out, source, plan["parts"], num_workers, engine)
        manifest = _finish(out, source, plan, manifest)
    return manifest


def claim(out_dir: str | os.PathLike, source: Source) -> bool:
    """Claims a folder for a source before its clips are made; see `array_files.claim`."""
    out = pathlib.Path(out_dir)
    return array_files.claim(out, "manifest.json", _settings(source))


def has_begun(out_dir: str | os.PathLike) -> bool:
    """Returns whether a claimed folder has clips, or a plan of them."""
    names = "manifest.json", ".partial/plan.json"
    return any((pathlib.Path(out_dir) / name).exists() for name in names)


def _settings(source: Source) -> dict[str, Any]:
    return array_files.plain(
        {"format": array_files.FORMAT, "split": source.split, **source.settings}
    )


def _plan(out: pathlib.Path, source: Source, manifest: dict | None) -> dict | None:
    """The interrupted run's plan, or a new one; None if there is nothing to do."""
    file, base = _plan_file(out), manifest and manifest["digest"]
    known = source.items  # some sources compute it
    if file.exists():
        plan = json.loads(digests.read(file))
        if plan["base"] == base:
            for item, digest in plan["items"].items():
                if known.get(item) != digest:
                    raise ShardsError(
                        f"{item or 'the source'} changed since {out} was started: "
                        f"delete {out / '.partial'} to start its unfinished part again"
                    )
            return plan
    if manifest is not None:
        array_files.discard_parts(out)  # of a finished plan
    change = compare(out, source)
    items = known if change is None else change.new
    if change is not None and not items:
        return None
    parts, skipped = source.plan(tuple(items))
    plan = {
        "base": base,
        "admits": source.admits,
        "items": {item: known[item] for item in items},
        "parts": parts,
        "skipped": [dataclasses.asdict(s) for s in skipped],
    }
    digests.store(file, json.dumps(plan))
    return plan


def _finish(
    out: pathlib.Path, source: Source, plan: dict, before: dict | None
) -> dict[str, Any]:
    """Adds the parts of a plan to the folder, after its existing files."""
    existing, entries, done = [], [], {}
    report = {"skipped_in_items": [], "cuts": {}, "remarks": []}
    if before is not None:
        existing, old = before["files"], open(out)
        entries = [old.entry(index) for index in range(len(old))]
        done = json.loads(digests.read(out / "items.json"))
        report = json.loads(digests.read(out / "report.json"))
    files, summaries = array_files.collect(
        out, len(plan["parts"]), f"clips-{source.split}", after=len(existing)
    )
    files = [*existing, *files]
    entries += [entry for summary in summaries for entry in summary["index"]]
    overview = _overview(entries)
    # The plan lists unusable files each time; entries about items remain valid.
    cuts = report["cuts"]
    kept_items = source.items.keys() - plan["items"].keys()
    in_items = [s for s in report["skipped_in_items"] if s["item"] in kept_items]
    new_remarks = []
    for summary in summaries:
        in_items += summary["skipped"]
        new_remarks += summary["remarks"]
        cuts |= summary["cuts"]
    remarks = _by_what(report["remarks"], new_remarks)
    in_items = list({(s["file"], s["reason"]): s for s in in_items}.values())
    skipped = [*plan["skipped"], *in_items]
    report = {
        "clips": len(entries),
        "without_caption": overview["without_caption"],
        "cuts": cuts,
        "skipped": [{"file": s["file"], "reason": s["reason"]} for s in skipped],
        "skipped_in_items": in_items,
        "remarks": remarks,
    }
    digests.store(out / "report.json", json.dumps(report, indent=1))
    if not entries:
        array_files.discard_parts(out)
        reasons = "; ".join(f"{s['file']}: {s['reason']}" for s in skipped[:3])
        reasons = texts.escaped(reasons) or "no video files"
        raise ShardsError(f"nothing usable was found ({reasons})")
    related = any(entry.keys() & records.RELATIONS for entry in entries)
    _write_tfds_metadata(out, source.split, files, overview["captions"], related)
    made = {entry["id"].rpartition("#")[0] for entry in entries}
    silent = plan["items"].keys() - made - {s["item"] for s in in_items}
    assert not silent, f"neither clips nor a reason came of {sorted(silent)[:3]}"
    done |= {
        item: digest if item in made else _without_clips(digest, plan["admits"])
        for item, digest in plan["items"].items()
    }
    digests.store(out / "items.json", json.dumps(done))
    manifest = {
        "settings": _settings(source),
        "split": source.split,
        "num_clips": len(entries),
        "num_skipped": len(skipped),
        "with_cut": len(cuts),
        **overview,
        "digest": array_files.digest(entries),
        "files": files,
    }
    digests.store(out / "manifest.json", json.dumps(manifest, indent=1))
    array_files.discard_parts(out)
    return manifest


def _write_parts(
    out: pathlib.Path,
    source: Source,
    parts: list,
    num_workers: int,
    engine: beam.Engine | None,
) -> None:
    missing = [p for p in range(len(parts)) if not array_files.has_part(out, p)]
    total = sum(map(source.expected, parts))
    ahead = sum(source.expected(parts[part]) for part in missing)
    plan_sha256 = paths.sha256_file(_plan_file(out))
    with progress.Progress(total, "prepare", source.unit, start=total - ahead) as bar:
        if engine is not None:
            folder = str(out.absolute())
            engine.run(
                {
                    part: functools.partial(
                        _write_part,
                        source.only(parts[part]),
                        folder,
                        plan_sha256,
                        {part: parts[part]},
                    )
                    for part in missing
                },
                bounds=source.bounds,
                is_done=functools.partial(array_files.has_part, pathlib.Path(folder)),
                on_done=lambda part: bar.update(source.expected(parts[part])),
            )
            return
        task = functools.partial(_write_part, source, str(out), plan_sha256, parts)
        for _ in workers.run(
            task,
            missing,
            num_workers=num_workers,
            on_finished=bar.update,
            bounds=source.bounds,
        ):
            pass


def _by_what(before: list[dict[str, Any]], remarks: list[dict[str, Any]]) -> list[dict]:
    """Groups remarks by their text, merging the groups of earlier plans.

    Frames are counted by file, so that finishing an interrupted plan a second time does
    not count them twice.
    """
    old = {remark["what"]: remark["files"] for remark in before}
    new = collections.defaultdict(collections.Counter)
    for remark in remarks:
        new[remark["what"]][remark["file"]] += remark["frames"]
    return [
        {"what": what, "frames": sum(files.values()), "files": files}
        for what in sorted(old.keys() | new.keys())
        for files in [{**old.get(what, {}), **new[what]}]
    ]


def _write_tfds_metadata(
    out: pathlib.Path,
    split: str,
    files: list[dict],
    tiers: Collection[str],
    related: bool,
) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=out,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name="clips",
        split=split,
        filetype_suffix="array_record",
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[file["count"] for file in files],
        num_bytes=sum(file["bytes"] for file in files),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=_features(_stored_tiers(tiers), related),
        split_infos=[info],
        filename_template=template,
        check_data=False,
    )


def _overview(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the number of captions by tier, and the sizes of the clips.

    `shapes` counts clips by (frames, height, width) where these differ.
    """
    overview: dict[str, Any] = {
        "captions": array_files.count_captions(entries),
        "without_caption": sum(not entry["captions"] for entry in entries),
    }
    for field in ("num_frames", "height", "width", "fps"):
        values = sorted({entry[field] for entry in entries})
        overview[field] = values[0] if len(values) == 1 else values
    shapes = collections.Counter(map(records.shape_of, entries))
    if len(shapes) > 1:
        overview["shapes"] = [[*shape, shapes[shape]] for shape in sorted(shapes)]
    return overview


class Shards(array_files.Records):
    """A finished folder of clips; `[i]` gives a verified `records.ClipRecord`."""

    def __reduce__(self):
        return open, (self.folder,)

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> records.ClipRecord:
        try:
            clip = _from_example(raw)
        except google.protobuf.message.DecodeError as error:
            raise ValueError(f"it does not parse: {error}") from None
        if (clip.id, clip.sha256) != (entry["id"], entry["sha256"]):
            raise ValueError(f"it is clip {clip.id!r}, not the one in the index")
        return records.verify(clip)


def open(folder: str | os.PathLike) -> Shards:
    """Opens a finished folder of clips.

    Raises:
      ShardsError: it is not finished, or a file is missing.
    """
    folder = pathlib.Path(folder)
    return Shards(folder, array_files.read_manifest(folder, "manifest.json", "shards"))
