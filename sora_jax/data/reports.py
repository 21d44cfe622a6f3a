"""The messages that `prepare` prints about a folder of clips.

Names of files are printed so that they cannot change what else the terminal shows.
"""

import collections
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from sora_jax.core import digests
from sora_jax.data import folders, shards, texts, video_clips

_LISTED = 20
_FEW = 6  # rates that are printed one by one
_LENGTH = 160  # characters of a name that is printed


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
    lines = [
        f"skipped {name(one['file'])}: {texts.escaped(one['reason'])}"
        for one in skipped[:_LISTED]
    ]
    if (more := len(skipped) - _LISTED) > 0:
        lines.append(f"skipped {more} more; all are listed in {out / 'report.json'}:")
        lines += kinds([(one["file"], one["reason"]) for one in skipped])
    if any(re.search("the limit of|memory", one["reason"]) for one in skipped):
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
    one = [manifest[name] for name in ("num_frames", "height", "width", "num_clips")]
    several = any(isinstance(number, list) for number in one)
    # Older shards of several sizes did not count them.
    counted = manifest.get("shapes", [] if several else [one])
    counts = {tuple(s): count for *s, count in counted}
    what = of_shapes(counts) if counts else "several sizes"
    lines.append(
        f"{out}: {manifest['num_clips']} clips of {what}, "
        f"{_rates(manifest['fps'])} fps; captions: "
        f"{captions or 'none'}; {len(skipped)} skipped; {seconds:.1f} s"
    )
    return lines + shapes(counts)


def of_shapes(counts: Mapping[tuple[int, int, int], int]) -> str:
    """Says which (frames, height, width) clips have, or how many different ones."""
    if len(counts) != 1:
        return f"{len(counts)} shapes"
    ((num_frames, height, width),) = counts
    return f"{num_frames} frames, {width} wide, {height} high"


def shapes(counts: Mapping[tuple[int, int, int], int]) -> list[str]:
    """Counts clips by (frames, height, width), the most common first, if they differ."""
    if len(counts) < 2:
        return []
    most = sorted(counts, key=lambda shape: (-counts[shape], shape))
    lines = [
        f"{counts[shape]:6d}: {of_shapes({shape: counts[shape]})}"
        for shape in most[:_LISTED]
    ]
    if left := sum(counts[shape] for shape in most[_LISTED:]):
        lines.append(f"{left:6d}: {len(most) - _LISTED} other shapes")
    return lines


def accounts(out: pathlib.Path, source: video_clips.FolderClips) -> list[str]:
    """Says how many files a folder has of each kind, and what its videos came to.

    Each file counts once, and each video either gave clips or has a reason in the report.
    """
    done = json.loads(digests.read(out / "items.json"))
    reasons = json.loads(digests.read(out / "report.json"))["skipped_in_items"]
    used = {item for item in source.items if " " not in done[item]}
    refused = source.items.keys() - used
    assert refused <= {one["item"] for one in reasons}
    return [
        f"{source.folder}: {census(source.listing)}",
        f"{len(source.items)} videos: {len(used)} gave clips, {len(refused)} none",
    ]


def census(listing: folders.Listing) -> str:
    """Says how many files, members or rows there are of each kind of `listing.counts`."""
    kinds = ", ".join(
        f"{count} others" if kind == "others" else f"{count} of {kind}"
        for kind, count in listing.counts.items()
    )
    return f"{sum(listing.counts.values())} {listing.counted}: {kinds}"


def kinds(faults: Collection[tuple[str, str]]) -> list[str]:
    """Counts (file, reason) by reason, whatever its numbers are, the most common first."""
    groups = collections.defaultdict(list)
    for file, reason in faults:
        groups[re.sub(r"\d+", "#", reason)].append((file, reason))
    most = sorted(groups.values(), key=lambda group: (-len(group), group[0]))
    lines = [
        f"{len(group):6d}: {texts.escaped(group[0][1])} (such as {name(group[0][0])})"
        for group in most[:_LISTED]
    ]
    if left := sum(map(len, most[_LISTED:])):
        lines.append(f"{left:6d}: {len(most) - _LISTED} other reasons")
    return lines


def name(file: str) -> str:
    """The name of a file as it is printed: visible, and not too long."""
    shown = texts.escaped(file)
    if len(shown) > _LENGTH:
        shown = f"{shown[: _LENGTH // 2]}...{shown[-_LENGTH // 2 :]}"
    return shown


def _rates(fps: float | list[float]) -> str:
    """One rate, or those of clips that have several."""
    if isinstance(fps, float | int):
        return f"{fps:g}"
    if len(fps) > _FEW:
        return f"{len(fps)} rates from {min(fps):g} to {max(fps):g}"
    return f"{[*map(float, fps)]}"


def _some(names: Collection[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(map(name, itertools.islice(names, 3)))}{more})"
