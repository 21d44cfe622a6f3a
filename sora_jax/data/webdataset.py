"""WebDataset: clips in tar archives, read and written.

An archive holds the files of a clip under one key, which is a file's name up to the first
dot behind its folder: `000/17.mp4`, `000/17.txt`, `000/17.json`. The text is a caption;
the JSON object has captions, licence, source and scores, as beside a video of a folder
(`folders`), or as cosmos-curate writes it. That project keeps the videos and the JSON in
two archives, `video/part_000000/000000.tar` and `metas/part_000000/000000.tar`, which are
read together.

Names of members are never used as paths: videos are read where they lie in the archive.
"""

import collections
import dataclasses
import io
import json
import os
import pathlib
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sora_jax.core import digests, paths, progress
from sora_jax.data import folders, records, shards, texts, video_io

SUFFIX = ".tar"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"(\xb5": "zstd"}
_BLOCK = 512  # bytes
# cosmos-curate's folders of archives of one and the same clips.
_VIDEOS, _METAS, _STATES = "video", "metas", "t5_xxl"


@dataclasses.dataclass(frozen=True)
class _Member:
    """A file in an archive; `name` is the archive's and its own."""

    name: str
    place: video_io.Region


# -- reading --------------------------------------------------------------------------


class _Reader:
    """Reads archives; collects the listing of their videos."""

    def __init__(self, encoding: str | None):
        self._encoding = encoding
        self.videos: dict[str, int] = {}
        self.places: dict[str, video_io.Region] = {}
        self.texts: dict[str, folders.Text] = {}
        self.written: dict[str, folders.Written] = {}
        self.ids: dict[str, str] = {}  # videos by the ids of the clips that they were
        self.skipped: list[shards.Skipped] = []
        self.counts = collections.Counter()

    def skip(self, where: str, reason: object, members: int = 0) -> None:
        """Notes what is not used; `members` of it have no other use."""
        self.skipped.append(shards.Skipped(where, str(reason)))
        self.counts["others"] += members

    def samples(self, path: pathlib.Path, name: str) -> dict[str, dict[str, _Member]]:
        """Returns the members of an archive by key and suffix."""
        samples: dict[str, dict[str, _Member]] = collections.defaultdict(dict)
        try:
            for member in _members(path, name):
                if isinstance(member, shards.Skipped):
                    self.skip(member.file, member.reason, 1)
                    continue
                key, suffix = _key(member.name.removeprefix(f"{name}/"))
                if not key:
                    self.skip(member.name, "its name has no key in front of a dot", 1)
                elif suffix in samples[key]:
                    reason = "its key has a member of this kind already, which is used"
                    self.skip(member.name, reason, 1)
                else:
                    samples[key][suffix] = member
        except (ValueError, OSError, RecursionError) as error:
            self.skip(name, error)
        return samples

    def add(self, key: str, members: dict[str, _Member]) -> None:
        """Adds the videos of a sample, with its captions."""
        unused = dict(members)
        videos = [s for s in members if f".{s.rpartition('.')[2]}" in video_io.SUFFIXES]
        for suffix in videos:
            video = unused.pop(suffix)
            self.videos[video.name] = video.place.size
            self.places[video.name] = video.place
            self.counts["videos"] += 1
            # Two videos of a key, `a.left.mp4` and `a.right.mp4`, may have a text each.
            stem = suffix.rpartition(".")[0]
            read = []
            for kind in ("json", "txt"):
                names = [f"{stem}.{kind}", kind] if stem else [kind]
                if found := [name for name in names if name in members]:
                    if unused.pop(found[0], None):
                        self.counts["captions"] += 1
                    read += self._read(members[found[0]], video.name)
            text = self.texts[video.name] = _merged(read)
            if not text.captions:
                self.skip(video.name, "it has no caption, and its clips have none")
        for suffix, member in unused.items():
            kind = suffix.rpartition(".")[2]
            reason = "it is neither a video nor captions (.txt, .json)"
            if kind in ("txt", "json"):
                reason = "there is no video of its key"
            self.skip(member.name, reason, 1)

    def _read(self, member: _Member, video: str) -> list[folders.Text]:
        """Returns the text of a member for a video, or notes its fault."""
        place = member.place
        try:
            if place.size > folders.CAPTION_BYTES:
                raise ValueError(f"it is larger than {folders.CAPTION_BYTES} bytes")
            content = texts.decode(place.read(), self._encoding)
            if member.name.lower().endswith(".txt"):
                return [folders.text_of({"caption": content})]
            fields = _of_cosmos(json.loads(content))
            text = folders.text_of(fields, needs_caption=False)
            if written := _written(fields):
                self.written[video] = written
            if isinstance(name := fields.get("id"), str):
                self.ids[posixpath.normpath(name)] = video
            return [text]
        except texts.BadLine as error:
            self.skip(f"{member.name}:{error.line}", error.reason)
        except (OSError, ValueError, RecursionError) as error:
            self.skip(member.name, error)
        return []


def _merged(read: list[folders.Text]) -> folders.Text:
    """Merges the texts of a video; a caption that has a tier already is not added."""
    rows, known = folders.Rows(), set()
    for text in read:
        said = records.captions_of(text.captions, records.TIERS)
        if not said or set(said) - known:
            rows.add(text)
        known.update(said)
    return rows.text()


def _key(name: str) -> tuple[str, str]:
    """Splits a member's name into key and suffix; the key is "" where it has none."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else ("", "")


def _members(path: pathlib.Path, name: str) -> Iterator[_Member | shards.Skipped]:
    """Yields the files of an archive, and members that cannot be read.

    Raises:
      ValueError: it is compressed, or damaged from some member on.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4)
        for mark, kind in _COMPRESSED.items():
            if head.startswith(mark):
                raise ValueError(
                    f"it is compressed with {kind}: unpack it to a plain .tar, since "
                    "videos are read where they lie in it"
                )
        file.seek(0)
        try:
            opened = tarfile.open(fileobj=file, mode="r:")
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise ValueError(f"it is not a tar archive: {error}") from None
        with opened as archive:
            count = 0
            while True:
                try:
                    member = archive.next()
                except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                    raise ValueError(
                        f"it is damaged behind member {count}, and what follows is not "
                        f"read: {error}"
                    ) from None
                if member is None:
                    break
                archive.members.clear()  # or all of them would be kept
                count += 1
                if not member.isdir():
                    yield _checked(member, name, str(path), size)
            # `next` takes a header that it cannot read for the end.
            file.seek(archive.offset)
            end = file.read(_BLOCK)
            if end.strip(b"\0"):
                raise ValueError(
                    f"it is damaged behind member {count}, and what follows is not read"
                )


def _checked(
    member: tarfile.TarInfo, archive: str, path: str, size: int
) -> _Member | shards.Skipped:
    inner = posixpath.normpath(member.name)
    name = f"{archive}/{os.fsencode(inner).decode('utf-8', 'backslashreplace')}"
    reason = ""
    if name != f"{archive}/{inner}":
        reason = "its name is not UTF-8, so it is not read"
    elif not member.isreg() or member.issparse():
        reason = "it is not a regular file"
    elif member.size < 0 or member.offset_data + member.size > size:
        reason = "the archive ends before it does"
    if reason:
        return shards.Skipped(name, reason)
    return _Member(name, video_io.Region(path, member.offset_data, member.size))


def _of_cosmos(fields: Any) -> Any:
    """Turns the captions of cosmos-curate's JSON into our fields.

    Raises:
      ValueError: they belong to different frames of the clip.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("windows"), list):
        return fields
    windows = [one for one in fields["windows"] if isinstance(one, dict)]
    if len(windows) > 1:
        raise ValueError(
            f"it has the captions of {len(windows)} windows of frames: write clips of "
            "one window each"
        )
    end = "_caption"
    said = {
        name.removesuffix(end): text
        for window in windows
        for name, text in window.items()
        if name.endswith(end) and text
    }
    if not said:
        return fields
    writers = ", ".join(f"model:{name}" for name in said)
    return {**fields, "dense": [*said.values()], "caption_source": writers}


def _written(fields: Mapping[str, Any]) -> folders.Written | None:
    """Reads what `write` stores of a clip; None if it is not all there."""
    kinds = {"sha256": str, "fps": (int, float), "num_frames": int, "height": int}
    kinds["width"] = int
    if not all(isinstance(fields.get(name), kind) for name, kind in kinds.items()):
        return None
    state = json.dumps(fields["state"]) if fields.get("state") else None
    period = fields.get("period")
    return folders.Written(
        **{name: fields[name] for name in kinds},
        period=period if isinstance(period, int) else 0,
        state_json=state,
    )


def _partner(name: str, ours: str, theirs: str) -> str | None:
    """The archive of the same clips in cosmos-curate's other folder."""
    parts = list(pathlib.PurePosixPath(name).parts)
    if ours not in parts[:-1]:
        return None
    parts[parts.index(ours)] = theirs
    return posixpath.join(*parts)


def scan(
    folder: pathlib.Path, archives: Collection[str], encoding: str | None = None
) -> folders.Listing:
    """Lists the videos of tar archives, and reads their captions.

    A video is named by its archive and its member: `train/000.tar/17.mp4`.

    Args:
      folder: of the archives.
      archives: names relative to the folder.
      encoding: of captions that are not UTF-8; see `texts.read_text`.
    """
    reader, there = _Reader(encoding), set(archives)
    for name in archives:
        if _partner(name, _METAS, _VIDEOS) in there:
            continue  # is read with its videos
        if _partner(name, _STATES, _VIDEOS) in there:
            reader.skip(name, "it holds text states in pickles, which are not read")
            continue
        samples = reader.samples(folder / name, name)
        metas = _partner(name, _VIDEOS, _METAS)
        if metas in there:
            for key, members in reader.samples(folder / metas, metas).items():
                samples[key] = {**members, **samples.get(key, {})}
        for key, members in samples.items():
            reader.add(key, members)
    counts = {kind: reader.counts[kind] for kind in ("videos", "captions", "others")}
    texts_by_video = {  # `write` names clips by their ids, which are others here
        video: dataclasses.replace(
            text, edit_of=reader.ids.get(text.edit_of, text.edit_of)
        )
        for video, text in reader.texts.items()
    }
    return folders.Listing(
        reader.videos,
        {},
        None,
        texts_by_video,
        tuple(reader.skipped),
        counts,
        counted="members",
        places=reader.places,
        written=reader.written,
    )


# -- writing --------------------------------------------------------------------------

# The tiers in the order in which their first caption is the text of a clip.
_BEST = ("dense", "medium", "short", "alt", "structured")
_MANIFEST = "archives.json"


def write(
    out_dir: str | os.PathLike, source: shards.Shards, archive_bytes: int
) -> dict[str, Any]:
    """Writes all clips of shards into tar archives; resumes an interrupted run.

    Archives are called `00000.tar` and so on, and equal shards give equal bytes. A clip
    is `000000017.mp4`, `.txt` with its best caption if it has one, and `.json` with all
    else of its record.

    Args:
      out_dir: a new folder, or one that this function has written to.
      source: the shards.
      archive_bytes: of an archive, after which the next one begins.

    Returns:
      The manifest: `archives`, with the first clip, the number of clips and the SHA-256
      of each, and `damaged`, the records that could not be read.

    Raises:
      ValueError: the folder holds something else.
    """
    out = pathlib.Path(out_dir)
    made_of = {"shards": source.manifest["digest"], "archive_bytes": archive_bytes}
    manifest = {**made_of, "num_clips": len(source), "archives": [], "damaged": []}
    if (out / _MANIFEST).exists():
        manifest = json.loads(digests.read(out / _MANIFEST))
        if any(manifest.get(name) != value for name, value in made_of.items()):
            raise ValueError(
                f"{out} was written from other shards or in another size: choose "
                "another folder"
            )
    elif out.exists() and {p.name for p in out.iterdir()} - {paths.LOCK}:
        raise ValueError(f"{out} is not empty: choose another folder")
    else:
        digests.store(out / _MANIFEST, json.dumps(manifest, indent=1))
    done = manifest["archives"]
    start = done[-1]["end"] if done else 0
    with progress.Progress(len(source), "convert", "clips", start=start) as bar:
        while start < len(source):
            name = f"{len(done):05d}{SUFFIX}"
            with paths.replacing(out / name) as temporary:
                end, damaged = _write_archive(
                    temporary, source, start, archive_bytes, bar
                )
                sha256 = paths.sha256_file(temporary)
            done.append({"file": name, "start": start, "end": end, "sha256": sha256})
            manifest["damaged"] += damaged
            digests.store(out / _MANIFEST, json.dumps(manifest, indent=1))
            start = end
    return manifest


def _write_archive(
    path: pathlib.Path, source: shards.Shards, start: int, archive_bytes: int, bar
) -> tuple[int, list[str]]:
    """Writes clips until the archive is large enough; returns the next, and damage."""
    damaged = []
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, len(source)):
                try:
                    members = _members_of(source[index])
                except records.CorruptRecord as error:
                    damaged.append(str(error))
                    members = {}
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                bar.update(1)
                if tar.offset >= archive_bytes:
                    break
        file.flush()
        os.fsync(file.fileno())
    return index + 1, damaged


def _members_of(clip: records.ClipRecord) -> Mapping[str, bytes]:
    """The files of a clip by suffix."""
    best = [clip.captions[tier] for tier in _BEST if clip.captions.get(tier)]
    state = {"state": json.loads(clip.state_json)} if clip.state_json else {}
    fields = {
        "id": clip.id,
        "captions": {t: records.variants(text) for t, text in clip.captions.items()},
        "caption_sources": dict(clip.caption_sources),
        "fps": clip.fps,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "shots": clip.shots,
        "scores": dict(clip.scores),
        "licence": clip.licence,
        "source": clip.source,
        "sha256": clip.sha256,
        **records.relations(clip),
        **state,
    }
    text = json.dumps(fields, ensure_ascii=False, indent=1, sort_keys=True)
    members = {"mp4": clip.video}
    if best:
        members["txt"] = records.variants(best[0])[0].encode()
    return members | {"json": text.encode()}
