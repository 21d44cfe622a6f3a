"""Near-duplicates: which clips are copies of a clip that is kept.

Two clips are copies if few bits of their hashes differ and their thumbnails correlate:
the first is quick and finds candidates, the second confirms them.

Every clip is compared with the clips kept before it, so that the work grows with the
square of the number of clips.

Letters: n clips, m clips that are kept, b bits of a hash.
"""

from collections.abc import Sequence

import numpy as np

from sora_jax.data.curation import fingerprint

# Measured on scenes of the toy world: of 256 bits, copies cropped by 5 % on each side
# differ by up to 80, and one in 10,000 pairs of different scenes by 64 or less; their
# thumbnails by up to 0.16, and by 0.47 or more.
CANDIDATE_BITS, DISTANCE = 88, 0.2
_ROWS, _COLUMNS = 256, 1 << 15  # of the table of distances that is held at a time


def find(
    prints: Sequence[fingerprint.Fingerprint],
    distance: float = DISTANCE,
    groups: Sequence[str] = (),
) -> list[int | None]:
    """Returns the clip that each clip is a copy of, None for those to keep.

    A clip is a copy of the first clip before it that is kept and near: what a copy is of
    is always kept, and no chain of small differences joins what is different.

    Args:
      prints: of the clips, the best first.
      distance: of thumbnails that are copies, at most.
      groups: that the clips are of; those of one group are not compared: windows of one
        video, since a shot often looks the same from one to the next, or related clips.
        "" or none: each is of its own.
    """
    copies: list[int | None] = [None] * len(prints)
    if not prints:
        return copies
    hashes_nb = np.stack([one.signs for one in prints])
    kept = np.zeros(len(prints), np.int64)  # the first `m` are in use
    m = 0
    for start in range(0, len(prints), _ROWS):
        block = range(start, min(start + _ROWS, len(prints)))
        near = _candidates(hashes_nb[block], hashes_nb, kept[:m])
        inside = (
            fingerprint.differing_bits(hashes_nb[block], hashes_nb[block])
            <= CANDIDATE_BITS
        )
        new: list[int] = []
        for row, clip in enumerate(block):
            others = [*near[row], *(i for i in new if inside[row, i - start])]
            if groups and groups[clip]:
                others = [i for i in others if groups[i] != groups[clip]]
            copies[clip] = _first_copy(prints, clip, np.array(others, int), distance)
            if copies[clip] is None:
                new.append(clip)
        kept[m : m + len(new)] = new
        m += len(new)
    return copies


def originals(
    prints: Sequence[fingerprint.Fingerprint],
    of: Sequence[fingerprint.Fingerprint],
) -> list[int | None]:
    """Returns the first of some clips that each clip is a copy of, None without one."""
    found: list[int | None] = []
    if not of:
        return [None] * len(prints)
    hashes_mb = np.stack([one.signs for one in of])
    everything = [*of, *prints]
    for start in range(0, len(prints), _ROWS):
        block_nb = np.stack([one.signs for one in prints[start : start + _ROWS]])
        near = _candidates(block_nb, hashes_mb, np.arange(len(of)))
        for row, others in enumerate(near):
            clip = len(of) + start + row
            found.append(_first_copy(everything, clip, others, DISTANCE))
    return found


def _candidates(block_nb, hashes_nb, kept_m) -> list[np.ndarray]:
    """The kept clips whose hashes are near, for each clip of a block, in order."""
    found: list[list[np.ndarray]] = [[] for _ in block_nb]
    for start in range(0, len(kept_m), _COLUMNS):
        some_m = kept_m[start : start + _COLUMNS]
        near_nm = (
            fingerprint.differing_bits(block_nb, hashes_nb[some_m]) <= CANDIDATE_BITS
        )
        for row in np.flatnonzero(near_nm.any(1)):
            found[row].append(some_m[near_nm[row]])
    return [np.concatenate(one) if one else np.array([], int) for one in found]


def _first_copy(prints, clip: int, others_m: np.ndarray, distance: float) -> int | None:
    if not len(others_m):
        return None
    thumbnails = np.stack([prints[other].thumbnail_khwc for other in others_m])
    far_m = fingerprint.distances(prints[clip].thumbnail_khwc, thumbnails)
    near = np.flatnonzero(far_m <= distance)
    return int(others_m[near[0]]) if len(near) else None
