"""The clip record: one encoded clip with its captions, its origin and its checksum.

Letters: t time, h height, w width, c channel.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.data import video_io

# Captions that a model has written from the clip's frames; see `sora_jax.recaption`.
MODEL_TIERS = ("model_short", "model_dense")
# From the noisy text that a clip comes with to captions written for it.
TIERS = ("alt", "short", "medium", "dense", "structured", *MODEL_TIERS)


class CorruptRecord(ValueError):
    """A stored record differs from what was written; names the file and the record.

    Attributes:
      where: the shard file.
      id: the id of the record.
      reason: what is wrong with it.
    """

    def __init__(self, where: str, id: str, reason: str):
        super().__init__(where, id, reason)
        self.where, self.id, self.reason = where, id, reason

    def __str__(self) -> str:
        return f"{self.where}: record {self.id!r} is corrupt: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One clip as stored in a shard.

    Attributes:
      id: unique in the data set.
      video: an encoded video file (H.264 in MP4; lossless for the toy world).
      fps: frames a second.
      num_frames, height, width: of the decoded video; num_frames is 1 + 4n.
      captions: text by tier, one of TIERS; a tier without text is absent. Several
        captions of a tier are separate lines: see `variants`.
      caption_sources: who wrote the tier: "original", "human", "oracle", "model:<id>",
        with the hash of the model's instruction behind it, if it had one.
      shots: (first frame, one past the last) of each shot.
      scores: named measures of the clip, such as motion.
      licence, source: the clip's terms of use and its origin.
      edit_of: id of the clip of which this one is an edit, frame by frame; a denoiser may
        be given that clip.
      subject: a name that clips have in common which show the same thing; a denoiser may
        be given pictures out of the others.
      period: frames after which the clip repeats itself, a multiple of 4; 0: it does not.
      sha256: of `video`; computed by default, checked by `verify`.
      state_json: the toy world's scene as JSON; None for other clips.
    """

    id: str
    video: bytes
    fps: float
    num_frames: int
    height: int
    width: int
    captions: Mapping[str, str]
    caption_sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shots: tuple[tuple[int, int], ...] = ()
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    licence: str = ""
    source: str = ""
    edit_of: str = ""
    subject: str = ""
    period: int = 0
    sha256: str = ""
    state_json: str | None = None

    def __post_init__(self):
        unknown = sorted({*self.captions, *self.caption_sources} - set(TIERS))
        if unknown:
            raise ValueError(
                f"clip {self.id!r}: caption tiers {unknown} not in {TIERS}"
            )
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"clip {self.id!r} has {self.num_frames} frames; clips have 1 + 4n"
            )
        if self.period % 4 or not 0 <= 2 * self.period < self.num_frames:
            raise ValueError(
                f"clip {self.id!r} has {self.num_frames} frames and period {self.period}: "
                "it must be a multiple of 4, and the clip longer than two periods"
            )
        if not self.sha256:
            digest = hashlib.sha256(self.video).hexdigest()
            object.__setattr__(self, "sha256", digest)

    def frames(self) -> np.ndarray:
        """Decodes the clip to uint8[t, h, w, c].

        Raises:
          CorruptRecord: it does not decode, or not to the record's size.
        """
        try:
            frames_thwc = video_io.decode(self.video).frames
        except video_io.UnreadableVideo as error:
            raise CorruptRecord("video bytes", self.id, str(error)) from None
        size = (self.num_frames, self.height, self.width)
        if frames_thwc.shape[:3] != size:
            raise CorruptRecord(
                "video bytes", self.id, f"{frames_thwc.shape[:3]} frames, not {size}"
            )
        return frames_thwc


RELATIONS = {"edit_of", "subject", "period"}


def relations(clip: ClipRecord) -> dict[str, Any]:
    """What relates a clip to others and to itself, by field; only what there is."""
    return {name: value for name in sorted(RELATIONS) if (value := getattr(clip, name))}


def shape_of(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the (frames, height, width) of a clip, by its entry in a shard's index."""
    return entry["num_frames"], entry["height"], entry["width"]


def variants(text: str) -> list[str]:
    """Returns the captions that a clip has of one tier."""
    return text.split("\n")


def captions_of(captions: Mapping[str, str], tiers: Collection[str]) -> list[str]:
    """Returns every caption of these tiers."""
    return [
        text
        for tier, several in captions.items()
        if tier in tiers
        for text in variants(several)
    ]


def join(captions: Sequence[str]) -> str:
    """Joins captions of one tier as a record stores them: without repeats or empty ones."""
    return "\n".join(dict.fromkeys(filter(None, captions)))


def verify(record: ClipRecord) -> ClipRecord:
    """Returns the record if its video matches its checksum.

    Raises:
      CorruptRecord: it does not.
    """
    digest = hashlib.sha256(record.video).hexdigest()
    if digest != record.sha256:
        raise CorruptRecord(
            "record", record.id, f"SHA-256 is {digest[:12]}, not {record.sha256[:12]}"
        )
    return record
