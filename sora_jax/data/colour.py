"""Colours of video as numbers of BT.709: which matrix, wide gamut, and HDR to SDR.

Numbers of a picture are signals of BT.709, which screens take as they take sRGB. Video in
the wider primaries of BT.2020 or Display P3 is converted in linear light, and what BT.709
cannot show is cut off (ITU-R BT.2087). HDR, PQ or HLG, becomes light as a reference screen
of 1000 cd/m2 shows it, is compressed by the tone map of ITU-R BT.2390 to the reference
white of 203 cd/m2 (BT.2408), and coded for a screen of gamma 2.4 (BT.1886).

Codes are those of ITU-T H.273, as FFmpeg has them. Letters: h height, w width, c channel.
"""

from collections.abc import Callable

import numpy as np

# What `--colour` may say of video that does not say how its colours are coded.
MATRICES = {"bt601": 6, "bt709": 1, "bt2020": 9}
TONE_MAP = "ITU-R BT.2390, 1000 to 203 cd/m2"

_UNSAID = (2, 3)  # "unspecified", and "reserved", which some encoders write
_BT709, _BT2020, _DISPLAY_P3 = 1, 9, 12
_PQ, _HLG = 16, 18
_READABLE = {0, *_UNSAID, 1, 4, 5, 6, 7, 9}
# x and y of red, green and blue; white is D65 for all.
_PRIMARIES = {
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
# Transfer curves that no signal of a screen has: linear light, logarithms, cinema.
_NO_SIGNAL = (8, 9, 10, 17)
_PEAK, _WHITE = 1000.0, 203.0  # cd/m2


def untagged(height: int, width: int) -> str:
    """How players take video that does not say: by its size as stored."""
    return "bt709" if width >= 1280 or height > 576 else "bt601"


def settle(matrix: int, primaries: int, transfer: int) -> tuple[int, int]:
    """Returns primaries and transfer that a conversion is needed from; (1, 1) if none.

    Raises:
      ValueError: colours that cannot be read; the message says which.
    """
    if matrix not in _READABLE:
        raise ValueError(f"its colours are coded with matrix {matrix} of H.273")
    if transfer in _NO_SIGNAL:
        raise ValueError(f"its colours have the transfer curve {transfer} of H.273")
    hdr = transfer in (_PQ, _HLG)
    if primaries in _UNSAID and (hdr or matrix == _BT2020):
        primaries = _BT2020
    if primaries not in (_BT2020, _DISPLAY_P3):
        primaries = _BT709
    if primaries == _BT709 and not hdr:
        return _BT709, _BT709
    return primaries, transfer


def describe(primaries: int, transfer: int) -> str:
    """Says what `convert` does to colours."""
    if transfer in (_PQ, _HLG):
        kind = "PQ" if transfer == _PQ else "HLG"
        return f"in HDR ({kind}), converted to SDR by the tone map of {TONE_MAP}"
    name = "BT.2020" if primaries == _BT2020 else "Display P3"
    return f"in the wide gamut of {name}, converted to BT.709"


def convert(signal_hwc: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """Converts an RGB signal, uint16 of full range, to one of BT.709, uint8.

    Args:
      signal_hwc: uint16[h, w, 3]; 65535 is the nominal peak.
      primaries: see `settle`.
      transfer: see `settle`.
    """
    codes = np.arange(65536, dtype=np.float32) / 65535
    if transfer in (_PQ, _HLG):
        light = (pq_light if transfer == _PQ else _hlg_scene)(codes)
        light_hwc = light[signal_hwc]
        if transfer == _HLG:
            # The system gamma of a screen of 1000 cd/m2 is 1.2 (BT.2100).
            luminance = light_hwc @ _to_xyz(primaries)[1].astype(np.float32)
            light_hwc *= _PEAK * luminance[..., None] ** np.float32(0.2)
        brightest = light_hwc.max(-1, keepdims=True)
        light_hwc *= tone_map(brightest) / np.maximum(brightest, 1e-6) / _WHITE
        to_signal = _inverse_gamma(2.4)[1]
    else:
        to_light, to_signal = _CURVES.get(transfer, _CURVES[_BT709])
        light_hwc = to_light(codes)[signal_hwc]
    light_hwc = light_hwc @ gamut(primaries).T.astype(np.float32)
    signal = to_signal(np.clip(light_hwc, 0, 1, out=light_hwc))
    return (signal * 255 + 0.5).astype(np.uint8)


def gamut(primaries: int) -> np.ndarray:
    """Linear RGB of the given primaries to that of BT.709, float64[3, 3]."""
    return np.linalg.solve(_to_xyz(_BT709), _to_xyz(primaries))


def _to_xyz(primaries: int) -> np.ndarray:
    points = np.array([*_PRIMARIES[primaries], _D65])
    xyz = np.column_stack([points, 1 - points.sum(1)]) / points[:, 1:]
    return xyz[:3].T * np.linalg.solve(xyz[:3].T, xyz[3])


def tone_map(light: np.ndarray) -> np.ndarray:
    """Compresses 0 to 1000 cd/m2 to 0 to 203: BT.2390, section 5.4.1, black at 0."""
    source, target = pq_signal(np.array([_PEAK, _WHITE]))
    top = target / source
    knee = 1.5 * top - 0.5
    e = np.minimum(pq_signal(light) / source, 1)
    t = np.maximum(e - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
    spline += (3 * t**2 - 2 * t**3) * top
    return np.where(e < knee, light, pq_light(spline * source)).astype(light.dtype)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128


def pq_light(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: 0 to 1 to cd/m2."""
    e = signal ** (1 / _M2)
    return 10000 * (np.maximum(e - _C1, 0) / (_C2 - _C3 * e)) ** (1 / _M1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """Undoes `pq_light`."""
    y = (light / 10000) ** _M1
    return ((_C1 + _C2 * y) / (1 + _C3 * y)) ** _M2


def _hlg_scene(signal: np.ndarray) -> np.ndarray:
    """ARIB STD-B67: 0 to 1 to the light of the scene, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _power_with_toe(
    gain: float, power: float, slope: float, toe: float
) -> tuple[Callable, Callable]:
    """A curve of `slope` below `toe` of light, and of a power above; to light and back."""

    def to_light(e):
        return np.where(
            e < slope * toe, e / slope, ((e + gain - 1) / gain) ** (1 / power)
        )

    def to_signal(light):
        return np.where(light < toe, light * slope, gain * light**power - (gain - 1))

    return to_light, to_signal


def _inverse_gamma(gamma: float) -> tuple[Callable, Callable]:
    return (lambda e: e**gamma), (lambda light: light ** (1 / gamma))


# By code; those that are not here have the curve of BT.709.
_CURVES = {
    _BT709: _power_with_toe(1.09929682680944, 0.45, 4.5, 0.018053968510807),
    4: _inverse_gamma(2.2),
    5: _inverse_gamma(2.8),
    13: _power_with_toe(1.055, 1 / 2.4, 12.92, 0.0031308),
}
