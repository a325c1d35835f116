"""The pixels of a decoded frame: opaque, and turned as its file asks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from infotok_lit.data.image_file import to_rgb

MATRIX = "DISPLAYMATRIX"
"""Under which name a frame keeps its display matrix: 3 x 3 integers; x' = m0 x + m3 y and y' = m1 x + m4 y."""

HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of HDR, by their numbers in ITU-T H.273."""


def not_kept(stream: Any) -> Iterator[str]:
    """In words, what of a video's look is lost in frames of square pixels with 8 bits."""
    if (aspect := stream.sample_aspect_ratio or 1) != 1:
        shape = f"{float(aspect):.3g} times as wide as high"
        yield f"shows its pixels {shape}, which is not kept: scale it to square ones first"
    if curve := HDR.get(stream.codec_context.color_trc):
        yield f"has HDR colours ({curve}), which are not kept, and look pale: convert it to SDR first"


def upright(frame: Any, size: dict[str, int]) -> np.ndarray:
    """A decoded frame as uint8 (H, W, 3) RGB, turned and mirrored as its file asks; what it lets through is white.

    Args:
        frame: PyAV's.
        size: the width and height to scale it to, before it is turned.
    """
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba", **size))))
    else:
        pixels = frame.to_ndarray(format="rgb24", **size)
    matrix = frame.side_data.get(MATRIX)
    return pixels if matrix is None else np.ascontiguousarray(turned(pixels, bytes(matrix)))


def turned(pixels: np.ndarray, matrix: bytes) -> np.ndarray:
    """(H, W, C) turned and mirrored by a display matrix, or by the quarter turn that is nearest to it."""
    x_from_x, y_from_x, _, x_from_y, y_from_y = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    if abs(x_from_x) >= abs(y_from_x):
        right, down = x_from_x, y_from_y
    else:  # rows become columns
        pixels = pixels.swapaxes(0, 1)
        right, down = x_from_y, y_from_x
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
