"""What a scene is made of: kinds of objects, colours, sizes, places, and what is held out from training."""

from dataclasses import dataclass
from typing import Literal, get_args

from infotok_lit.errors import SettingsError

Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Size = Literal["small", "large"]
Split = Literal["train", "val", "held_out"]
Cell = tuple[int, int]
"""(row, column) of the grid of places, from the top left."""

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

Kind = str
"""What an object is: one of the words of its vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """The objects of a family of scenes, and the words for them.

    Args:
        noun: what all of them are, as in "what shape is the red object?".
        kinds: the word for each.
        plurals: the same for several, in the same order.
        small: half the width of a small object, as a fraction of its cell.
        large: the same of a large one.
        held_out_combinations: pairs of colour and kind that are never drawn, nor asked for, in "train" and "val".
        held_out_placements: pairs of kind and place that are never drawn in "train" and "val".
    """

    noun: str
    kinds: tuple[Kind, ...]
    plurals: tuple[str, ...]
    small: float
    large: float
    held_out_combinations: frozenset[tuple[Colour, Kind]]
    held_out_placements: frozenset[tuple[Kind, str]]

    def plural(self, kind: Kind) -> str:
        """The word for several of a kind."""
        return self.plurals[self.kinds.index(kind)]

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """Words that follow one another in the texts of the split "held_out" alone."""
        return self.held_out_combinations | self.held_out_placements


SHAPES = Vocabulary(
    noun="shape",
    kinds=("circle", "square", "triangle", "cross"),
    plurals=("circles", "squares", "triangles", "crosses"),
    small=0.27,
    large=0.39,
    held_out_combinations=frozenset(
        {("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")}
    ),
    held_out_placements=frozenset({("triangle", "top left"), ("cross", "bottom right")}),
)
GARMENTS = Vocabulary(
    noun="garment",
    kinds=("shirt", "trouser", "dress", "shoe", "boot", "bag"),
    plurals=("shirts", "trousers", "dresses", "shoes", "boots", "bags"),
    small=0.36,
    large=0.48,
    held_out_combinations=frozenset(
        {
            ("red", "trouser"),
            ("green", "shoe"),
            ("blue", "bag"),
            ("yellow", "shirt"),
            ("purple", "boot"),
            ("cyan", "dress"),
        }
    ),
    held_out_placements=frozenset({("dress", "top left"), ("boot", "bottom right")}),
)
VOCABULARIES = (SHAPES, GARMENTS)
"""No word for a kind is in two of them, so that a text says which one it is of."""

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
        vocabulary: what the objects are.
        distractors: how many soft blobs in the objects' own colours lie over the texture, behind the objects.
        contrast: how far such a blob takes its middle from grey to its colour, in [0, 1).
    """

    image_size: int = 32
    cells: int = 2
    jitter: float = 1.0
    texture: float = 0.3
    sizes: tuple[Size, ...] = SIZES
    max_objects: int = 4
    vocabulary: Vocabulary = SHAPES
    distractors: int = 0
    contrast: float = 0.5

    def __post_init__(self) -> None:
        if self.cells not in _ROWS:
            raise SettingsError(f"cells must be 2 or 3, got {self.cells}")
        if not 0 <= self.texture <= 1:
            raise SettingsError(f"texture must lie in [0, 1], got {self.texture}")
        if not self.sizes or not set(self.sizes) <= set(SIZES):
            raise SettingsError(f"sizes must be chosen from {SIZES}, got {self.sizes}")
        if not 2 <= self.max_objects <= 4:
            raise SettingsError(f"max_objects must be 2, 3 or 4, got {self.max_objects}")
        if self.distractors < 0 or not 0 <= self.contrast < 1:
            raise SettingsError(
                f"distractors must not be negative and contrast lie in [0, 1), got {self.distractors}, {self.contrast}"
            )
        room = self.cell_size / 2 - max(map(self.radius, self.sizes))
        if not 0 <= self.jitter <= room:
            raise SettingsError(
                f"jitter must lie in [0, {room:.2f}] px, or objects leave their cells, not {self.jitter}"
            )

    @property
    def cell_size(self) -> float:
        """Width of a cell in pixels."""
        return self.image_size / self.cells

    def radius(self, size: Size) -> float:
        """Half the width of an object in pixels."""
        return self.cell_size * (self.vocabulary.small if size == "small" else self.vocabulary.large)


SpecName = Literal["scenes32", "scenes64", "scenes32_hard", "garments32"]
SPECS: dict[SpecName, SceneSpec] = {
    "scenes32": SceneSpec(jitter=0.5, texture=0.2),
    "scenes64": SceneSpec(image_size=64, cells=3, jitter=1.5, texture=0.5),
    "scenes32_hard": SceneSpec(jitter=0.5, texture=0.2, distractors=16, contrast=0.55),
    "garments32": SceneSpec(jitter=0.3, texture=0.2, vocabulary=GARMENTS),
}


def place_name(cell: Cell, cells: int) -> str:
    """The words for a cell, e.g. (0, 1) -> "top right"; the middle of a 3x3 grid is "middle"."""
    row, column = _ROWS[cells][cell[0]], _COLUMNS[cells][cell[1]]
    return row if row == column else f"{row} {column}"
