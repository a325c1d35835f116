"""Moving Scenes: clips of objects that move, appear and collide over a texture, with exact truth.

A clip's difficulty is known: how many objects there are, how fast they move, and whether the background moves too. Easy
clips have one or two slow objects over a still background; hard ones have four to six fast ones over one that drifts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from infotok_lit.errors import SettingsError
from infotok_lit.video.clips import Clip, ClipSource

Difficulty = Literal["easy", "hard", "mixed"]
Split = Literal["train", "val"]

PALETTE = ((225, 25, 30), (25, 175, 40), (30, 60, 235), (240, 215, 20), (185, 35, 215), (20, 205, 215))
"""RGB in [0, 255]."""
SHAPES = ("circle", "square", "triangle")
NUM_WAVES = 4
MIN_WAVELENGTH = 16
"""Of a wave of the background along each axis, in pixels."""
_SPLIT_SEEDS: dict[Split, int] = {"train": 0, "val": 1}
_PLACING_ATTEMPTS = 200


@dataclass(frozen=True)
class ClipTruth:
    """Everything that happens in a clip of T frames with n objects; pixels are counted from the top left corner."""

    shapes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    radii: np.ndarray
    """(n,): half widths in pixels."""
    centres: np.ndarray
    """(T, n, 2): y and x in pixels."""
    visible: np.ndarray
    """(T, n) bool: False before an object appears."""
    collisions: tuple[tuple[int, int, int], ...]
    """(frame, object, object) where two objects bounced off each other on the way to that frame."""
    drift: tuple[float, float]
    """By how many pixels the background moves in a frame, down and right."""

    @property
    def motion(self) -> float:
        """The mean over frames of the sum of the speeds of visible objects, in pixels a frame."""
        if len(self.centres) < 2:
            return 0.0
        speed = np.linalg.norm(np.diff(self.centres, axis=0), axis=-1)
        return float((speed * self.visible[1:]).sum(1).mean())


@dataclass(frozen=True)
class ClipSpec:
    """What may be in a clip.

    Args:
        objects: the fewest and the most objects.
        speed: the least and the greatest speed at the start, in pixels a frame.
        drift: the greatest speed of the background on each axis, in pixels a frame.
        texture: strength of the background's pattern, in [0, 1].
        late: the chance that an object appears later than in the first frame.
    """

    objects: tuple[int, int]
    speed: tuple[float, float]
    drift: float
    texture: float = 0.2
    late: float = 0.25


SPECS: dict[str, ClipSpec] = {
    "easy": ClipSpec(objects=(1, 2), speed=(0.0, 1.0), drift=0.0),
    "hard": ClipSpec(objects=(4, 6), speed=(1.5, 4.0), drift=1.5),
}


class MovingScenes(ClipSource):
    """Clips that are drawn when they are asked for; the same index gives the same clip everywhere."""

    def __init__(
        self, split: Split = "train", difficulty: Difficulty = "mixed", num_clips: int = 20_000, side: int = 64
    ) -> None:
        """
        Args:
            split: `train` and `val` share no clip.
            difficulty: `mixed` takes turns.
            num_clips: how many there are.
            side: height and width in pixels, 32 or more.
        """
        if num_clips < 1 or side < 32:
            raise SettingsError(f"num_clips must be 1 or more and side 32 or more, got {num_clips} and {side}")
        self._split, self._difficulty, self._num_clips, self._side = split, difficulty, num_clips, side

    def __len__(self) -> int:
        return self._num_clips

    def clip(self, index: int, frames: int, rng: np.random.Generator) -> Clip:
        """The index-th clip; `rng` changes nothing."""
        truth, pixels = self.draw(index, frames)
        return Clip(pixels, f"moving scene {self._split}/{index}")

    def draw(self, index: int, frames: int) -> tuple[ClipTruth, np.ndarray]:
        """The truth of a clip, and its frames (T, side, side, 3) uint8."""
        rng = np.random.default_rng([_SPLIT_SEEDS[self._split], index])
        name = self._difficulty if self._difficulty != "mixed" else ("easy", "hard")[index % 2]
        return draw_clip(SPECS[name], frames, self._side, rng)


def draw_clip(spec: ClipSpec, frames: int, side: int, rng: np.random.Generator) -> tuple[ClipTruth, np.ndarray]:
    """A random clip of a kind: its truth, and its frames (T, side, side, 3) uint8."""
    truth = _draw_truth(spec, frames, side, rng)
    return truth, render_clip(truth, _texture(side, spec.texture, rng), side)


def _draw_truth(spec: ClipSpec, frames: int, side: int, rng: np.random.Generator) -> ClipTruth:
    count = int(rng.integers(spec.objects[0], spec.objects[1] + 1))
    radii = rng.uniform(0.07, 0.12, count) * side
    angle, speed = rng.uniform(0, 2 * np.pi, count), rng.uniform(*spec.speed, count)
    velocity = speed[:, None] * np.stack((np.sin(angle), np.cos(angle)), axis=-1)
    late = rng.random(count) < spec.late
    first = np.where(late, rng.integers(0, max(1, frames), count), 0)
    centres, collisions = _move(_place(radii, side, rng), velocity, radii, first, frames, side)
    drift = rng.uniform(-spec.drift, spec.drift, 2)
    return ClipTruth(
        shapes=tuple(SHAPES[i] for i in rng.integers(len(SHAPES), size=count)),
        colours=tuple(PALETTE[i] for i in rng.integers(len(PALETTE), size=count)),
        radii=radii,
        centres=centres,
        visible=np.arange(frames)[:, None] >= first,
        collisions=collisions,
        drift=(float(drift[0]), float(drift[1])),
    )


def _place(radii: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (n, 2) at which no two objects touch, if such are found."""
    for _ in range(_PLACING_ATTEMPTS):
        centres = rng.uniform(radii[:, None], side - radii[:, None], (len(radii), 2))
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) - radii[:, None] - radii[None]
        if (gaps[np.triu_indices(len(radii), 1)] > 0).all():
            break
    return centres


def _move(
    start: np.ndarray, velocity: np.ndarray, radii: np.ndarray, first: np.ndarray, frames: int, side: int
) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
    """Centres (T, n, 2) of equal masses that bounce off the walls and each other, and the collisions.

    An object that appears late waits at its start till then.
    """
    position, velocity = start.copy(), velocity.copy()
    centres, collisions = [position.copy()], []
    for frame in range(1, frames):
        there = first < frame
        position = position + velocity * there[:, None]
        low, high = radii[:, None], side - radii[:, None]
        velocity = np.where(position < low, np.abs(velocity), np.where(position > high, -np.abs(velocity), velocity))
        position = np.clip(position, low, high)
        for i, j in zip(*np.triu_indices(len(radii), 1), strict=True):
            apart = position[i] - position[j]
            distance = np.linalg.norm(apart)
            normal = apart / max(distance, 1e-9)
            approach = (velocity[i] - velocity[j]) @ normal
            if there[i] and there[j] and distance < radii[i] + radii[j] and approach < 0:
                velocity[i] -= approach * normal
                velocity[j] += approach * normal
                collisions.append((frame, int(i), int(j)))
        centres.append(position.copy())
    return np.stack(centres)[:frames], tuple(collisions)


def _texture(side: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A grey pattern (2 side, 2 side) in [0, 255] that can be rolled without a seam: plane waves around mid grey."""
    period = 2 * side
    grid = 2 * np.pi * np.arange(period) / period
    waves = np.zeros((period, period))
    highest = period // MIN_WAVELENGTH
    for down, right in rng.integers(-highest, highest + 1, (NUM_WAVES, 2)):
        waves += np.sin(down * grid[:, None] + right * grid[None] + rng.uniform(0, 2 * np.pi))
    return 127.5 * (1 + strength * waves / NUM_WAVES**0.5)


def render_clip(truth: ClipTruth, texture: np.ndarray, side: int) -> np.ndarray:
    """The frames (T, side, side, 3) uint8 of a clip; a pure function of its arguments."""
    frames = []
    grid = np.arange(side) + 0.5
    for number, (centres, visible) in enumerate(zip(truth.centres, truth.visible, strict=True)):
        shift = tuple(round(number * speed) for speed in truth.drift)
        grey = np.roll(texture, shift, axis=(0, 1))[:side, :side]
        image = np.repeat(grey[..., None], 3, axis=-1)
        for i in np.flatnonzero(visible):
            y, x = grid[:, None] - centres[i, 0], grid[None] - centres[i, 1]
            share = _coverage(truth.shapes[i], truth.radii[i], y, x)[..., None]
            image += share * (np.array(truth.colours[i]) - image)
        frames.append(np.clip(np.round(image), 0, 255).astype(np.uint8))
    return np.stack(frames)


def _coverage(shape: str, radius: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The share of each pixel that a shape covers, from the signed distance to its outline."""
    if shape == "circle":
        distance = np.hypot(y, x) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(y), np.abs(x)) - 0.88 * radius
    else:
        side = (1.85 * np.abs(x) - (y + radius)) / np.hypot(1.85, 1.0)
        distance = np.maximum(side, y - 0.85 * radius)
    return np.clip(0.5 - distance, 0.0, 1.0)
