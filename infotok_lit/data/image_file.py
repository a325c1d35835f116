"""Reads an image file of any common mode as RGB, or says in one sentence why it cannot be used."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from infotok_lit.batch import BrokenSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What Pillow may open: some of its other formats start programs, as EPS starts Ghostscript."""
MAX_PIXELS = 89_478_485
"""A quarter of a GiB as RGB: a file that unpacks to more is refused before it is decoded."""
MOST_PIXELS = 178_956_970
"""What Pillow decodes at most, whatever limit is set here."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the orientation that its EXIF states."""
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def read_image(
    source: Path | bytes,
    name: str | None = None,
    min_side: int = 9,
    max_aspect: float = 10.0,
    max_pixels: int = MAX_PIXELS,
    jpeg_draft: int | None = None,
) -> Image.Image:
    """Decode an image to RGB, upright and opaque.

    The EXIF rotation is applied; transparency is laid on white; 16-bit values are scaled to 8 bits; the first frame
    of an animation is taken.

    Args:
        source: The file, or its bytes.
        name: What errors call the image; default: the path.
        min_side: The smallest side in pixels that is accepted.
        max_aspect: The long side must be shorter than this many short sides.
        max_pixels: The largest number of pixels that is decoded.
        jpeg_draft: A JPEG is decoded to a half, a quarter or an eighth of its sides, if these keep so many pixels: its
            low frequencies are enough for that. The pixels differ slightly from those of decoding it whole.

    Raises:
        BrokenSampleError: The image cannot be read or is outside the limits; the message names it and the reason.
    """
    label = name if name is not None else "image" if isinstance(source, bytes) else str(source)
    with _opened(source, label, min_side, max_aspect, max_pixels) as image:
        if jpeg_draft is not None:
            image.draft(None, (jpeg_draft, jpeg_draft))
        return to_rgb(image)


def check_header(path: Path, min_side: int = 9, max_aspect: float = 10.0, max_pixels: int = MAX_PIXELS) -> None:
    """See by its first bytes, which is quick, whether a file is an image; errors and limits as for `read_image`."""
    with _opened(path, str(path), min_side, max_aspect, max_pixels):
        pass


@contextmanager
def _opened(
    source: Path | bytes, label: str, min_side: int, max_aspect: float, max_pixels: int
) -> Iterator[Image.Image]:
    """An image of which no pixel is decoded yet; whatever fails, then or within, is a BrokenSampleError."""
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise BrokenSampleError("a folder, a pipe or a device, not a file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_size(image.size, min_side, max_aspect, max_pixels)
            yield image
    except (
        Exception
    ) as error:  # decoders raise almost anything on damaged bytes: struct.error, SyntaxError, KeyError...
        raise BrokenSampleError(f"{label}: {_reason(source, error)}") from error


def _check_size(size: tuple[int, int], min_side: int, max_aspect: float, max_pixels: int) -> None:
    short, long = sorted(size)
    what = f"{size[0]}x{size[1]} pixels"
    if short < min_side:
        raise BrokenSampleError(f"{what}: the short side is under the limit of {min_side}")
    if long >= max_aspect * short:
        raise BrokenSampleError(f"{what}: the aspect ratio is not under the limit of {max_aspect:g}")
    if short * long > max_pixels:
        raise BrokenSampleError(f"{what}: more than the limit of {max_pixels} pixels in all")


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as `read_image` gives it: upright, opaque, in 8 bits.

    Raises:
        BrokenSampleError: for pixels that are floating-point numbers, negative or of more than 16 bits.
    """
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        # "I" is how 16-bit PGM and older PNG readers arrive: 32-bit storage, 16-bit range.
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenSampleError(
                "integers below 0 or of more than 16 bits have no agreed range; save the image with 8 or 16 bits"
            )
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenSampleError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. Pillow's own function also writes the other tags again, which odd ones end."""
    image.load()
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _reason(source: Path | bytes, error: Exception) -> str:
    """The same words for the same damage in every process: Pillow's own name memory addresses."""
    if isinstance(error, UnidentifiedImageError):
        is_empty = not source if isinstance(source, bytes) else source.stat().st_size == 0
        return "the file is empty" if is_empty else f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {source}"
    return str(error) or type(error).__name__
