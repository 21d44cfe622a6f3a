"""Whether a video shows what is stated: one rule for each family.

Each rule takes the stated slots and a reading, and returns a verdict for each part and
"pass", their conjunction. What is not stated is not checked; what cannot be read counts
as not shown. If k objects are stated, each must be among the k largest of its frame in
three quarters of the frames.
"""

import numpy as np

from sora_jax.toyworld.camera import Path
from sora_jax.toyworld.reading import PRESENT, Reading, Track
from sora_jax.toyworld.scene import DIRECTIONS, RELATIONS, Slots, Subject, Tier

MOVING = 0.3  # Pixels a frame.
WANDER = 0.12  # RMS distance from a straight path, as a share of its length,
JITTER = 0.02  # plus this share of the frame's size.
APART = 3.0  # Least distance of the objects of a relation, pixels.
STRAY = 0.6  # RMS distance from a uniform camera path, in paces, plus `WANDER`.
STARTS = 0.35  # Least pace of a moving camera, as a share of the tier's slowest.
UNEXPLAINED = 0.35  # Most of the texture's change that camera motion may not explain.

_CAMERA_ENDS = (
    ("pan-left", "pan-right"),
    ("tilt-up", "tilt-down"),
    ("zoom-out", "zoom-in"),
)

Verdict = dict[str, bool]


def passed(parts: Verdict) -> Verdict:
    return parts | {"pass": all(parts.values())}


def find(reading: Reading, subject: Subject, among: int) -> Track | None:
    """The track that matches the subject: by colour, else by shape, else the largest."""
    if subject.colour is not None:
        track = reading.track(subject.colour, among)
        return track if track.present else None
    tracks = reading.tracks(among)
    if subject.shape is not None:
        tracks = [track for track in tracks if track.shape == subject.shape]
    return tracks[0] if tracks else None


def has_shape(reading: Reading, subject: Subject, track: Track | None) -> bool:
    if track is None:
        return False
    if subject.shape is None or not reading.tier.shape_readable:
        return True
    return track.shape == subject.shape


def _direction(reading: Reading, subject: Subject, track: Track | None) -> bool:
    """Whether it moves uniformly, closer to the stated direction than to any other."""
    if track is None:
        return False
    if subject.direction is None:
        return True
    velocity, wander = track.line
    speed = float(np.hypot(*velocity))
    length = speed * (reading.num_frames - 1)
    if speed <= MOVING or wander > JITTER * reading.tier.size + WANDER * length:
        return False
    names = reading.tier.directions
    along = [float(np.dot(velocity, DIRECTIONS[name])) for name in names]
    return names[int(np.argmax(along))] == subject.direction


def _speed(reading: Reading, subject: Subject, track: Track | None) -> bool:
    if track is None:
        return False
    if subject.speed is None:
        return True
    speed = float(np.hypot(*track.line[0]))
    fast = speed > reading.tier.speed_limit
    return speed > MOVING and fast == (subject.speed == "fast")


def attribute(slots: Slots, reading: Reading) -> Verdict:
    """The stated colour and shape."""
    subject = slots.subjects[0]
    track = find(reading, subject, 1)
    return passed(
        {"colour": track is not None, "shape": has_shape(reading, subject, track)}
    )


def count(slots: Slots, reading: Reading) -> Verdict:
    """The stated number and shape of a colour, in three quarters of the frames."""
    subject = slots.subjects[0] if slots.subjects else Subject()
    wanted = slots.count
    track = find(reading, subject, max(wanted, 1))
    if track is None:
        return {"colour": False, "count": False, "shape": False, "pass": False}
    matches = reading.counts(track.colour) == wanted
    return passed(
        {
            "colour": True,
            "count": bool(matches.mean() >= PRESENT),
            "shape": has_shape(reading, subject, track),
        }
    )


def _pair(slots: Slots, reading: Reading) -> list[Track | None]:
    """Two tracks; None for both if both subjects match the same track."""
    tracks = [find(reading, subject, 2) for subject in slots.subjects[:2]]
    if all(tracks) and tracks[0].colour == tracks[1].colour:
        return [None, None]
    return tracks


def relation(slots: Slots, reading: Reading) -> Verdict:
    """The signed side of the first as seen from the second, with colours and shapes.

    The side is that of the larger component of their mean offset.
    """
    first, second = _pair(slots, reading)
    shown = first is not None and second is not None
    side = False
    if shown:
        both = first.seen & second.seen
        if both.mean() >= PRESENT:
            offset = (first.centre[both] - second.centre[both]).mean(axis=0)
            along = {name: float(offset @ unit) for name, unit in RELATIONS.items()}
            seen = max(along, key=along.get)
            side = seen == slots.relation and along[seen] >= APART
    shapes = all(
        has_shape(reading, subject, track)
        for subject, track in zip(slots.subjects, (first, second), strict=True)
    )
    return passed({"side": side, "colours": shown, "shapes": shapes})


def motion(slots: Slots, reading: Reading) -> Verdict:
    """The stated colour, shape, direction and speed of one object."""
    subject = slots.subjects[0]
    track = find(reading, subject, 1)
    return passed(
        {
            "colour": track is not None,
            "shape": has_shape(reading, subject, track),
            "direction": _direction(reading, subject, track),
            "speed": _speed(reading, subject, track),
        }
    )


def motion_binding(slots: Slots, reading: Reading) -> Verdict:
    """Each of two objects has its own stated direction (and speed)."""
    pairs = list(zip(slots.subjects, _pair(slots, reading), strict=True))
    return passed(
        {
            "colours": all(track is not None for _, track in pairs),
            "shapes": all(has_shape(reading, *pair) for pair in pairs),
            "directions": all(_direction(reading, *pair) for pair in pairs),
            "speeds": all(_speed(reading, *pair) for pair in pairs),
        }
    )


def camera_class(reading: Reading) -> str | None:
    """The camera's motion; None if no motion explains the clip's texture."""
    return path_class(reading.camera, reading.tier)


def paces(path: Path, tier: Tier) -> np.ndarray:
    """Shifts and zooms [D, 3] in units of the tier's slowest motion."""
    shift, zoom = path.shift / tier.pan[0], path.zoom[:, None] / tier.zoom[0]
    return np.concatenate([shift, zoom], axis=1)


def path_class(path: Path, tier: Tier) -> str | None:
    """The motion of a camera's path; None if no motion explains the texture."""
    if not len(path.zoom) or np.median(path.error) > UNEXPLAINED:
        return None
    pace = paces(path, tier)
    mean = pace.mean(axis=0)
    axis = int(np.argmax(np.abs(mean)))
    # The distance of the path from a uniform one.
    stray = np.cumsum(pace - mean, axis=0)
    length = float(np.abs(mean[axis])) * len(pace)
    if np.sqrt((stray**2).sum(axis=1).mean()) > STRAY + WANDER * length:
        return None
    if np.abs(mean[axis]) < STARTS:
        return "static"
    low, high = _CAMERA_ENDS[axis]
    return high if mean[axis] > 0 else low


def camera(slots: Slots, reading: Reading) -> Verdict:
    """The stated camera motion, and the stated object in view."""
    parts = {"camera": camera_class(reading) == slots.camera}
    if slots.subjects:
        subject = slots.subjects[0]
        track = find(reading, subject, 1)
        parts["colour"] = track is not None
        parts["shape"] = has_shape(reading, subject, track)
    return passed(parts)
