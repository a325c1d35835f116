"""Renders a scene: saturated anti-aliased objects over a grey texture, and over blobs of colour in hard families."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from infotok_lit.scenes.garments import cut_out, photograph
from infotok_lit.scenes.generator import Scene, SceneObject
from infotok_lit.scenes.spec import COLOURS, GARMENTS, PALETTE, Kind, SceneSpec

_SQUARE_SIDE = 0.88  # half side over radius: the square then covers about the circle's area
_CROSS_ARM = 0.32  # half width of an arm over radius
_TRIANGLE_BASE = 0.85  # distance of the base below the centre over radius; the apex is one radius above
NUM_WAVES = 4
MAX_FREQUENCY = np.pi / 2
"""Of a wave of the background, on each axis, in radians per pixel: half of what pixels can hold."""
_BLOB = 0.35
"""Standard deviation of a distractor, in cells."""
_WAVE_SHARE = 0.6  # of the texture's amplitude; the rest is independent noise per pixel


def coverage(shape: Kind, radius: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
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


@dataclass(frozen=True)
class Distractors:
    """The random numbers of the blobs, all independent and uniform."""

    colour: np.ndarray
    """(count,) int64: index into COLOURS."""
    centre: np.ndarray
    """(count, 2) in [0, 1]: down and across, as shares of the image."""


def draw_distractors(count: int, seed: int) -> Distractors:
    """The distractors of a seed."""
    rng = np.random.default_rng([seed, 1])
    return Distractors(rng.integers(len(COLOURS), size=count), rng.uniform(0, 1, (count, 2)))


def distractor_shares(drawn: Distractors, spec: SceneSpec) -> np.ndarray:
    """(count, image_size, image_size) in [0, contrast]: how much of each pixel's colour is that of each blob.

    Blobs are Gaussian; where several meet they share, so that no place is nearer to their colours than `contrast`.
    """
    offsets = _pixel_centres(spec.image_size) - drawn.centre[..., None] * spec.image_size
    profile = np.exp(-0.5 * (offsets / (_BLOB * spec.cell_size)) ** 2)
    blobs = profile[:, 0, :, None] * profile[:, 1, None, :]
    return spec.contrast * blobs / np.maximum(blobs.sum(0), 1)


def render(scene: Scene, spec: SceneSpec) -> np.ndarray:
    """The image of a scene, (image_size, image_size, 3) uint8 RGB; a pure function of its arguments."""
    grey = background(spec.image_size, spec.texture, scene.texture_seed)
    image = np.repeat(np.round(grey)[..., None], 3, axis=2)
    if spec.distractors:
        drawn = draw_distractors(spec.distractors, scene.texture_seed)
        shares = distractor_shares(drawn, spec)
        colours = np.array([PALETTE[COLOURS[number]] for number in drawn.colour])
        image += np.tensordot(shares, colours, axes=(0, 0)) - shares.sum(0)[..., None] * image
    for item in scene.objects:
        radius = spec.radius(item.size)
        top, left = (max(0, int(centre - radius - 1)) for centre in item.centre)
        bottom, right = (min(spec.image_size, int(centre + radius + 2)) for centre in item.centre)
        seen, shade = _appearance(item, spec, (top, bottom), (left, right))
        window = image[top:bottom, left:right]
        window += seen[..., None] * (shade[..., None] * np.array(PALETTE[item.colour]) - window)
    return np.round(image).astype(np.uint8)


def _appearance(
    item: SceneObject, spec: SceneSpec, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The share of each pixel of a window that an object covers, and how bright its colour is there; in [0, 1]."""
    radius, (y, x) = spec.radius(item.size), item.centre
    if spec.vocabulary is GARMENTS:
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        return cut_out(photograph(item.kind, item.photograph), 2 * radius, (y - rows[0], x - columns[0]), shape)
    grid = _pixel_centres(spec.image_size)
    seen = coverage(item.kind, radius, grid[slice(*rows), None] - y, grid[None, slice(*columns)] - x)
    return seen, np.ones_like(seen)
