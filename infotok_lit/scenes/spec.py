"""What a scene is made of: shapes, colours, sizes, places, and what is held out from training."""

from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["circle", "square", "triangle", "cross"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Size = Literal["small", "large"]
Split = Literal["train", "val", "held_out"]
Cell = tuple[int, int]
"""(row, column) of the grid of places, from the top left."""

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
SPLITS: tuple[Split, ...] = get_args(Split)

PALETTE: dict[Colour, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "green": (25, 175, 40),
    "blue": (30, 60, 235),
    "yellow": (240, 215, 20),
    "purple": (185, 35, 215),
    "cyan": (20, 205, 215),
}
"""RGB in [0, 255]. Hues are about 50 degrees or more apart, so the nearest one survives blur and noise."""

RADIUS: dict[Size, float] = {"small": 0.27, "large": 0.39}
"""Half the width of an object, as a fraction of its cell."""

HELD_OUT_COMBINATIONS: frozenset[tuple[Colour, Shape]] = frozenset(
    {("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")}
)
"""Never drawn, nor asked for, in the splits "train" and "val"."""

HELD_OUT_PLACEMENTS: frozenset[tuple[Shape, str]] = frozenset({("triangle", "top left"), ("cross", "bottom right")})
"""(shape, place) pairs never drawn in the splits "train" and "val"."""

_ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}


@dataclass(frozen=True)
class SceneSpec:
    """The parameters of a family of scenes.

    Args:
        image_size: height and width in pixels.
        cells: the places are a grid of cells x cells; 2 or 3.
        jitter: the most pixels that an object's centre moves from its cell's centre, on each axis.
        texture: strength of the grey background texture, from 0 (flat) to 1 (full range).
        sizes: the object sizes that occur.
        max_objects: the most objects in a scene, 2 to 4.
    """

    image_size: int = 32
    cells: int = 2
    jitter: float = 1.0
    texture: float = 0.3
    sizes: tuple[Size, ...] = SIZES
    max_objects: int = 4

    def __post_init__(self) -> None:
        if self.cells not in _ROWS:
            raise ValueError(f"cells must be 2 or 3, got {self.cells}")
        if not 0 <= self.texture <= 1:
            raise ValueError(f"texture must lie in [0, 1], got {self.texture}")
        if not self.sizes or not set(self.sizes) <= set(SIZES):
            raise ValueError(f"sizes must be chosen from {SIZES}, got {self.sizes}")
        if not 2 <= self.max_objects <= 4:
            raise ValueError(f"max_objects must be 2, 3 or 4, got {self.max_objects}")
        room = self.cell_size * (0.5 - max(RADIUS[size] for size in self.sizes))
        if not 0 <= self.jitter <= room:
            raise ValueError(f"jitter must lie in [0, {room:.2f}] px, or objects leave their cells; got {self.jitter}")

    @property
    def cell_size(self) -> float:
        """Width of a cell in pixels."""
        return self.image_size / self.cells


SPECS: dict[str, SceneSpec] = {
    "scenes32": SceneSpec(jitter=0.5, texture=0.2),
    "scenes64": SceneSpec(image_size=64, cells=3, jitter=1.5, texture=0.5),
}


def place_name(cell: Cell, cells: int) -> str:
    """The words for a cell, e.g. (0, 1) -> "top right"; the middle of a 3x3 grid is "middle"."""
    row, column = _ROWS[cells][cell[0]], _COLUMNS[cells][cell[1]]
    return row if row == column else f"{row} {column}"
