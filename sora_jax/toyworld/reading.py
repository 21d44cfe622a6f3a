"""Perception: from frames to objects, tracks and camera motion, without a learned model.

Letters: T frames, H height, W width, N pixels or blobs, S shapes, P patch side.

Every pixel's colour is split into grey and chroma (its offset from the grey axis).
Mixing with the neutral background shortens the chroma but keeps its hue, so the hue
gives the palette colour and the length the coverage, whatever the background.
Connected covered pixels of one colour (8 neighbours) are a blob. Its shape is the one
whose drawing at the measured position and area overlaps it best. The camera is tracked on
the grey texture outside of coloured objects (see `camera`).
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from sora_jax.toyworld import camera
from sora_jax.toyworld.render import AREA, distance
from sora_jax.toyworld.scene import PALETTE, SHAPES, Tier, tier_of

# An orthonormal basis of the plane across the grey axis.
_CHROMA = np.array([[1, -1, 0], [1, 1, -2]], np.float32).T / np.sqrt(
    np.array([2, 6], np.float32)
)

COVERED = 0.4  # Least coverage of a pixel that belongs to a blob,
CORE = 0.75  # and of one whose colour counts for the blob's.
REJECTION = 95.0  # Largest distance of a blob's colour from the palette's (of 255).
PRESENT = 0.75  # Least share of the frames in which an object must be found.
OVERLAP = 0.55  # Least overlap of a blob with the drawing of a shape.


@dataclasses.dataclass(frozen=True)
class Track:
    """One colour's largest blob through time; rows where `seen` is false are zero."""

    colour: str
    seen: np.ndarray  # bool[T]
    centre: np.ndarray  # float64[T, 2], pixels
    area: np.ndarray  # float64[T], pixels
    overlap: np.ndarray  # float32[T, S]

    @property
    def present(self) -> bool:
        return bool(self.seen.mean() >= PRESENT)

    @functools.cached_property
    def shape(self) -> str | None:
        """The shape in most frames; None if no shape fits."""
        scores = self.overlap[self.seen]
        if not len(scores) or scores.max(axis=1).mean() < OVERLAP:
            return None
        votes = np.bincount(scores.argmax(axis=1), minlength=scores.shape[1])
        return SHAPES[int(np.argmax(votes + scores.mean(axis=0)))]

    @functools.cached_property
    def line(self) -> tuple[np.ndarray, float]:
        """Least-squares velocity (pixels a frame) and RMS distance from that path."""
        t = np.flatnonzero(self.seen).astype(np.float64)
        points = self.centre[self.seen]
        if len(t) < 2:
            return np.zeros(2), 0.0
        t -= t.mean()
        points = points - points.mean(axis=0)
        velocity = t @ points / (t @ t)
        rest = points - t[:, None] * velocity
        return velocity, float(np.sqrt((rest**2).sum(axis=1).mean()))


@dataclasses.dataclass(frozen=True)
class Reading:
    """The blobs of a clip: one row for each, largest first in each frame.

    `frame, colour` int[N] (colour is an index of `colours`), `rank` int[N] the place
    by area in its frame, `area` float64[N], `centre` float64[N, 2], `overlap`
    float32[N, S].
    """

    video: np.ndarray
    tier: Tier
    colours: tuple[str, ...]
    frame: np.ndarray
    colour: np.ndarray
    rank: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    overlap: np.ndarray

    @property
    def num_frames(self) -> int:
        return len(self.video)

    @functools.cached_property
    def camera(self) -> camera.Path:
        """The camera's path, tracked on first use."""
        return camera.track(self.video)

    def part(self, start: int, stop: int) -> "Reading":
        """The reading of the frames from `start` to before `stop`."""
        rows = (self.frame >= start) & (self.frame < stop)
        names = ("colour", "rank", "area", "centre", "overlap")
        return dataclasses.replace(
            self,
            video=self.video[start:stop],
            frame=self.frame[rows] - start,
            **{name: getattr(self, name)[rows] for name in names},
        )

    def counts(self, colour: str) -> np.ndarray:
        """Number of blobs of the colour in each frame, int[T]."""
        chosen = self.frame[self.colour == self.colours.index(colour)]
        return np.bincount(chosen, minlength=self.num_frames)

    def track(self, colour: str, among: int) -> Track:
        """The colour's largest blob in frames where it is among the `among` largest."""
        rows = np.flatnonzero(
            (self.colour == self.colours.index(colour)) & (self.rank < among)
        )
        frames, first = np.unique(self.frame[rows], return_index=True)
        rows = rows[first]
        seen = np.zeros(self.num_frames, bool)
        seen[frames] = True
        fields = []
        for values in (self.centre, self.area, self.overlap):
            field = np.zeros((self.num_frames, *values.shape[1:]), values.dtype)
            field[frames] = values[rows]
            fields.append(field)
        return Track(colour, seen, *fields)

    def tracks(self, among: int) -> list[Track]:
        """The tracks that are present, those with the largest area first."""
        tracks = [self.track(self.colours[c], among) for c in np.unique(self.colour)]
        tracks = [track for track in tracks if track.present]
        return sorted(tracks, key=lambda track: -track.area.sum())


def cover(video: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Coverage of each pixel by each colour of rgb[K, 3], float32[T, H, W, K]."""
    hues = rgb @ _CHROMA
    length = np.linalg.norm(hues, axis=1)[:, None]
    chroma = video.reshape(-1, 3).astype(np.float32) @ _CHROMA
    return (chroma @ (hues / length / length).T).reshape(*video.shape[:3], -1)


def _components(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-connected parts of equal kind > 0 in int[T, H, W].

    Returns the flat indices int[N] of all pixels with kind > 0, and the part int[N]
    (0, 1, ...) of each. Union-find: every pixel points at a lower one of its part;
    pointers are merged along edges and shortened until nothing changes.
    """
    where = np.flatnonzero(kind)
    order = np.zeros(kind.size, np.int64)
    order[where] = np.arange(len(where))
    order = order.reshape(kind.shape)
    edges = []
    for here, there in (
        (np.s_[:, :, :-1], np.s_[:, :, 1:]),
        (np.s_[:, :-1, :], np.s_[:, 1:, :]),
        (np.s_[:, :-1, :-1], np.s_[:, 1:, 1:]),
        (np.s_[:, :-1, 1:], np.s_[:, 1:, :-1]),
    ):
        joined = (kind[here] == kind[there]) & (kind[here] > 0)
        edges.append((order[here][joined], order[there][joined]))
    low, high = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    parent = np.arange(len(where))
    while True:
        a, b = parent[low], parent[high]
        least = np.minimum(a, b)
        if np.array_equal(a, b):
            break
        np.minimum.at(parent, a, least)
        np.minimum.at(parent, b, least)
        shorter = parent[parent]
        while not np.array_equal(shorter, parent):
            parent, shorter = shorter, shorter[shorter]
    return where, np.unique(parent, return_inverse=True)[1]


def _blur(patch: np.ndarray) -> np.ndarray:
    """[1 2 1] / 4 along the last two axes."""
    for axis in (-1, -2):
        around = np.roll(patch, 1, axis) + np.roll(patch, -1, axis)
        patch = 0.5 * patch + 0.25 * around
    return patch


def _grown(mask_npp: np.ndarray) -> np.ndarray:
    """The mask and its 8 neighbours."""
    for axis in (-1, -2):
        mask_npp = mask_npp | np.roll(mask_npp, 1, axis) | np.roll(mask_npp, -1, axis)
    return mask_npp


def _patches(
    coverage: np.ndarray, parts: np.ndarray, blobs: "_Blobs"
) -> tuple[np.ndarray, np.ndarray]:
    """Each blob's own coverage, and a mask without other blobs, both [N, P, P].

    A blob's coverage extends two pixels beyond its edge, unclipped, so that blur and
    noise do not change its sum; pixels that touch another blob are left out.
    """
    half = int(np.ceil(0.9 * np.sqrt(blobs.area.max(initial=1.0)))) + 3
    border = ((0, 0), (half, half), (half, half))
    window = np.arange(2 * half + 1)
    column = np.floor(blobs.centre[:, 0]).astype(int)[:, None, None] + window
    row = np.floor(blobs.centre[:, 1]).astype(int)[:, None, None] + window[:, None]
    frame, colour = blobs.frame[:, None, None], blobs.colour[:, None, None]
    shown = np.pad(coverage, (*border, (0, 0)))[frame, row, column, colour]
    part = np.pad(parts, border, constant_values=-1)[frame, row, column]
    own = part == blobs.part[:, None, None]
    near = _grown(own)
    free = ~(_grown((part >= 0) & ~own) & ~near)
    return np.where(_grown(near) & free, shown, np.float32(0)), free


def _overlaps(shown_npp: np.ndarray, free_npp: np.ndarray, tier: Tier) -> np.ndarray:
    """Overlap (soft intersection over union) of blobs with each shape's drawing.

    The drawing has the blob's area and centre; of a sharp one and two blurred ones, the
    best fit counts.
    """
    area = np.maximum(shown_npp.sum(axis=(1, 2)), 1.0)
    side = np.arange(shown_npp.shape[-1], dtype=np.float32)
    x = (shown_npp.sum(axis=1) @ side / area)[:, None, None]
    y = (shown_npp.sum(axis=2) @ side / area)[:, None, None]
    dx, dy = side - x, side[:, None] - y
    seen = np.clip(shown_npp, 0, 1)
    scores = np.zeros((len(area), len(SHAPES)), np.float32)
    for shape in tier.shapes:
        radius = np.sqrt(area / np.float32(AREA[shape]))[:, None, None]
        drawn = np.clip(0.5 - distance(shape, dx, dy, radius), 0, 1)
        best = np.zeros(len(area), np.float32)
        for _ in range(3):
            picture = drawn * free_npp
            both = np.minimum(picture, seen).sum(axis=(1, 2))
            either = np.maximum(picture, seen).sum(axis=(1, 2))
            best = np.maximum(best, both / np.maximum(either, 1e-6))
            drawn = _blur(drawn)
        scores[:, SHAPES.index(shape)] = best
    return scores


def _check(video: np.ndarray) -> Tier:
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        raise ValueError(
            f"a video must be uint8[T, H, W, 3], not {video.dtype}{list(video.shape)}"
        )
    if video.shape[1] != video.shape[2] or not len(video):
        raise ValueError(f"toy-world frames must be square, not {video.shape[1:3]}")
    return tier_of(video.shape[1])


@dataclasses.dataclass(frozen=True)
class _Blobs:
    """Rows of `Reading`, with the number of each blob's connected part."""

    part: np.ndarray
    frame: np.ndarray
    colour: np.ndarray
    area: np.ndarray
    centre: np.ndarray


def _blobs(
    video: np.ndarray,
    coverage: np.ndarray,
    where: np.ndarray,
    part: np.ndarray,
    tier: Tier,
    palette: np.ndarray,
) -> _Blobs:
    """The parts with an object's size and a palette colour, sorted."""
    size = tier.size
    y, x = np.divmod(where % (size * size), size)
    shown = coverage.reshape(-1, len(palette))[where]
    hue = shown.argmax(axis=1)
    weight = np.minimum(shown[np.arange(len(hue)), hue], 1.0)
    core = np.where(weight >= CORE, weight, 0)
    rgb = video.reshape(-1, 3)[where]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(part, weights=values).astype(np.float64)

    area = total(weight)
    centre = np.stack([total(weight * x), total(weight * y)], axis=1)
    centre = centre / area[:, None] + 0.5
    mean = np.stack([total(core * rgb[:, c]) for c in range(3)], axis=1)
    mean /= np.maximum(total(core), 1e-6)[:, None]  # Without a core: black, rejected.
    first = np.zeros(len(area), np.int64)
    first[part] = np.arange(len(part))
    frame, hue = where[first] // (size * size), hue[first]
    small = 0.3 * AREA["triangle"] * tier.small_radius[0] ** 2
    large = 1.5 * AREA["circle"] * tier.ood_radius[1] ** 2
    off = np.linalg.norm(mean - palette[hue], axis=1)
    sized = (area >= small) & (area <= large)
    kept = np.flatnonzero(sized & (off <= REJECTION))
    kept = kept[np.lexsort((-area[kept], frame[kept]))]
    return _Blobs(kept, frame[kept], hue[kept], area[kept], centre[kept])


def read(
    video: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = PALETTE
) -> Reading:
    """Reads a clip, uint8[T, H, W, 3] of a tier's size; else raises ValueError.

    `colours` are those to tell apart, RGB by name.
    """
    tier, palette = _check(video), np.array(list(colours.values()), np.float32)
    coverage = cover(video, palette)
    kind = np.where(coverage.max(axis=3) >= COVERED, coverage.argmax(axis=3) + 1, 0)
    where, part = _components(kind)
    blobs = _blobs(video, coverage, where, part, tier, palette)
    parts = np.full(kind.size, -1)
    parts[where] = part
    overlap = _overlaps(*_patches(coverage, parts.reshape(kind.shape), blobs), tier)
    frame = blobs.frame
    rank = np.arange(len(frame)) - np.searchsorted(frame, frame)
    return Reading(
        video,
        tier,
        tuple(colours),
        frame,
        blobs.colour,
        rank,
        blobs.area,
        blobs.centre,
        overlap,
    )
