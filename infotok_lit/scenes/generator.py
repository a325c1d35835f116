"""Draws the objects of a scene: a random completion of partly specified objects that respects the split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infotok_lit.scenes.garments import photographs_of
from infotok_lit.scenes.spec import COLOURS, GARMENTS, Cell, Colour, Kind, SceneSpec, Size, Split, place_name


@dataclass(frozen=True)
class SceneObject:
    """One object; `centre` is (y, x) in pixels from the image's top left corner."""

    kind: Kind
    colour: Colour
    size: Size
    cell: Cell
    centre: tuple[float, float]
    photograph: int | None = None
    """Which photograph of its kind it is; None for what is not photographed."""


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image: the objects in reading order, and the seed of the background."""

    objects: tuple[SceneObject, ...]
    texture_seed: int


@dataclass(frozen=True)
class Slot:
    """A partly specified object; None is filled in at random."""

    kind: Kind | None = None
    colour: Colour | None = None
    cell: Cell | None = None


def draw_scene(rng: np.random.Generator, spec: SceneSpec, split: Split, slots: Sequence[Slot]) -> Scene:
    """A scene with exactly one object per slot, each in its own cell, uniform over what the slots leave open.

    The split decides which photographs there are, and nothing else: `fits_split` says whether it may show the scene.
    """
    taken = {slot.cell for slot in slots}
    order = [divmod(int(number), spec.cells) for number in rng.permutation(spec.cells**2)]
    free = iter([cell for cell in order if cell not in taken])
    objects = [_draw_object(rng, spec, split, slot, slot.cell or next(free)) for slot in slots]
    objects.sort(key=lambda item: item.cell)
    return Scene(tuple(objects), texture_seed=int(rng.integers(2**63)))


def _draw_object(rng: np.random.Generator, spec: SceneSpec, split: Split, slot: Slot, cell: Cell) -> SceneObject:
    shift_y, shift_x = rng.uniform(-spec.jitter, spec.jitter, 2)
    centre = ((cell[0] + 0.5) * spec.cell_size + shift_y, (cell[1] + 0.5) * spec.cell_size + shift_x)
    kinds = spec.vocabulary.kinds
    kind = slot.kind or kinds[rng.integers(len(kinds))]
    colour = slot.colour or COLOURS[rng.integers(len(COLOURS))]
    size = spec.sizes[rng.integers(len(spec.sizes))]
    photograph = None
    if spec.vocabulary is GARMENTS:
        shown = photographs_of(kind, split)
        photograph = shown[int(rng.integers(len(shown)))]
    return SceneObject(kind, colour, size, cell, (float(centre[0]), float(centre[1])), photograph)


def has_held_out_combination(scene: Scene, spec: SceneSpec) -> bool:
    """Whether an object has a held-out pair of colour and kind."""
    return any((item.colour, item.kind) in spec.vocabulary.held_out_combinations for item in scene.objects)


def has_held_out_placement(scene: Scene, spec: SceneSpec) -> bool:
    """Whether an object has a held-out pair of kind and place."""
    held_out = spec.vocabulary.held_out_placements
    return any((item.kind, place_name(item.cell, spec.cells)) in held_out for item in scene.objects)


def fits_split(scene: Scene, spec: SceneSpec, split: Split) -> bool:
    """Whether a scene may occur in a split: "held_out" scenes show something held out, the others nothing."""
    held_out = has_held_out_combination(scene, spec) or has_held_out_placement(scene, spec)
    return held_out == (split == "held_out")
