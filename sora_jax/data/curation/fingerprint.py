"""What a clip looks like in few bytes, so that copies of it are recognised.

At four times of a clip, spread over its length, the fingerprint has

- a perceptual hash of 64 bits: of the 64 lowest frequencies of the frame's brightness,
  without its mean, which are above their median;
- a thumbnail of 8 x 8 pixels.

Coding, scaling, brightness and cropping of a few per cent change few bits. Mirrored clips,
heavy crops, and windows of a film that start at other times are not recognised.

Letters: k times, t time, h height, w width, c channel, n and m clips, b bits.
"""

import base64
import dataclasses
from typing import Any

import numpy as np
import PIL.Image
from scipy import fft

from sora_jax.data.curation import pixels

VERSION = 1
TIMES, BITS = 4, 256  # of a clip
_SIDE, _FREQUENCIES, _THUMBNAIL = 32, 8, 8
# Squared levels of 255 by which thumbnails may differ without any meaning.
_NOISE = 4.0
# Largest difference of the mean colour: common to all channels, and beyond that.
_BRIGHTNESS, _TINT = 64, 24


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of one clip.

    Attributes:
      hash: 64 hexadecimal digits, 256 bits.
      thumbnail_khwc: uint8[4, 8, 8, 3].
    """

    hash: str
    thumbnail_khwc: np.ndarray

    @property
    def signs(self) -> np.ndarray:
        """The bits of the hash as float32[256] of -1 and 1."""
        return signs(self.hash)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` inverts it."""
        thumbnail = base64.b64encode(self.thumbnail_khwc.tobytes()).decode()
        return {"hash": self.hash, "thumbnail": thumbnail}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Fingerprint":
        """The fingerprint that `to_json` gave."""
        raw = np.frombuffer(base64.b64decode(fields["thumbnail"]), np.uint8)
        return cls(fields["hash"], raw.reshape(TIMES, _THUMBNAIL, _THUMBNAIL, 3))


def signs(text: str) -> np.ndarray:
    """Returns the bits of a hash of 64 hexadecimal digits as float32[256]: -1 or 1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return 2 * bits.astype(np.float32) - 1


def differing_bits(one_nb: np.ndarray, other_mb: np.ndarray) -> np.ndarray:
    """Returns how many bits of hashes differ, float32[n, m]; both given by `signs`."""
    # A product of +-1 sums exactly; BLAS is several times faster than counting bits.
    return (BITS - one_nb @ other_mb.T) / 2


def of(frames_thwc: np.ndarray) -> Fingerprint:
    """Returns the fingerprint of a clip uint8[t, h, w, c]."""
    at = np.round((np.arange(TIMES) + 0.5) / TIMES * (len(frames_thwc) - 1))
    seen = frames_thwc[at.astype(int)]
    above = np.concatenate([_above_median(frame_hwc) for frame_hwc in seen])
    thumbnail = np.stack([_resized(frame_hwc, _THUMBNAIL) for frame_hwc in seen])
    return Fingerprint(np.packbits(above).tobytes().hex(), thumbnail)


def _resized(frame_hwc: np.ndarray, side: int) -> np.ndarray:
    picture = PIL.Image.fromarray(np.ascontiguousarray(frame_hwc))
    # The mean of what a pixel covers, also where it is less than one pixel.
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.BILINEAR))


def _above_median(frame_hwc: np.ndarray) -> np.ndarray:
    grey_hw = pixels.grey(_resized(frame_hwc, _SIDE)[None])[0]
    waves_hw = fft.dctn(grey_hw, norm="ortho")
    low = waves_hw[:_FREQUENCIES, :_FREQUENCIES].ravel()
    low[0] = waves_hw[0, _FREQUENCIES]  # in place of the mean
    # Waves of less than half a level are noise; a flat frame has no bits.
    low = np.round(255 * low / _SIDE * 2)
    return low > np.median(low)


def distances(one_khwc: np.ndarray, thumbnails_nkhwc: np.ndarray) -> np.ndarray:
    """Returns how much clips differ from one: from 0 (equal) to 2, by their thumbnails.

    One minus the correlation of their pixels, without the mean of each colour, where
    noise of two levels counts as equal:

        1 - (a . b + m s^2) / sqrt((a . a + m s^2) (b . b + m s^2)),   a, b of m numbers.

    It is infinite where mean colours differ by more than a shift of brightness explains.
    """
    one, many = one_khwc.astype(np.float32), thumbnails_nkhwc.astype(np.float32)
    mean, means = one.mean((0, 1, 2)), many.mean((1, 2, 3))
    a, b = (one - mean).ravel(), many - means[:, None, None, None]
    b = b.reshape(len(many), -1)
    noise = a.size * _NOISE
    within = np.sqrt((a @ a + noise) * ((b * b).sum(1) + noise))
    distance_n = 1 - (b @ a + noise) / within
    shift = means - mean
    common = shift.mean(1)
    tint = np.abs(shift - common[:, None]).max(1)
    far = (np.abs(common) > _BRIGHTNESS) | (tint > _TINT)
    return np.where(far, np.inf, distance_n)
