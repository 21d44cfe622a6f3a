"""The toy world as a source of clips: rendered, captioned in five tiers, and encoded
losslessly."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.data import records, video_io, workers
from sora_jax.toyworld import captions, families, render, scene, variants

_CLIPS_PER_PART = 250
KINDS = ("scenes", "groups", "loops", "rates")
_GROUP = 4  # clips: one thing, its edit, and the thing twice more
_PERIODS = (8, 12, 16)
# Length of the scene, and frames a second: 5 to 33 frames in one or two seconds.
_LONG = 1_000_003  # added to the seed, once and again for each split
_RATES = (("usual", 4), ("usual", 16), ("long", 4), ("long", 8), ("long", 16))


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


def _shots(drawn: scene.Scene) -> tuple[tuple[int, int], ...]:
    """The first frame of each shot, and one past its last."""
    cuts = 1 + np.flatnonzero(np.diff(drawn.camera[:, 3]))
    ends = [0, *cuts.tolist(), drawn.num_frames]
    return tuple(itertools.pairwise(ends))


@dataclasses.dataclass(frozen=True)
class ToyClips:
    """`num_clips` scenes of one tier and split; see `shards.Source`.

    Args:
      tier: "tw16", "tw32" or "tw64".
      num_clips: how many, from index 0.
      split: one of `scene.SPLITS`.
      families: weight by family; those of `families.BASIC` equally by default.
      seed: of the scenes.
      kind: "scenes"; "groups" of a clip of one thing, the same with an edit (`edit_of`),
        and two other clips of its thing (`subject`); "loops", which repeat themselves
        (`period`); "rates", clips of 4, 8 and 16 frames a second and up to twice the
        usual seconds.

    Raises:
      ValueError: an unknown tier, split, family or kind.
    """

    tier: str
    num_clips: int
    split: str = "train"
    families: Mapping[str, float] | None = None
    seed: int = 0
    kind: str = "scenes"
    unit, admits, bounds = "clips", "", workers.Bounds()

    def __post_init__(self):
        if self.num_clips < 1:
            raise ValueError(f"num_clips must be 1 or more, not {self.num_clips}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it is one of {', '.join(KINDS)}")
        if self.families and self.kind in ("groups", "loops"):
            raise ValueError(f"--families does not go with clips of kind {self.kind}")
        if self.kind == "rates" and self.split not in ("train", "val", "test"):
            raise ValueError(
                f"clips of kind rates are train, val or test, not {self.split}"
            )
        others = {*(self.families or ())} - {*families.BASIC}
        if self.kind == "rates" and others:
            raise ValueError(
                f"clips of kind rates are of the families {', '.join(families.BASIC)}, not "
                f"{min(others)}"
            )
        self._clip(0)

    def _clip(self, index: int) -> tuple[scene.Scene, float, dict[str, Any]]:
        """The scene at an index, its frames a second, and more fields of its record."""
        fps, where = scene.find_tier(self.tier).fps, (self.tier, self.split)
        if self.kind == "scenes":
            return families.scene(*where, index, self.families, self.seed), fps, {}
        if self.kind == "loops":
            periods = [p for p in _PERIODS if variants.fits(self.tier, p)]
            period = periods[index % len(periods)]
            drawn = variants.looping(*where, index, period, seed=self.seed)
            return drawn, fps, {"period": period}
        if self.kind == "rates":
            length, fps = _RATES[index % len(_RATES)]
            split, seed = self.split, self.seed
            if length == "long":  # the scenes of no other split or seed
                seed += _LONG * (1 + scene.SPLITS.index(split))
                split = "test_len"
            drawn = families.scene(self.tier, split, index, self.families, seed)
            return variants.at_rate(drawn, fps), fps, {}
        group, place = divmod(index, _GROUP)
        first = _GROUP * group
        drawn = variants.one_thing(*where, group, self.seed)
        if place == 1:  # of no subject: a reference would tell where the thing is
            what = variants.EDITS[group % len(variants.EDITS)]
            return variants.edited(drawn, what), fps, {"edit_of": self._id(first)}
        more = {"subject": self._id(first)}
        if place == 0:
            return drawn, fps, more | {"edit_of": self._id(first + 1)}
        return variants.sibling(drawn, place - 2), fps, more

    def _id(self, index: int) -> str:
        kind = "" if self.kind == "scenes" else f"{self.kind}/"
        return f"toyworld/{kind}{self.tier}/{self.split}/{self.seed}/{index:07d}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the clips."""
        return {
            "source": "toyworld",
            "tier": self.tier,
            "num_clips": self.num_clips,
            "families": dict(self.families) if self.families else "basic",
            "seed": self.seed,
            "world_version": scene.VERSION,
            "captions_version": captions.VERSION,
            "encoding": "lossless",
            **({} if self.kind == "scenes" else {"kind": self.kind}),
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
            drawn, fps, more = self._clip(index)
            frames_thwc = render.render(drawn)
            texts = captions.captions(drawn)
            if self.kind == "groups":
                # So that a picture of the thing is needed to know what it looks like.
                for tier in ("short", "medium"):
                    text, _ = variants.unnamed(drawn, tier)
                    texts[tier] = records.join([texts[tier], text])
            yield records.ClipRecord(
                id=self._id(index),
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
                shots=_shots(drawn),
                licence="CC0-1.0",
                source=f"toyworld {drawn.family}",
                state_json=drawn.to_json(),
                **more,
            )
            note(finished=1)
