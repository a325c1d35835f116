"""From tensors to pictures: levels of grey and colour, and grids of images with words under them."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 160
"""Side of a tile in pixels, unless a grid has its own."""
LINE = 12
"""Height of a line of text in pixels."""
CHARACTERS = 26
"""Characters in a line below such a tile."""
MARGIN = 6


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, height, width) in [-1, 1] -> (B, height, width, 3) uint8, rounding as Harmon's official code does."""
    levels = (127.5 * images.detach().float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def captioned_grid(
    images: Sequence[np.ndarray], texts: Sequence[str], columns: int = 4, tile: int = TILE
) -> Image.Image:
    """Images (height, width, 3) uint8 in a grid of equal tiles, `tile` pixels wide, each with its text below."""
    lines = [textwrap.wrap(text, CHARACTERS * tile // TILE) or [""] for text in texts]
    height = tile + MARGIN + LINE * max(len(wrapped) for wrapped in lines)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (tile + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=LINE - 2)
    for i, (image, wrapped) in enumerate(zip(images, lines, strict=True)):
        left = MARGIN + (i % columns) * (tile + MARGIN)
        top = MARGIN + (i // columns) * (height + MARGIN)
        canvas.paste(_tile(image, tile), (left, top))
        pen.multiline_text((left, top + tile + 2), "\n".join(wrapped), fill="black", font=font, spacing=1)
    return canvas


def _tile(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    # Small images keep their pixels visible; large ones are smoothed.
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
