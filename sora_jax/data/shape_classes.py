"""Frame sizes, lengths and rates of clips that keep those of their videos.

A denoiser sees a clip of f frames, h high and w wide, as

    (1 + (f - 1) / 4) * (h / m) * (w / m)

tokens, where m pixels a side make a token: the spatial stride of the video VAE times the
denoiser's patch. Clips have as many pixels as a budget of tokens allows. Most videos take
one of six sizes, one for each usual aspect ratio, as in the buckets of Open-Sora and SANA;
so few programs are compiled. A video is never enlarged, and its aspect is kept: it is
scaled to cover the size, and what is beyond the size is cropped, a few per cent.

Letters: f frames, h height, w width. Sizes are (height, width) in pixels.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

# Width to height.
ASPECTS = ((16, 9), (9, 16), (4, 3), (3, 4), (1, 1), (21, 9))
# Shares of a picture: what a size may crop of its aspect ratio, so that it has whole
# tokens, before it is hardly chosen; and what a class may crop of a video.
_ROUNDED, _CROPPED = 0.03, 0.06
_MOST_CROPPED = 0.5  # of a video with a size of its own: whole tokens may cost as much
_NEAR = 1.05  # a rate up to so many times the limit counts as within it

type Size = tuple[int, int]


def cropped(native: Size, size: Size) -> float:
    """Returns which share of a picture is lost as it is scaled to cover a size.

    With aspect ratios a and b of picture and size, it is 1 - min(a / b, b / a).
    """
    a, b = native[1] * size[0], native[0] * size[1]
    return 1 - min(a, b) / max(a, b)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How large clips may be.

    Args:
      max_tokens: of a clip.
      multiple_of: pixels a side of a token; all sides are multiples of it.

    Raises:
      ValueError: a number is out of range.
    """

    max_tokens: int
    multiple_of: int = 16

    def __post_init__(self):
        if self.multiple_of < 8 or self.multiple_of % 2:
            raise ValueError(
                f"--multiple_of must be even and at least 8, not {self.multiple_of}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"--max_tokens must be positive, not {self.max_tokens}")

    def tokens(self, num_frames: int, size: Size) -> int:
        """Returns the tokens of a clip."""
        m = self.multiple_of
        return _latent_frames(num_frames) * (size[0] // m) * (size[1] // m)

    def classes(self, num_frames: int) -> tuple[Size, ...]:
        """Returns the sizes of clips of so many frames, one for each of ASPECTS.

        Of the sizes within the budget, each is the one with the highest

            tokens * (1 - c)^1.5 * (1 - max(0, c - 0.03))^20

        where c is the share of the aspect ratio that the size crops: large, but with
        little more than 3 % cropped. Small budgets give several aspect ratios one size.

        Raises:
          ValueError: the budget does not hold one token of each latent frame.
        """
        return _classes(self, num_frames)

    def size_of(self, native: Size, num_frames: int) -> Size | None:
        """Returns the size of the clips of a video.

        It is the class that crops least, if this class crops at most 6 % and is not
        larger than the video. Other videos, small or of unusual aspect, have a size of
        their own, found as those of the classes are, and no larger than the video.

        Args:
          native: size of the video, as players show it.
          num_frames: of its clips.

        Returns:
          The size; None if the video is smaller than one token, or of an aspect of which
          no size within the budget shows half.

        Raises:
          ValueError: as for `classes`.
        """
        best = min(self.classes(num_frames), key=lambda size: cropped(native, size))
        fits = best[0] <= native[0] and best[1] <= native[1]
        if fits and cropped(native, best) <= _CROPPED:
            return best
        own = self._largest(native[1] / native[0], num_frames, native)
        return own if own and cropped(native, own) <= _MOST_CROPPED else None

    def _largest(self, aspect: float, num_frames: int, most: Size) -> Size | None:
        """The best size of an aspect ratio within the budget and `most`, if any."""
        m, room = self.multiple_of, self.max_tokens // _latent_frames(num_frames)
        # Higher ones are within the budget only if they crop a lot.
        highest = int(1.1 * math.sqrt(room / aspect)) + 1
        found = set()
        for rows in range(1, min(highest, most[0] // m) + 1):
            if widest := min(room // rows, most[1] // m):
                near = math.floor(rows * aspect), math.ceil(rows * aspect)
                found |= {(rows, min(max(1, columns), widest)) for columns in near}

        def value(size: Size) -> float:
            lost = cropped((1.0, aspect), size)
            beyond = max(0.0, lost - _ROUNDED)
            return math.prod(size) * (1 - lost) ** 1.5 * (1 - beyond) ** 20

        if not found:
            return None
        rows, columns = max(sorted(found), key=value)
        return rows * m, columns * m


def _latent_frames(num_frames: int) -> int:
    return 1 + (num_frames - 1) // 4


@functools.cache
def _classes(budget: Budget, num_frames: int) -> tuple[Size, ...]:
    if budget.max_tokens < (least := _latent_frames(num_frames)):
        raise ValueError(
            f"--max_tokens {budget.max_tokens} is too few for clips of {num_frames} "
            f"frames, which have at least {least} tokens"
        )
    side = budget.max_tokens * budget.multiple_of  # no size is higher or wider
    return tuple(budget._largest(w / h, num_frames, (side, side)) for w, h in ASPECTS)


def rate(native: float, max_fps: float) -> float:
    """Returns the frame rate of a video's clips: every k-th frame, so motion stays even.

    k is the least whole number for which native / k is at most 1.05 max_fps: with a limit
    of 30, 25 and 29.97 stay, 60 becomes 30 and 50 becomes 25.
    """
    return native / max(1, math.ceil(native / (_NEAR * max_fps)))


def pieces(count: int, lengths: Sequence[int]) -> list[int]:
    """Returns the lengths of the clips of so many adjacent frames, the longest first.

    Args:
      count: frames there are.
      lengths: that clips may have, descending.
    """
    result = []
    for length in lengths:
        whole, count = divmod(count, length)
        result += [length] * whole
    return result
