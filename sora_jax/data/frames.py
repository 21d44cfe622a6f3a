"""Decoded frames as they are meant to be seen: upright, of square pixels, in BT.709.

All pixels of external video pass through this module, so that training and evaluation see
what a player shows.

Letters: h height, w width, c channel (RGB). Pixels are uint8.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sora_jax.data import colour

# How special frames are converted; part of a data set's settings.
RULES = {"hdr": colour.TONE_MAP, "interlaced": "bwdif", "transparent": "on black"}
INTERLACED = "interlaced, made progressive by bwdif"
TRANSPARENT = "transparent in places, laid on black"


class Refused(Exception):
    """A reason not to read a file; `containers.boundary` adds the file's name."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """How to turn stored pixels upright: a transposition, then reversals."""

    transposed: bool = False
    reversed_rows: bool = False
    reversed_columns: bool = False

    def __call__(self, picture_hwc: np.ndarray) -> np.ndarray:
        if self.transposed:
            picture_hwc = picture_hwc.transpose(1, 0, 2)
        rows, columns = (
            slice(None, None, -1 if backwards else 1)
            for backwards in (self.reversed_rows, self.reversed_columns)
        )
        return picture_hwc[rows, columns]


def turn_of(frame) -> Turn:
    """Reads a frame's display matrix: rotation to the nearest quarter, and mirroring.

    The matrix [a, b, u, c, d, v, x, y, w] maps stored column p and row q to displayed
    column a p + c q + x and row b p + d q + y.
    """
    try:
        kinds = {side.type.name for side in frame.side_data}
    except ValueError:
        # PyAV cannot list side data that has a kind unknown to it.
        quarters = round(frame.rotation / 90) % 4
        return Turn(quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3))
    if "DISPLAYMATRIX" not in kinds:
        return Turn()
    numbers = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    a, b, c, d = numbers[[0, 1, 3, 4]].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, b < 0, c < 0)
    return Turn(False, d < 0, a < 0)


def aspect_of(stream) -> float:
    """The width of a pixel over its height, by the container or else the codec."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    ratio = float(ratio or 1)
    return ratio if 0.1 <= ratio <= 10 else 1.0


class View:
    """Converts the frames of one stream to pictures; `notes` says what was done.

    Args:
      turn: see `turn_of`.
      aspect: see `aspect_of`.
      untagged: one of `colour.MATRICES` for untagged frames; None: by their size.
      reformatter: PyAV's; shared by all frames, as making one costs more than decoding.
    """

    def __init__(self, turn: Turn, aspect: float, untagged: str | None, reformatter):
        self._turn, self._aspect, self._untagged = turn, aspect, untagged
        self._reformatter = reformatter
        self._plans = {}
        self.notes: set[str] = set()

    def check_colours(self, frame) -> None:
        """Raises Refused if the frame's colours are not supported."""
        self._plan(frame)

    def size(self, frame) -> tuple[int, int]:
        """(height, width) of the whole picture, without losing pixels."""
        height, width = self._square(frame)
        return (width, height) if self._turn.transposed else (height, width)

    def _square(self, frame) -> tuple[int, int]:
        if self._aspect >= 1:
            return frame.height, round(frame.width * self._aspect)
        return round(frame.height / self._aspect), frame.width

    def whole(self, frame) -> np.ndarray:
        """The picture uint8[h, w, 3] of a frame at its full size."""
        picture_hwc = self._rgb(frame, *self._square(frame), _BICUBIC)
        return np.ascontiguousarray(self._turn(picture_hwc))

    def fit(self, frame, size: tuple[int, int]) -> np.ndarray:
        """The picture scaled to cover (height, width) and cropped to its centre."""
        height, width = size[::-1] if self._turn.transposed else size
        wide = frame.width * self._aspect
        scale = max(width / wide, height / frame.height)
        picture_hwc = self._rgb(
            frame,
            max(height, round(frame.height * scale)),
            max(width, round(wide * scale)),
            _AREA if scale < 1 else _BICUBIC,
        )
        top = (picture_hwc.shape[0] - height) // 2
        left = (picture_hwc.shape[1] - width) // 2
        picture_hwc = picture_hwc[top : top + height, left : left + width]
        return np.ascontiguousarray(self._turn(picture_hwc))

    def _rgb(self, frame, height: int, width: int, filter: int) -> np.ndarray:
        plan = self._plan(frame)
        as_stored = (frame.height, frame.width) == (height, width) and plan.usual
        if as_stored and frame.format.name == "gbrp":
            return frame.to_ndarray()
        picture_hwc = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=plan.kind,
            src_colorspace=plan.matrix,
            interpolation=filter if as_stored else filter | _EXACT,
        ).to_ndarray()
        alpha_hw1 = picture_hwc[..., 3:]
        if plan.convert:
            picture_hwc = colour.convert(picture_hwc[..., :3], *plan.convert)
        if plan.alpha:
            peak = np.iinfo(alpha_hw1.dtype).max
            picture_hwc, transparent = on_black(picture_hwc[..., :3], alpha_hw1 / peak)
            if transparent:
                self.notes.add(TRANSPARENT)
        return picture_hwc

    def _plan(self, frame) -> "_Plan":
        key = (
            frame.format.name,
            frame.width,
            frame.height,
            frame.colorspace,
            frame.color_primaries,
            frame.color_trc,
        )
        if key not in self._plans:
            self._plans[key] = self._new_plan(frame)
        return self._plans[key]

    def _new_plan(self, frame) -> "_Plan":
        matrix = said = frame.colorspace
        kind = frame.format
        if kind.is_rgb or kind.has_palette or len(kind.components) < 3:
            matrix = said = 0
        elif said in (0, 2, 3):
            name = self._untagged or colour.untagged(frame.height, frame.width)
            said = colour.MATRICES[name]
            self.notes.add(f"with untagged colours, read as {name}")
        try:
            convert = colour.settle(said, frame.color_primaries, frame.color_trc)
        except ValueError as error:
            raise Refused(f"{error}, which is not supported") from None
        if convert == (1, 1):
            convert = None
        else:
            self.notes.add(colour.describe(*convert))
        alpha = kind.has_palette or any(part.is_alpha for part in kind.components)
        kinds = ("rgba64le", "rgb48le") if convert else ("rgba", "rgb24")
        return _Plan(
            matrix=_SWSCALE.get(said) if matrix != 0 else None,
            convert=convert,
            alpha=alpha,
            kind=kinds[0] if alpha else kinds[1],
            usual=not convert and not alpha and kind.components[0].bits == 8,
        )


# Flags of libswscale: filters, and accurate rounding with full chroma, which is slower
# than its shortcut for 8 bits without scaling.
_BICUBIC, _AREA, _EXACT = 4, 0x20, 0x40000 | 0x2000
# Names of matrices for FFmpeg's scaler, whose numbers differ from H.273's.
_SWSCALE = {
    1: "ITU709",
    4: "FCC",
    5: "ITU601",
    6: "ITU601",
    7: "SMPTE240M",
    9: "BT2020",
}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How frames of one kind become RGB.

    Attributes:
      matrix: name of their colour matrix; None for RGB and grey.
      convert: primaries and transfer for `colour.convert`; None if not needed.
      alpha: whether they can be transparent.
      kind: FFmpeg's pixel format to convert to.
      usual: whether they are 8-bit and need no other conversion.
    """

    matrix: str | None
    convert: tuple[int, int] | None
    alpha: bool
    kind: str
    usual: bool


def gather(
    pictures: Iterable[np.ndarray],
    shrink: Callable[[np.ndarray], np.ndarray] | None,
    most: int,
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Collects the pictures of a clip, each shrunk as soon as it arrives.

    Returns:
      The pictures, and their (height, width) before shrinking.

    Raises:
      Refused: there are none, they differ in size, or have more than `most` pixels.
    """
    gathered, size, pixels = [], None, 0
    for picture_hwc in pictures:
        size = size or picture_hwc.shape[:2]
        if picture_hwc.shape[:2] != size:
            raise Refused(f"its frames change from {size} to {picture_hwc.shape[:2]}")
        picture_hwc = shrink(picture_hwc) if shrink else picture_hwc
        pixels += picture_hwc.shape[0] * picture_hwc.shape[1]
        if pixels > most:
            raise Refused(f"it has more than {most} pixels in total")
        gathered.append(picture_hwc)
    if size is None:
        raise Refused("it has no frames")
    return gathered, size


def on_black(picture_hwc: np.ndarray, alpha_hw1: np.ndarray) -> tuple[np.ndarray, bool]:
    """Composites a picture uint8 on black; also returns whether any of it is transparent.

    Args:
      picture_hwc: the colours, not multiplied by opacity.
      alpha_hw1: opacity from 0 to 1.
    """
    if alpha_hw1.min() == 1:
        return picture_hwc, False
    return np.round(picture_hwc * alpha_hw1).astype(np.uint8), True
