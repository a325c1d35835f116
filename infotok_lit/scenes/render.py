"""Renders a scene: saturated anti-aliased shapes over a grey texture."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.spec import PALETTE, RADIUS, SceneSpec, Shape

_SQUARE_SIDE = 0.88  # half side over radius: the square then covers about the circle's area
_CROSS_ARM = 0.32  # half width of an arm over radius
_TRIANGLE_BASE = 0.85  # distance of the base below the centre over radius; the apex is one radius above
NUM_WAVES = 4
MAX_FREQUENCY = np.pi / 2
"""Of a wave of the background, on each axis, in radians per pixel: half of what pixels can hold."""
_WAVE_SHARE = 0.6  # of the texture's amplitude; the rest is independent noise per pixel


def coverage(shape: Shape, radius: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers, in [0, 1].

    `y` and `x` are the pixel centres' offsets from the shape's centre in pixels and broadcast together. The share is
    taken from the signed distance to the outline, which is exact to first order for edges one pixel wide.
    """
    x = np.abs(x)
    if shape == "circle":
        distance = np.hypot(y, x) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(y), x) - _SQUARE_SIDE * radius
    elif shape == "triangle":
        rise = 1 + _TRIANGLE_BASE
        side = (rise * x - (y + radius)) / np.hypot(rise, 1.0)
        distance = np.maximum(side, y - _TRIANGLE_BASE * radius)
    elif shape == "cross":
        y = np.abs(y)
        arm = _CROSS_ARM * radius
        distance = np.minimum(np.maximum(y - radius, x - arm), np.maximum(y - arm, x - radius))
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.clip(0.5 - distance, 0.0, 1.0)


@lru_cache(maxsize=8)
def _pixel_centres(image_size: int) -> np.ndarray:
    return np.arange(image_size, dtype=np.float64) + 0.5


@dataclass(frozen=True)
class Texture:
    """The random numbers of a background, all independent and uniform over their ranges."""

    noise: np.ndarray
    """(image_size, image_size) in [-1, 1]."""
    frequency: np.ndarray
    """(2, waves) in [-MAX_FREQUENCY, MAX_FREQUENCY], radians per pixel down and across."""
    phase: np.ndarray
    """(waves,) in [0, 2 pi]."""

    def waves(self) -> np.ndarray:
        """(image_size, image_size): the sum of sin(frequency . pixel centre + phase), with a mean square of 1/2."""
        grid = _pixel_centres(len(self.noise))
        # sin(a + b) = sin a cos b + cos a sin b: a wave over the image from its two axes, as one matrix product.
        rows, columns = self.frequency[0, :, None] * grid + self.phase[:, None], self.frequency[1, :, None] * grid
        return (np.sin(rows).T @ np.cos(columns) + np.cos(rows).T @ np.sin(columns)) / NUM_WAVES**0.5


def draw_texture(image_size: int, seed: int) -> Texture:
    """The texture of a seed."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(-1, 1, (image_size, image_size))
    frequency = rng.uniform(-MAX_FREQUENCY, MAX_FREQUENCY, (2, NUM_WAVES))
    return Texture(noise, frequency, phase=rng.uniform(0, 2 * np.pi, NUM_WAVES))


def background(image_size: int, texture: float, seed: int) -> np.ndarray:
    """A grey texture (image_size, image_size) in [0, 255]: random plane waves plus noise, around mid grey."""
    drawn = draw_texture(image_size, seed)
    pattern = _WAVE_SHARE * drawn.waves() + (1 - _WAVE_SHARE) * drawn.noise
    return np.clip(127.5 * (1 + texture * pattern), 0, 255)


def render(scene: Scene, spec: SceneSpec) -> np.ndarray:
    """The image of a scene, (image_size, image_size, 3) uint8 RGB; a pure function of its arguments."""
    grey = background(spec.image_size, spec.texture, scene.texture_seed)
    image = np.repeat(np.round(grey)[..., None], 3, axis=2)
    grid = _pixel_centres(spec.image_size)
    for item in scene.objects:
        radius = RADIUS[item.size] * spec.cell_size
        top, left = (max(0, int(centre - radius - 1)) for centre in item.centre)
        bottom, right = (int(centre + radius + 2) for centre in item.centre)
        y = grid[top:bottom, None] - item.centre[0]
        x = grid[None, left:right] - item.centre[1]
        window = image[top:bottom, left:right]
        window += coverage(item.shape, radius, y, x)[..., None] * (np.array(PALETTE[item.colour]) - window)
    return np.round(image).astype(np.uint8)
