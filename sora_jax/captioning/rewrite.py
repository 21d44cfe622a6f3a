"""Shards with the captions of a journal beside those that they have."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sora_jax.captioning import captioner, checks, journal
from sora_jax.data import array_files, records, shards, workers

_CLIPS_PER_PART = 250


def check_new(clips: shards.Shards, tiers: Sequence[str]) -> None:
    """Refuses shards that have captions of these tiers, since none is overwritten.

    Raises:
      ShardsError: they do.
    """
    there = [tier for tier in tiers if clips.manifest["captions"].get(tier)]
    if there:
        raise array_files.ShardsError(
            f"{clips.folder} has captions of the tiers {', '.join(there)}, and none is "
            "overwritten: start from the shards without them"
        )


def open_questions(source: "Recaptioned", retries: int) -> dict[str, int]:
    """Returns how many clips are still to be asked about, by tier."""
    tiers = [*source.writer.prompts]
    left = dict.fromkeys(tiers, 0)
    for clip in map(source.clips_of.entry, range(source.count)):
        for tier in source.entries.open_tiers(
            clip["id"], clip["sha256"], tiers, retries
        ):
            left[tier] += 1
    return left


def source_of(writer: captioner.Captioner, tier: str) -> str:
    """Returns what `caption_sources` says of a tier: the model and its instruction."""
    return f"model:{writer.id} prompt:{writer.prompts[tier][:12]}"


@dataclasses.dataclass(frozen=True)
class Recaptioned:
    """The first `count` clips of shards, with their captions of a journal.

    A `shards.Source`; written by the process that made it.
    """

    clips_of: shards.Shards
    count: int
    writer: captioner.Captioner
    entries: journal.Journal | None = None
    unit, admits, bounds = "clips", "", workers.Bounds()

    @property
    def split(self) -> str:
        """That of the shards."""
        return self.clips_of.manifest["split"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine what is asked and what is kept."""
        return {
            "source": "recaption",
            "clips": self.clips_of.manifest["digest"],
            "num_clips": self.count,
            "model": self.writer.id,
            "prompts": dict(self.writer.prompts),
            "captioner": self.writer.digest,
            "checks": checks.VERSIONS[self.writer.is_assistant],
        }

    @property
    def items(self) -> dict[str, str]:
        """What the clips were made of, each with a hash of the captions that are new."""
        hashed = collections.defaultdict(hashlib.sha256)
        for index in range(self.count):
            item = _item(self.clips_of.entry(index)["id"])
            new = sorted(self._captions(index).items())
            hashed[item].update(f"{index} {new}\n".encode())
        return {item: digest.hexdigest() for item, digest in hashed.items()}

    def _captions(self, index: int) -> dict[str, str]:
        clip = self.clips_of.entry(index)
        found = {
            tier: self.entries.entry(clip["id"], clip["sha256"], tier).text
            for tier in self.writer.prompts
        }
        return {tier: text for tier, text in found.items() if text is not None}

    def plan(self, items: Collection[str]) -> tuple[list[list[int]], list]:
        """Returns ranges of indices."""
        del items
        starts = range(0, self.count, _CLIPS_PER_PART)
        return [
            [start, min(start + _CLIPS_PER_PART, self.count)] for start in starts
        ], []

    def expected(self, part: list[int]) -> int:
        """Returns how many clips a part has."""
        return part[1] - part[0]

    def only(self, part: list[int]) -> "Recaptioned":
        """Returns itself: it is written by the process that has its journal."""
        del part
        return self

    def clips(
        self, part: list[int], note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord | shards.Skipped]:
        """Yields the clips of a part; a damaged one is left out."""
        for index in range(*part):
            (clip,) = self.clips_of.read([index])
            if isinstance(clip, records.CorruptRecord):
                yield shards.Skipped(clip.id, str(clip), _item(clip.id))
            else:
                new = self._captions(index)
                sources = {tier: source_of(self.writer, tier) for tier in new}
                yield dataclasses.replace(
                    clip,
                    captions={**clip.captions, **new},
                    caption_sources={**clip.caption_sources, **sources},
                )
            note(finished=1)


def _item(clip_id: str) -> str:
    """The item that a clip belongs to; see `shards.Source`."""
    return clip_id.rpartition("#")[0]


@dataclasses.dataclass(frozen=True)
class Totals:
    """What became of the clips: clips = captioned + rejected + failed.

    Attributes:
      clips: all.
      captioned: with a caption in every tier.
      rejected: with answers in every tier, of which those of a tier are no captions.
      failed: without an answer in a tier.
      again: of those, the ones that may have an answer if they are asked again.
      kept: captions by tier.
      reasons: how often answers were not kept, and questions not answered, by reason.
      requests, input_tokens, output_tokens: that all took.
    """

    clips: int
    captioned: int
    rejected: int
    failed: int
    again: int
    kept: Mapping[str, int]
    reasons: Mapping[str, int]
    requests: int
    input_tokens: int
    output_tokens: int


def totals(
    clips: shards.Shards, count: int, tiers: Sequence[str], entries: journal.Journal
) -> Totals:
    """Counts what the journal says of the first `count` clips."""
    kinds, kept, reasons, sums = (collections.Counter() for _ in range(4))
    for clip in map(clips.entry, range(count)):
        found = [entries.entry(clip["id"], clip["sha256"], tier) for tier in tiers]
        kinds[_kind(found)] += 1
        kinds["again"] += any(_is_open(one) and not one.lasting for one in found)
        for one in found:
            kept[one.tier] += one.text is not None
            reasons.update(answer["reason"] for answer in one.rejected)
            reasons.update([one.failed] if one.failed else [])
            for name in ("requests", "input_tokens", "output_tokens"):
                sums[name] += getattr(one, name)
    return Totals(
        count,
        kinds["captioned"],
        kinds["rejected"],
        kinds["failed"],
        kinds["again"],
        dict(kept),
        dict(reasons),
        sums["requests"],
        sums["input_tokens"],
        sums["output_tokens"],
    )


def _is_open(entry: journal.Entry) -> bool:
    """Whether the last question, if there was one, has no answer."""
    return entry.text is None and (bool(entry.failed) or not entry.tries)


def _kind(found: Sequence[journal.Entry]) -> str:
    if any(map(_is_open, found)):
        return "failed"
    return "captioned" if all(one.text is not None for one in found) else "rejected"
