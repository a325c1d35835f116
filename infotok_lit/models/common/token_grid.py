"""The grid of tokens, or of latent positions, that an image is cut into."""

from infotok_lit.errors import SettingsError

Grid = tuple[int, int]
"""(rows, columns)."""


def token_grid(height: int, width: int, token_pixels: int) -> Grid:
    """The grid of an image size in pixels; SettingsError if a side is not a whole number of tokens."""
    if height % token_pixels or width % token_pixels:
        raise SettingsError(f"image size {height} x {width} is not a multiple of {token_pixels} pixels, the token size")
    return height // token_pixels, width // token_pixels
