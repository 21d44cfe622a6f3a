"""The toy world as a source of clips: rendered, captioned in five tiers, and encoded
losslessly."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sora_jax.data import records, video_io, workers
from sora_jax.toyworld import captions, families, render, scene

_CLIPS_PER_PART = 250


def parse_families(text: str | None) -> dict[str, float] | None:
    """Parses `motion:0.6,count:0.4`; raises ValueError for anything else."""
    if text is None:
        return None
    families = {}
    for entry in text.split(","):
        name, colon, weight = entry.strip().partition(":")
        try:
            families[name] = float(weight) if colon else math.nan
        except ValueError:
            families[name] = math.nan
        if not 0 <= families[name] < math.inf:
            raise ValueError(f"--families has {entry!r}; write motion:0.6,count:0.4")
    return families


@dataclasses.dataclass(frozen=True)
class ToyClips:
    """`num_clips` scenes of one tier and split; see `shards.Source`.

    Args:
      tier: "tw16", "tw32" or "tw64".
      num_clips: how many, from index 0.
      split: one of `scene.SPLITS`.
      families: weight by family; equal by default.
      seed: of the scenes.

    Raises:
      ValueError: an unknown tier, split or family.
    """

    tier: str
    num_clips: int
    split: str = "train"
    families: Mapping[str, float] | None = None
    seed: int = 0
    unit, admits, bounds = "clips", "", workers.Bounds()

    def __post_init__(self):
        if self.num_clips < 1:
            raise ValueError(f"num_clips must be 1 or more, not {self.num_clips}")
        self._scene(0)

    def _scene(self, index: int) -> scene.Scene:
        return families.scene(self.tier, self.split, index, self.families, self.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the clips."""
        return {
            "source": "toyworld",
            "tier": self.tier,
            "num_clips": self.num_clips,
            "families": dict(self.families) if self.families else "all",
            "seed": self.seed,
            "world_version": scene.VERSION,
            "captions_version": captions.VERSION,
            "encoding": "lossless",
        }

    @property
    def items(self) -> dict[str, str]:
        """One item, since the settings determine everything."""
        return {"": ""}

    def plan(self, items: Collection[str]) -> tuple[list[list[int]], list]:
        """Returns ranges of indices; nothing is skipped."""
        del items
        starts = range(0, self.num_clips, _CLIPS_PER_PART)
        ends = (min(start + _CLIPS_PER_PART, self.num_clips) for start in starts)
        return [list(part) for part in zip(starts, ends, strict=True)], []

    def expected(self, part: list[int]) -> int:
        """Returns how many clips a part has."""
        return part[1] - part[0]

    def only(self, part: list[int]) -> "ToyClips":
        """Returns this source, which has no list of clips."""
        del part
        return self

    def clips(
        self, part: list[int], note: workers.Note, avoid: Mapping[str, str]
    ) -> Iterator[records.ClipRecord]:
        """Yields the clips of a part."""
        for index in range(*part):
            drawn = self._scene(index)
            frames_thwc = render.render(drawn)
            fps = scene.TIERS[self.tier].fps
            texts = captions.captions(drawn)
            yield records.ClipRecord(
                id=f"toyworld/{self.tier}/{self.split}/{self.seed}/{index:07d}",
                video=video_io.encode_lossless(frames_thwc, fps),
                fps=fps,
                num_frames=frames_thwc.shape[0],
                height=frames_thwc.shape[1],
                width=frames_thwc.shape[2],
                captions=texts,
                # The alt text imitates captions of the web, errors included.
                caption_sources={
                    tier: "original" if tier == "alt" else "oracle" for tier in texts
                },
                shots=((0, frames_thwc.shape[0]),),
                licence="CC0-1.0",
                source=f"toyworld {drawn.family}",
                state_json=drawn.to_json(),
            )
            note(finished=1)
