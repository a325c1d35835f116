"""Where things are, for the decoders: sine-cosine vectors of places in an image and in a text, for any size.

Grids are measured in the unit of the image side, so that a coarse grid of tokens and a fine grid of latents agree on
what lies where.
"""

import math

import torch
from torch import Tensor

FINEST_GRID = 64
"""Cells per side that the shortest wavelength (two cells) still tells apart."""
LONGEST_TEXT = 10_000
"""Tokens, over 2 pi, of the longest wavelength in a text."""


def grid_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h * w, width): raster order; one half of the width says the row, the other the column."""
    # Wavelengths from two image sides, which never repeats within an image, down to two cells of the finest grid.
    frequencies = math.pi * FINEST_GRID ** torch.linspace(0, 1, width // 4, device=device)
    rows, columns = (
        _sinusoids((torch.arange(cells, device=device) + 0.5) / cells, frequencies).unsqueeze(1 - axis)
        for axis, cells in enumerate(grid)
    )
    return torch.cat([rows.expand(*grid, -1), columns.expand(*grid, -1)], dim=-1).flatten(0, 1)


def text_positions(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width): wavelengths from 2 pi tokens up."""
    frequencies = LONGEST_TEXT ** -torch.linspace(0, 1, width // 2, device=device)
    return _sinusoids(torch.arange(length, device=device), frequencies)


def _sinusoids(coordinates: Tensor, frequencies: Tensor) -> Tensor:
    angles = coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
