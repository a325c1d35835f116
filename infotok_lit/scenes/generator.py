"""Draws the objects of a scene: a random completion of partly specified objects that respects the split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infotok_lit.scenes.spec import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_PLACEMENTS,
    SHAPES,
    Cell,
    Colour,
    SceneSpec,
    Shape,
    Size,
    Split,
    place_name,
)


@dataclass(frozen=True)
class SceneObject:
    """One object; `centre` is (y, x) in pixels from the image's top left corner."""

    shape: Shape
    colour: Colour
    size: Size
    cell: Cell
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image: the objects in reading order, and the seed of the background."""

    objects: tuple[SceneObject, ...]
    texture_seed: int


@dataclass(frozen=True)
class Slot:
    """A partly specified object; None is filled in at random."""

    shape: Shape | None = None
    colour: Colour | None = None
    cell: Cell | None = None


def draw_scene(rng: np.random.Generator, spec: SceneSpec, slots: Sequence[Slot]) -> Scene:
    """A scene with exactly one object per slot, each in its own cell, uniform over what the slots leave open."""
    taken = {slot.cell for slot in slots}
    order = [divmod(int(number), spec.cells) for number in rng.permutation(spec.cells**2)]
    free = iter([cell for cell in order if cell not in taken])
    objects = [_draw_object(rng, spec, slot, slot.cell or next(free)) for slot in slots]
    objects.sort(key=lambda item: item.cell)
    return Scene(tuple(objects), texture_seed=int(rng.integers(2**63)))


def _draw_object(rng: np.random.Generator, spec: SceneSpec, slot: Slot, cell: Cell) -> SceneObject:
    shift_y, shift_x = rng.uniform(-spec.jitter, spec.jitter, 2)
    centre = ((cell[0] + 0.5) * spec.cell_size + shift_y, (cell[1] + 0.5) * spec.cell_size + shift_x)
    return SceneObject(
        shape=slot.shape or SHAPES[rng.integers(len(SHAPES))],
        colour=slot.colour or COLOURS[rng.integers(len(COLOURS))],
        size=spec.sizes[rng.integers(len(spec.sizes))],
        cell=cell,
        centre=(float(centre[0]), float(centre[1])),
    )


def has_held_out_combination(scene: Scene) -> bool:
    """Whether an object has a held-out pair of colour and shape."""
    return any((item.colour, item.shape) in HELD_OUT_COMBINATIONS for item in scene.objects)


def has_held_out_placement(scene: Scene, spec: SceneSpec) -> bool:
    """Whether an object has a held-out pair of shape and place."""
    return any((item.shape, place_name(item.cell, spec.cells)) in HELD_OUT_PLACEMENTS for item in scene.objects)


def fits_split(scene: Scene, spec: SceneSpec, split: Split) -> bool:
    """Whether a scene may occur in a split: "held_out" scenes show something held out, the others nothing."""
    held_out = has_held_out_combination(scene) or has_held_out_placement(scene, spec)
    return held_out == (split == "held_out")
