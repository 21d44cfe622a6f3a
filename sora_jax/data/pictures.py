"""Still pictures as they are meant to be seen: upright, opaque, 8 bits, in sRGB.

Letters: h height, w width, c channel (RGB).
"""

import io
import os
import warnings

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import PIL.PngImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sora_jax.data import containers, frames

# Suffixes of frame files.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Imported here: Pillow imports a format's code when it first reads a file, and gives the
# format up for good if that fails, as it may where memory is limited.
_READERS = (PngImageFile, JpegImageFile, WebPImageFile, BmpImageFile, GifImageFile)
_FORMATS = tuple(reader.format for reader in _READERS)


def read_image(
    path: str | os.PathLike,
    limits: containers.Limits = containers.DEFAULT_LIMITS,
    notes: set[str] | None = None,
) -> np.ndarray:
    """Reads a picture (PNG, JPEG, WebP, BMP, GIF) as uint8[h, w, 3].

    It is rotated by its EXIF data, 16 bits become 8, colours of an ICC profile are
    converted to sRGB, and transparent parts are put on black, which `notes` records.

    Raises:
      UnreadableVideo: it is not a picture, is damaged, or is beyond the limits.
    """
    with containers.boundary(path), warnings.catch_warnings():
        # Pillow only warns of a picture that unpacks to something huge.
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            opened = PIL.Image.open(path, formats=_FORMATS)
        except PIL.UnidentifiedImageError:
            raise frames.Refused(f"it is not a {', '.join(_FORMATS)} picture") from None
        with opened as image:
            containers.check_size(image.width, image.height, limits)
            profile = image.info.get("icc_profile")
            image = _eight_bits(PIL.ImageOps.exif_transpose(image))
            transparent = image.has_transparency_data
            alpha_hw1 = np.asarray(image.convert("RGBA"))[..., 3:] if transparent else 1
            if image.mode in ("1", "LA"):
                image = image.convert("L")
            elif image.mode not in ("L", "RGB", "CMYK"):
                image = image.convert("RGBA").convert("RGB")
            picture_hwc = np.asarray(_in_srgb(image, profile))
            if transparent:
                picture_hwc, seen = frames.on_black(picture_hwc, alpha_hw1 / 255)
                if seen and notes is not None:
                    notes.add(frames.TRANSPARENT)
            return picture_hwc


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales 16 bits of grey, which Pillow would cut off at 255; RGB comes with 8."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    grey_hw = np.asarray(image)
    scaled = PIL.Image.fromarray(
        ((grey_hw.astype(np.uint32) + 128) // 257).astype("u1")
    )
    transparent = image.info.get("transparency")
    if transparent is None:
        return scaled
    opaque = PIL.Image.fromarray((grey_hw != transparent).astype("u1") * 255)
    return PIL.Image.merge("LA", (scaled, opaque))


def _in_srgb(image: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """Brings colours to sRGB; without a profile that fits, or with a broken one, as is."""
    if profile:
        srgb = PIL.ImageCms.createProfile("sRGB")
        try:
            embedded = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return PIL.ImageCms.profileToProfile(
                image, embedded, srgb, outputMode="RGB"
            )
        except (PIL.ImageCms.PyCMSError, OSError):
            pass  # as browsers do
    return image.convert("RGB")


def encode_png(frame_hwc: np.ndarray, comment: str) -> bytes:
    """A PNG of uint8 [h, w, 3], with a comment."""
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("Comment", comment)
    out = io.BytesIO()
    PIL.Image.fromarray(frame_hwc).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def read_comment(path: str | os.PathLike) -> str | None:
    """The comment of a PNG; None if it has none.

    Raises:
      ValueError: it is not a PNG.
    """
    try:
        with PIL.Image.open(path, formats=("PNG",)) as opened:
            return opened.info.get("Comment")
    except (PIL.UnidentifiedImageError, SyntaxError, ValueError):
        raise ValueError(f"{path} is not a PNG picture") from None
