"""What the denoiser is given of a clip besides its text, while it learns.

A clip of 1 + 4 n frames has 1 + n latent frames, of which the first shows one frame. What
is given must be what a task can give, latent by latent, so there are these ways:

  known latents   the first latent frames: they depend on no later frame
  pictures        frames that were encoded alone, as one-frame latents at their own times
  a region        part of every frame: the clip was encoded with the rest in grey
  references      pictures of the same thing: the first latents of other clips of it
  a source        the latents of the clip of which this one is an edit

A clip that repeats itself is given as a loop: latents of one period, whose time goes round
in a circle.

A condition is drawn on the host, for each clip of each step, from the index alone, since
it decides how many tokens a clip has. Each token gets a slot, which says its role and
which of its clip's noise levels it has.

Letters: t latent frames, h and w latent height and width, p pictures, n tokens.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from sora_jax.core import config as configs

EXTRA_LEVELS = 3  # of a clip whose latent frames have levels of their own, besides tau


class Pattern(enum.StrEnum):
    """What is given of a clip."""

    NONE = "none"  # nothing: text to video
    FIRST_FRAME = "first_frame"  # image to video
    HEAD = "head"  # the first latent frames: extension forwards
    TAIL = "tail"  # frames at the end, as pictures: extension backwards
    BOTH = "both"  # the first latent frames and frames at the end: connecting clips
    KEYFRAMES = "keyframes"  # one to three frames at any times, as pictures
    EVERY = "every"  # every m-th frame, as pictures: interpolation
    REGION = "region"  # part of every frame: inpainting and outpainting
    LEVELS = "levels"  # nothing, and each latent frame has a noise level of its own
    REFERENCE = "reference"  # one or two pictures of the same thing in other clips
    EDIT = "edit"  # the clip before an edit
    LOOP = "loop"  # nothing; of all clips that repeat themselves, whatever its share is


PATTERNS = tuple(Pattern)
_OF_PICTURES = {Pattern.TAIL, Pattern.BOTH, Pattern.KEYFRAMES, Pattern.EVERY}
# The fewest latent frames with which a pattern leaves at least one to generate.
_LEAST_FRAMES = {p: 1 for p in Pattern} | {
    Pattern.FIRST_FRAME: 2,
    Pattern.HEAD: 2,
    Pattern.BOTH: 2,
    Pattern.LEVELS: 2,
}
MOST_PICTURES = 3  # of "tail", "both" and "keyframes"
MOST_REFERENCES = 2
# What the entries of latents must have for a pattern, and what it is.
_RELATIONS = {
    Pattern.REFERENCE: ("siblings", "clips of one subject"),
    Pattern.EDIT: ("source", "clips that are edits of others (edit_of)"),
    Pattern.LOOP: ("period", "clips that repeat themselves (period)"),
}


class Slot(enum.IntEnum):
    """A token's role and noise level; from EXTRA on it is generated at another level.

    What is given, in whatever role, has one level.
    """

    GENERATED = 0
    KNOWN = 1
    REFERENCE = 2
    SOURCE = 3
    EXTRA = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How often each pattern is trained, and how noisy what is given is.

    known_tau is the noise level of known tokens in sampling: slightly above 0, so that the
    model uses them without copying all of their flaws. In training it is drawn: a share
    of clips, for each (bound, share) of `levels`, has a level that is uniform up to the
    bound, and never above that of the generated tokens; the others have known_tau.
    """

    probabilities: Mapping[str, configs.Share] = dataclasses.field(
        default_factory=lambda: {"none": 1.0}
    )
    known_tau: Annotated[float, configs.Range("[0, 1)")] = 0.02
    levels: tuple[tuple[configs.Share, configs.Share], ...] = ()
    # Share of clips of which what is known is pure noise (level 1): the null condition.
    dropout: configs.Share = 0.0
    # Share of clips with three or more latent frames that start at a later one.
    mid_clip: configs.Share = 0.0
    # Share of clips of which only the first latent frame is generated, an image.
    images: configs.Share = 0.0

    def __post_init__(self):
        object.__setattr__(self, "probabilities", dict(self.probabilities))
        object.__setattr__(self, "levels", tuple(map(tuple, self.levels)))
        names = [p.value for p in Pattern]
        for name, share in self.probabilities.items():
            if name not in names:
                raise ValueError(
                    f"known-token pattern {name!r} is unknown; choose from "
                    f"{', '.join(names)}"
                )
            if share < 0:
                raise ValueError(f"the probability of {name!r} is negative: {share}")
        total = sum(self.probabilities.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(
                "the probabilities of known-token patterns must sum to 1, not "
                f"{total:g}: {self.probabilities}"
            )
        if not 0 <= self.known_tau < 1:
            raise ValueError(f"known_tau must be in [0, 1), not {self.known_tau}")
        if any(len(pair) != 2 for pair in self.levels):
            raise ValueError(
                f"known.levels are pairs (bound, share), not {self.levels}"
            )
        if (share := sum(share for _, share in self.levels)) > 1 + 1e-6:
            raise ValueError(f"the shares of known.levels sum to {share:g}, above 1")

    def has(self, *patterns: Pattern) -> bool:
        """Whether any of these is trained."""
        return any(self.probabilities.get(p, 0) > 0 for p in patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of what is trained, with "mid_clip" and "images"."""
        found = [p.value for p in PATTERNS if self.has(p)]
        more = [name for name in ("mid_clip", "images") if getattr(self, name) > 0]
        return (*found, *more)

    @property
    def takes_images(self) -> bool:
        """Whether some clips are trained with their first latent frame known."""
        return self.has(Pattern.FIRST_FRAME, Pattern.HEAD)

    @property
    def extra_levels(self) -> int:
        """Noise levels that a clip has besides those of generated and given tokens."""
        return EXTRA_LEVELS * self.has(Pattern.LEVELS)

    def check_source(
        self, entries: Sequence[Mapping[str, Any]], packed: bool, patch: Sequence[int]
    ) -> None:
        """Raises ValueError if cached latents lack what a pattern needs.

        Args:
          entries: of the index of the latents; see `related`.
          packed: whether rows are packed.
          patch: latents of a token along time, height and width.
        """
        longest = max(entry["shape"][0] for entry in entries) // patch[0]
        for pattern in PATTERNS:
            if not self.has(pattern):
                continue
            if longest < _LEAST_FRAMES[pattern]:
                raise ValueError(
                    f"pattern {pattern.value!r} needs at least {_LEAST_FRAMES[pattern]} "
                    f"latent frames, not {longest}: fewer leave nothing to generate"
                )
            if pattern in _OF_PICTURES | _RELATIONS.keys() and patch[0] > 1:
                raise ValueError(
                    f"known.probabilities.{pattern.value} is above 0, but a token spans "
                    f"{patch[0]} latent frames (model.dit.patch), of which it needs single "
                    "ones"
                )
            lacks = None
            if pattern in _OF_PICTURES and not any(e.get("pictures") for e in entries):
                lacks = "pictures: encode the clips with prepare --pictures"
            if pattern is Pattern.REGION and not any(e.get("region") for e in entries):
                lacks = "regions: encode the clips with prepare --regions"
            if pattern is Pattern.EVERY and not lacks and not any(map(_whole, entries)):
                lacks = "picture of every frame: prepare --pictures with all of them"
            name, what = _RELATIONS.get(pattern, ("", ""))
            if name and all(entry.get(name) is None for entry in entries):
                lacks = what
            if lacks:
                raise ValueError(
                    f"known.probabilities.{pattern.value} is above 0, but the latents "
                    f"have no {lacks}"
                )
            if (pattern in _OF_PICTURES or pattern in _RELATIONS) and not packed:
                raise ValueError(
                    f"known.probabilities.{pattern.value} is above 0, which gives "
                    "some clips more or fewer tokens and needs packed rows (packing.shapes)"
                )
        if self.images and patch[0] > 1:
            raise ValueError(
                f"known.images is {self.images:g}, but a token spans {patch[0]} latent "
                "frames (model.dit.patch), and an image has one"
            )
        for name in ("mid_clip", "images"):
            if getattr(self, name) and not packed:
                raise ValueError(
                    f"known.{name} is {getattr(self, name):g}, which takes tokens from some "
                    "clips and needs packed rows (packing.shapes)"
                )

    def loops(self, entry: Mapping[str, Any]) -> bool:
        """Whether a clip is given as a loop, as all are that repeat themselves."""
        return self.has(Pattern.LOOP) and bool(entry.get("period"))

    def most_tokens(
        self, entry: Mapping[str, Any], patch: Sequence[int], temporal_stride: int = 4
    ) -> int:
        """The most tokens that a clip can have; the arguments are those of `draw`."""
        shape = entry["shape"]
        if self.loops(entry):
            if entry["period"] % temporal_stride:
                raise ValueError(
                    f"a clip repeats itself after {entry['period']} frames, which is no "
                    f"multiple of the {temporal_stride} frames of a latent"
                )
            length = entry["period"] // temporal_stride
            return Condition(stop=length).tokens(shape, patch)
        frames, pictures = tuple(entry.get("pictures") or ()), 0
        if self.has(Pattern.TAIL, Pattern.BOTH, Pattern.KEYFRAMES):
            pictures = min(MOST_PICTURES, len(frames))
        if self.has(Pattern.EVERY) and _whole(entry):
            pictures = max(pictures, len(frames[::2]))
        kinds = [Condition(pictures=frames[:pictures])]
        if self.has(Pattern.REFERENCE):
            others = max(0, len(entry.get("siblings", ())) - 1)
            kinds.append(Condition(references=(0,) * min(others, MOST_REFERENCES)))
        if self.has(Pattern.EDIT):
            kinds.append(Condition(source=entry.get("source")))
        return max(kind.tokens(shape, patch) for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is given of one clip.

    Attributes:
      pattern: its name; "none" where a clip has no room for what was drawn.
      start, stop: the frames of tokens of the window that is generated; None: to the end.
      head: frames of tokens that are known at its head.
      pictures: video frames that are given as pictures.
      levels: for "levels", which level each frame of tokens of the window has.
      references: clips whose first latents are given, by their places in the data.
      source: the clip of which this one is an edit, likewise.
    """

    pattern: Pattern = Pattern.NONE
    start: int = 0
    stop: int | None = None
    head: int = 0
    pictures: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    references: tuple[int, ...] = ()
    source: int | None = None

    @property
    def others(self) -> tuple[int, ...]:
        """The other clips that are needed, by their places in the data."""
        return self.references + (() if self.source is None else (self.source,))

    def tokens(self, shape: Sequence[int], patch: Sequence[int]) -> int:
        """Tokens of a clip of latents [t, h, w, ...], with those that are given beside."""
        a_frame = math.prod(shape[1:3]) // math.prod(patch[1:])
        t = shape[0] // patch[0]
        frames = (t if self.stop is None else self.stop) - self.start
        frames += len(self.pictures) + len(self.references)
        return a_frame * (frames + (0 if self.source is None else t))


def _whole(entry: Mapping[str, Any]) -> bool:
    """Whether a clip's pictures are all frames from the first on."""
    pictures = entry.get("pictures") or ()
    return bool(pictures) and pictures[-1] == len(pictures) - 1


def draw(
    config: Config,
    entry: Mapping[str, Any],
    random: np.random.Generator,
    patch: Sequence[int] = (1, 1, 1),
    temporal_stride: int = 4,
) -> Condition:
    """Draws the condition of a clip, in frames of tokens.

    Args:
      config: how often each pattern is drawn.
      entry: of the clip, in the index of cached latents: its `shape`, the video frames of
        its `pictures`, whether it has a `region`, its `period`; and of `related`, its
        `siblings` and its `source`.
      random: of this clip at this step.
      patch: latents of a token along time, height and width.
      temporal_stride: video frames per latent frame, except for the first.
    """
    names = [name for name, share in config.probabilities.items() if share > 0]
    edges = np.cumsum([config.probabilities[name] for name in names])
    place = int(np.searchsorted(edges, random.random() * edges[-1], side="right"))
    pattern = Pattern(names[min(place, len(names) - 1)])
    if config.loops(entry):
        length = entry["period"] // temporal_stride  # a token spans one latent frame
        # From the second one on: the first shows one frame.
        room = entry["shape"][0] - length
        start = int(random.integers(1, room + 1))
        return Condition(Pattern.LOOP, start, start + length)
    if config.images and random.random() < config.images:
        return Condition(stop=1)
    t, frames = entry["shape"][0] // patch[0], tuple(entry.get("pictures") or ())
    start = 0
    is_mid = config.mid_clip > 0 and random.random() < config.mid_clip
    if is_mid and t > 2 and pattern is not Pattern.EDIT:
        start = int(random.integers(1, t - 1))
        first = 1 + temporal_stride * (start * patch[0] - 1)  # frame of the window
        frames = tuple(frame for frame in frames if frame >= first)
    t -= start
    if (
        t < _LEAST_FRAMES[pattern]
        or (pattern in _OF_PICTURES and not frames)
        or (pattern is Pattern.EVERY and not _whole(entry))
        or (pattern is Pattern.REGION and entry.get("region") is None)
        or (pattern is Pattern.FIRST_FRAME and start)
        or (pattern is Pattern.REFERENCE and not entry.get("siblings"))
        or (pattern is Pattern.EDIT and entry.get("source") is None)
        or pattern is Pattern.LOOP
    ):
        return Condition(start=start)
    head, pictures, levels = 0, (), ()
    if pattern is Pattern.FIRST_FRAME:
        head = 1
    if pattern in (Pattern.HEAD, Pattern.BOTH):
        head = int(random.integers(1, t))
    if pattern in (Pattern.TAIL, Pattern.BOTH):
        count = min(int(random.integers(1, MOST_PICTURES + 1)), len(frames))
        # The last three are neighbours. Where all are there, they need not be the last:
        # a task's window has whole latents, and may end up to a latent later.
        end = len(frames)
        if _whole(entry):
            end -= int(
                random.integers(0, min(temporal_stride, len(frames) - count + 1))
            )
        pictures = frames[end - count : end]
    if pattern is Pattern.KEYFRAMES:
        count = int(random.integers(1, min(MOST_PICTURES, len(frames)) + 1))
        pictures = tuple(sorted(random.choice(frames, count, replace=False).tolist()))
    if pattern is Pattern.EVERY:
        pictures = frames[:: int(random.integers(2, 5))]
    if pattern is Pattern.LEVELS:
        drawn = random.integers(0, 1 + EXTRA_LEVELS, t)
        if random.random() < 0.5:
            drawn = np.sort(drawn)  # later frames are noisier, as in an extension
        levels = tuple(drawn.tolist())
    references, source = (), None
    if pattern is Pattern.REFERENCE:
        siblings, rank = entry["siblings"], entry["rank"]
        others = len(siblings) - 1
        count = int(random.integers(1, min(MOST_REFERENCES, others) + 1))
        chosen = random.choice(others, count, replace=False)
        references = tuple(siblings[i] for i in (chosen + (chosen >= rank)).tolist())
    if pattern is Pattern.EDIT:
        source = entry["source"]
    return Condition(pattern, start, None, head, pictures, levels, references, source)


def reference_time(number: int) -> float:
    """The time of a reference, in frames of tokens: before that of any window."""
    return -1.0 - number


def related(
    entries: Sequence[Mapping[str, Any]], first: int = 0
) -> dict[int, dict[str, Any]]:
    """The other clips that may be given of each, by its place in the data.

    Args:
      entries: of the index of one cache of latents.
      first: place of the first of them in the data.

    Returns:
      More fields of the entries that have any: the places of all clips of the same
      subject and size as `siblings`, if there are several, and the clip's own number
      among them as `rank`; and the place of the clip that this one is an edit of as
      `source`, if it is there, of the same size and frame rate.
    """
    places = {entry["id"]: place for place, entry in enumerate(entries)}
    subjects: dict[tuple, list[int]] = {}
    ranks = []
    for place, entry in enumerate(entries):
        same = subjects.setdefault(_subject(entry), [])
        ranks.append(len(same))
        same.append(first + place)
    found = {}
    for place, (entry, rank) in enumerate(zip(entries, ranks, strict=True)):
        more, siblings = {}, subjects[_subject(entry)]
        if entry.get("subject") and len(siblings) > 1:  # one list, shared by all
            more |= {"siblings": siblings, "rank": rank}
        source = places.get(entry.get("edit_of"))
        if source is not None and all(
            entries[source].get(name) == entry.get(name) for name in ("shape", "fps")
        ):
            more["source"] = first + source
        if more:
            found[first + place] = more
    return found


def _subject(entry: Mapping[str, Any]) -> tuple:
    return entry.get("subject"), *entry["shape"][1:3]


def slots(
    condition: Condition, grid: Sequence[int], region_thw: np.ndarray | None = None
) -> np.ndarray:
    """The slot of each token of a clip's window and of those given beside it, int8 [n].

    Args:
      condition: of the clip.
      grid: tokens along time, height and width of the window.
      region_thw: for "region", which tokens of the window are known.
    """
    found = np.zeros(grid, np.int8)
    found[: condition.head] = Slot.KNOWN
    if condition.levels:
        level_t = np.array(condition.levels, np.int8)
        level_t[level_t > 0] += Slot.EXTRA - 1
        found[:] = level_t[:, None, None]
    if region_thw is not None:
        found[region_thw] = Slot.KNOWN
    beside = [Slot.KNOWN] * len(condition.pictures)
    beside += [Slot.REFERENCE] * len(condition.references)
    beside += [Slot.SOURCE] * (0 if condition.source is None else grid[0])
    beside_n = np.repeat(np.array(beside, np.int8), math.prod(grid[1:]))
    return np.append(found.ravel(), beside_n)
