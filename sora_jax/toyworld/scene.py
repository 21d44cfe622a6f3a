"""Scenes of the toy world: tiers, palette, random draws and the state record.

Letters: T frames, K objects, H height, W width. Coordinates are (x, y) in pixels,
x to the right and y down; the centre of pixel i is at i + 0.5. Speeds are in
pixels a frame. A camera row is (cx, cy, log_zoom, shot): the world point shown at
the frame's centre, the natural logarithm of the magnification, the shot's number.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VERSION = 1  # Part of every random key: raise it when any pixel changes.

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "magenta": (205, 60, 205),
    "cyan": (40, 200, 210),
    "orange": (240, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")

_HALF = 0.5**0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-left": (-_HALF, -_HALF),
    "up-right": (_HALF, -_HALF),
    "down-left": (-_HALF, _HALF),
    "down-right": (_HALF, _HALF),
}
OPPOSITE = {
    name: next(other for other, way in DIRECTIONS.items() if way == (-ux, -uy))
    for name, (ux, uy) in DIRECTIONS.items()
}
# The unit vector from the second object to the first.
RELATIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
SPEEDS = ("slow", "fast")
CAMERAS = (
    "static",
    "pan-left",
    "pan-right",
    "tilt-up",
    "tilt-down",
    "zoom-in",
    "zoom-out",
)
TONES = ("dark", "medium", "light")
PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "centre", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
SPLITS = ("train", "val", "test", "test_comp", "test_ood", "test_len")

CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Pairs that no training, validation or in-distribution test scene or caption contains.
HELD_OUT_SHAPES = frozenset(
    {("red", "cross"), ("green", "square"), ("blue", "triangle"), ("magenta", "circle")}
)
HELD_OUT_DIRECTIONS = frozenset(
    {("red", "down"), ("yellow", "left"), ("cyan", "up"), ("orange", "right")}
)

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size class of scenes: what fits into its frames and how fast objects move.

    Radii are in pixels, speeds and pans in pixels a frame, zooms in log units a
    frame. Speeds are chosen so that every path ends inside the frame.
    """

    name: str
    num_frames: int
    size: int
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    directions: tuple[str, ...]
    radius: Range
    ood_radius: Range
    small_radius: Range  # Of several objects in a frame.
    slow: Range
    fast: Range
    pan: Range
    zoom: Range
    wavelength: Range
    shape_readable: bool = True  # Whether the oracle checks shapes.
    fps: int = 8

    @property
    def speed_limit(self) -> float:
        """The speed that separates slow from fast."""
        return 0.5 * (self.slow[1] + self.fast[0])

    def frames(self, split: str) -> int:
        """Frames of a clip: twice the latents' time span in `test_len`."""
        return 2 * self.num_frames - 1 if split == "test_len" else self.num_frames


_FOUR = ("left", "right", "up", "down")
TIERS: dict[str, Tier] = {
    "tw16": Tier(
        name="tw16",
        num_frames=5,
        size=16,
        colours=("red", "green", "blue", "yellow"),
        shapes=("circle", "square"),
        directions=_FOUR,
        radius=(2.6, 3.4),
        ood_radius=(3.6, 4.2),
        small_radius=(2.5, 2.7),
        slow=(0.7, 0.95),
        fast=(1.35, 1.55),
        pan=(0.7, 0.9),
        zoom=(0.05, 0.07),
        wavelength=(10.0, 16.0),
        shape_readable=False,
    ),
    "tw32": Tier(
        name="tw32",
        num_frames=9,
        size=32,
        colours=tuple(PALETTE),
        shapes=SHAPES[:4],
        directions=_FOUR,
        radius=(4.0, 5.5),
        ood_radius=(5.8, 6.6),
        small_radius=(4.0, 4.8),
        slow=(1.2, 1.4),
        fast=(1.85, 2.1),
        pan=(1.0, 1.3),
        zoom=(0.035, 0.05),
        wavelength=(12.0, 24.0),
    ),
    "tw64": Tier(
        name="tw64",
        num_frames=17,
        size=64,
        colours=tuple(PALETTE),
        shapes=SHAPES,
        directions=tuple(DIRECTIONS),
        radius=(5.0, 9.0),
        ood_radius=(9.5, 11.0),
        small_radius=(5.0, 8.0),
        slow=(0.8, 1.1),
        fast=(1.6, 1.9),
        pan=(0.9, 1.3),
        zoom=(0.018, 0.026),
        wavelength=(12.0, 32.0),
    ),
}


def find_tier(name: str) -> Tier:
    """The tier of that name; ValueError lists the known ones."""
    try:
        return TIERS[name]
    except KeyError:
        known = ", ".join(TIERS)
        raise ValueError(f"no toy-world tier {name!r}; there are {known}") from None


def tier_of(size: int) -> Tier:
    """The tier whose frames are `size` pixels wide; ValueError if there is none."""
    for tier in TIERS.values():
        if tier.size == size:
            return tier
    sizes = ", ".join(str(tier.size) for tier in TIERS.values())
    raise ValueError(f"no toy-world tier has {size}-pixel frames; there are {sizes}")


# -- Random draws ----------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _fold(seed: int, label: str) -> int:
    text = f"toyworld/{VERSION}/{seed}/{label}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


class Draws:
    """Random numbers that are a pure function of (seed, label, index).

    The words come from Philox with key (hash of seed and label, index). Only its raw
    stream is used, which NumPy guarantees across versions (unlike `Generator`'s).
    """

    def __init__(self, seed: int, label: str, index: int):
        if index < 0:
            raise ValueError(f"index must be >= 0, not {index}")
        self._philox = np.random.Philox(key=_fold(seed, label) + (index << 64))
        self._words: list[int] = []

    def unit(self) -> float:
        """A float in [0, 1)."""
        if not self._words:
            self._words = self._philox.random_raw(32).tolist()
        return (self._words.pop() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice[Item](self, items: Sequence[Item]) -> Item:
        return items[int(self.unit() * len(items))]

    def shuffled[Item](self, items: Sequence[Item]) -> list[Item]:
        left = list(items)
        return [left.pop(int(self.unit() * len(left))) for _ in items]


# -- What a scene or a caption states --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """One object as stated in words; None means "not stated"."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    speed: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happens once, as stated in words; None means "not stated".

    Attributes:
      kind: one of `FAMILY_OF_EVENT`.
      of: which subject it happens to, by its place in `Slots.subjects`.
      by: which subject causes it.
      value: what comes of it, such as a colour or a direction.
      happens: False where a text says that it does not: a near miss.
      second: when, in seconds from the start of the clip.
    """

    kind: str
    of: int = 0
    by: int | None = None
    value: str | None = None
    happens: bool = True
    second: float | None = None

    def exchanged(self) -> "Event":
        """The event after the first two subjects have changed places."""
        places = {0: 1, 1: 0}
        of, by = places.get(self.of, self.of), places.get(self.by, self.by)
        return dataclasses.replace(self, of=of, by=by)


# The family whose rule checks what is stated of an event.
FAMILY_OF_EVENT: dict[str, str] = {
    "fall": "gravity",
    "bounce": "gravity",
    "collide": "collision",
    "shot": "shots",
    "turn": "to_and_fro",
    "camera": "camera_path",
    "recolour": "change",
    "grow": "change",
    "shrink": "change",
}
# Events whose value is how their subject moves.
MOTIONS = frozenset({"shot"})


@dataclasses.dataclass(frozen=True)
class Slots:
    """Everything that a text can state; None means "not stated".

    `relation` is the position of the first subject relative to the second. `count` is
    the number of equal objects ("three red circles"), `total` of all objects. `events`
    are in the order in which they happen.
    """

    subjects: tuple[Subject, ...] = ()
    count: int | None = None
    relation: str | None = None
    camera: str | None = None
    tone: str | None = None
    total: int | None = None
    events: tuple[Event, ...] = ()

    @property
    def family(self) -> str | None:
        """The family whose rule checks what is stated; None if nothing is stated."""
        if self.events:
            return FAMILY_OF_EVENT[self.events[0].kind]
        moving = sum(subject.direction is not None for subject in self.subjects)
        if self.relation is not None and len(self.subjects) == 2:
            return "relation"
        if len(self.subjects) == 2 and moving:
            return "motion_binding"
        if moving or any(subject.speed for subject in self.subjects):
            return "motion"
        if self.count is not None:
            return "count"
        if self.camera is not None:
            return "camera"
        if self.subjects:
            return "attribute"
        return None

    def held_out(self) -> bool:
        """Whether a subject has a combination that training scenes never have."""
        return (
            any(
                (subject.colour, subject.shape) in HELD_OUT_SHAPES
                or (subject.colour, subject.direction) in HELD_OUT_DIRECTIONS
                for subject in self.subjects
            )
            or any(
                (subject.colour, event.value) in HELD_OUT_DIRECTIONS
                for event in self.events
                if event.kind in MOTIONS
                for subject in self.subjects[event.of : event.of + 1]
            )
            or any(
                (event.value, self.subjects[event.of].shape) in HELD_OUT_SHAPES
                for event in self.events
                if event.kind == "recolour"
            )
        )

    def by_place(self) -> "Slots":
        """The same facts, with the left or upper subject first."""
        if self.relation not in ("right", "below"):
            return self
        return dataclasses.replace(
            self,
            subjects=self.subjects[::-1],
            relation=CONVERSE[self.relation],
            events=tuple(event.exchanged() for event in self.events),
        )

    def factors(self) -> dict[str, Any]:
        """As JSON values: one list for each subject field, without None."""
        names = (field.name for field in dataclasses.fields(Subject))
        lists: dict[str, Any] = {
            name + "s": [getattr(subject, name) for subject in self.subjects]
            for name in names
        }
        factors = {name: values for name, values in lists.items() if any(values)}
        for name in ("count", "relation", "camera", "tone", "total"):
            if (value := getattr(self, name)) is not None:
                factors[name] = value
        if self.events:
            factors["events"] = [
                {k: v for k, v in dataclasses.asdict(event).items() if v is not None}
                for event in self.events
            ]
        return factors

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any]) -> "Slots":
        """Inverse of `factors`."""
        names = [field.name for field in dataclasses.fields(Subject)]
        length = max((len(factors.get(name + "s", ())) for name in names), default=0)
        subjects = tuple(
            Subject(**{n: factors[n + "s"][k] for n in names if n + "s" in factors})
            for k in range(length)
        )
        rest = {
            name: factors[name]
            for name in ("count", "relation", "camera", "tone", "total")
            if name in factors
        }
        events = tuple(Event(**event) for event in factors.get("events", ()))
        return cls(subjects, **rest, events=events)


# -- State record ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Object:
    """An object in the world; its radius is in pixels."""

    id: int
    shape: str
    colour: str
    radius: float


@dataclasses.dataclass(frozen=True)
class Background:
    """Neutral grey: base + sum of amplitude sin(kx x + ky y + phase), of 255.

    Waves are rows (kx, ky, phase, amplitude), in radians a pixel of the world.
    """

    base: float
    waves: tuple[tuple[float, float, float, float], ...]


def _background(record: Mapping[str, Any]) -> Background:
    return Background(record["base"], tuple(tuple(wave) for wave in record["waves"]))


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """The exact state of one clip, which determines its frames, captions and scores.

    `pos` and `vel` are float64[T, K, 2] in the world, `camera` float64[T, 4];
    `factors` is `Slots.factors()` of its facts. Later objects cover earlier ones.
    `scale` float64[T, K] is each object's size as a multiple of its radius, 0 where it is
    not there; None: all are there at their own size. `later` are the backgrounds of the
    shots after the first.
    """

    tier: str
    family: str
    split: str
    index: int
    seed: int
    objects: tuple[Object, ...]
    pos: np.ndarray
    vel: np.ndarray
    camera: np.ndarray
    background: Background
    factors: dict[str, Any]
    scale: np.ndarray | None = None
    later: tuple[Background, ...] = ()

    @property
    def num_frames(self) -> int:
        return len(self.camera)

    @property
    def size(self) -> int:
        return TIERS[self.tier].size

    @property
    def truth(self) -> Slots:
        """All facts that could be stated of the scene."""
        return Slots.from_factors(self.factors)

    def to_json(self) -> str:
        """Compact JSON; `from_json` returns an equal scene."""
        record = dataclasses.asdict(self)
        for name in ("pos", "vel", "camera"):
            record[name] = getattr(self, name).tolist()
        del record["scale"], record["later"]  # most scenes have neither
        if self.scale is not None:
            record["scale"] = self.scale.tolist()
        if self.later:
            record["later"] = [dataclasses.asdict(back) for back in self.later]
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The scene that `to_json` wrote; ValueError if `text` is not a scene's JSON."""
        try:
            record = json.loads(text)
            count = len(record["objects"])
            record["objects"] = tuple(Object(**item) for item in record["objects"])
            record["background"] = _background(record["background"])
            record["later"] = tuple(map(_background, record.get("later", ())))
            if "scale" in record:
                scale = np.asarray(record["scale"], np.float64)
                record["scale"] = scale.reshape(-1, count)
            for name, shape in (("pos", (count, 2)), ("vel", (count, 2))):
                values = np.asarray(record[name], np.float64)
                record[name] = values.reshape(-1, *shape)
            record["camera"] = np.asarray(record["camera"], np.float64).reshape(-1, 4)
            return cls(**record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a toy-world scene's JSON (Scene.to_json writes it): {error}"
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scene) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.tier, self.family, self.split, self.index, self.seed))
