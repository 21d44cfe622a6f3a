"""Decides which clips are kept: a pure function of a policy and of what is known of them.

The rules, in this order, with every one that speaks against a clip recorded:

    damaged     the clip cannot be read
    licence     its licence is not allowed
    consent     no entry of the list of consent names it
    opt_out     an entry of the list names it, or it is a copy of a clip that is named
    limits.S    its score S is out of range
    duplicates  it is a copy of a better clip that no other rule speaks against

Of copies the largest stays (in pixels), then the sharpest, then the first by id. Windows of
one video, `<video>#<number>`, are not copies of one another.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.data.curation import duplicates, fingerprint, lists, policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What is known of a clip when it is decided on.

    Attributes:
      id, sha256, licence, source, num_frames, height, width: as in the record.
      subject, edit_of: as in the record; see `_groups`.
      scores: by the stages.
      print: its fingerprint; None for a damaged clip.
      damage: why it cannot be read, or "".
    """

    id: str
    sha256: str
    licence: str = ""
    source: str = ""
    num_frames: int = 0
    height: int = 0
    width: int = 0
    subject: str = ""
    edit_of: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    print: fingerprint.Fingerprint | None = None
    damage: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` inverts it."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return fields | {"print": self.print and self.print.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Scored":
        """The clip that `to_json` gave."""
        seen = fields["print"]
        seen = seen and fingerprint.Fingerprint.from_json(seen)
        return cls(**{**fields, "print": seen})


@dataclasses.dataclass(frozen=True)
class Decision:
    """On one clip.

    Attributes:
      kept: whether it is written.
      reasons: what speaks against it, by rule; with `filter = false` it is kept all the
        same, unless it is damaged.
    """

    kept: bool
    reasons: Mapping[str, str]


def decide(policy_: policy.Policy, clips: Sequence[Scored]) -> list[Decision]:
    """Returns the decision on each clip."""
    reasons: list[dict[str, str]] = [{} for _ in clips]
    for clip, of in zip(clips, reasons, strict=True):
        if clip.damage:
            of["damaged"] = clip.damage
    _refuse_by_lists(policy_, clips, reasons)
    for clip, of in zip(clips, reasons, strict=True):
        for score, limit in policy_.limits.items() if not clip.damage else ():
            value = clip.scores[score]
            if value < limit.min:
                of[f"limits.{score}"] = f"{score} is {value:g}, below {limit.min:g}"
            elif value > limit.max:
                of[f"limits.{score}"] = f"{score} is {value:g}, above {limit.max:g}"
    if policy_.duplicates is not None:
        left = [index for index, of in enumerate(reasons) if not of]
        for index, best in _copies(clips, left, policy_.duplicates).items():
            reasons[index]["duplicates"] = f"it is a copy of {clips[best].id}"
    return [
        Decision(not of or (not policy_.filter and "damaged" not in of), of)
        for of in reasons
    ]


def _refuse_by_lists(policy_, clips: Sequence[Scored], reasons: list[dict]) -> None:
    if policy_.licences is not None:
        for clip, of in zip(clips, reasons, strict=True):
            if clip.licence.lower() not in policy_.licences:
                what = f"licence {clip.licence!r}" if clip.licence else "no licence"
                of["licence"] = f"it has {what}, which is not allowed"
    known = (
        [clip.source for clip in clips],
        [clip.sha256 for clip in clips],
        [clip.print.hash if clip.print else "" for clip in clips],
    )
    if policy_.consent is not None:
        found = policy_.consent.matches(*known)
        for of, entries in zip(reasons, found, strict=True):
            if not entries:
                of["consent"] = "no entry of the list of consent names it"
    if policy_.opt_out.entries:
        found = policy_.opt_out.matches(*known)
        for of, entries in zip(reasons, found, strict=True):
            if entries:
                of["opt_out"] = f"{entries[0]} is in the list"
        _refuse_copies(clips, found, reasons)


def _refuse_copies(clips, found: list[list[str]], reasons: list[dict]) -> None:
    """Extends an opt-out to the copies of the clips that it names."""
    seen = [index for index, clip in enumerate(clips) if clip.print]
    named = [index for index in seen if found[index]]
    others = [index for index in seen if not found[index]]
    originals = duplicates.originals(
        [clips[index].print for index in others],
        [clips[index].print for index in named],
    )
    for index, original in zip(others, originals, strict=True):
        if original is not None:
            what = f"it is a copy of {clips[named[original]].id}, which is in the list"
            reasons[index]["opt_out"] = what


def _copies(
    clips: Sequence[Scored], left: Sequence[int], distance: float
) -> dict[int, int]:
    """Returns copy -> the clip that stays, among those left."""

    def rank(index: int) -> tuple:
        clip = clips[index]
        pixels = math.prod((clip.num_frames, clip.height, clip.width))
        return -pixels, -clip.scores.get("sharpness", 0.0), clip.id

    order = sorted(left, key=rank)
    prints = [clips[index].print for index in order]
    found = duplicates.find(prints, distance, _groups([clips[i] for i in order]))
    return {
        order[place]: order[best]
        for place, best in enumerate(found)
        if best is not None
    }


def _groups(clips: Sequence[Scored]) -> list[str]:
    """Which clips are no copies of one another, however alike they look: a name each.

    Those of one video, of one subject, and of an edit, and all that these join.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for clip in clips:
        video, subject = clip.id.rpartition("#")[0], clip.subject
        for other in (
            video and f"video {video}",
            subject and f"subject {subject}",
            clip.edit_of and f"clip {clip.edit_of}",
        ):
            if other:
                parent[root(f"clip {clip.id}")] = root(other)
    return [root(f"clip {clip.id}") for clip in clips]


def unused(entries: lists.Entries, clips: Sequence[Scored]) -> list[str]:
    """Returns the entries of a list that name no clip, as a wrong address would."""
    found = entries.matches(
        [clip.source for clip in clips],
        [clip.sha256 for clip in clips],
        [clip.print.hash if clip.print else "" for clip in clips],
    )
    named = {lists.key(entry) for of in found for entry in of}
    return [entry for entry in entries.entries if lists.key(entry) not in named]
