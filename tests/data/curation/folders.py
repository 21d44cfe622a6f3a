"""Shards of given clips, as input of a curation."""

import dataclasses

import numpy as np

from sora_jax.data import records, shards, video_io, workers
from sora_jax.toyworld import families, render

FPS = 8.0


def toy(index, tier="tw32", family=None, seed=0):
    """The frames of a scene of the toy world."""
    weights = {family: 1.0} if family else None
    return render.render(families.scene(tier, "train", index, weights, seed))


def record(id, frames_thwc, crf=None, **fields):
    """A clip, lossless without `crf`."""
    if crf is None:
        encoded = video_io.encode_lossless(frames_thwc, FPS)
    else:
        encoded = video_io.encode_mp4(frames_thwc, FPS, crf=crf)
    num_frames, height, width = frames_thwc.shape[:3]
    size = {"num_frames": num_frames, "height": height, "width": width}
    captions = {"short": f"clip {id}"}
    return records.ClipRecord(
        id=id, video=encoded, fps=FPS, captions=captions, **size, **fields
    )


@dataclasses.dataclass(frozen=True)
class Given:
    """Given clips, `per_part` in a file; see `shards.Source`."""

    given: tuple
    per_part: int = 4
    split: str = "train"
    unit, admits, bounds = "clips", "", workers.Bounds()
    settings = {"source": "given"}

    @property
    def items(self):
        return {clip.id.rpartition("#")[0]: "" for clip in self.given}

    def plan(self, items):
        return [*range(0, len(self.given), self.per_part)], []

    def expected(self, part):
        return self.per_part

    def clips(self, part, note, avoid):
        yield from self.given[part : part + self.per_part]


def write(folder, clips, **fields):
    """Writes clips as shards and opens them."""
    shards.write(folder, Given(tuple(clips), **fields))
    return shards.open(folder)


def shifted(frames_thwc, levels):
    """Frames that are brighter by some levels."""
    return np.clip(frames_thwc.astype(int) + levels, 0, 255).astype(np.uint8)
