"""Judges an image against a prompt as GenEval does (Ghosh et al. 2023), by the objects that a parser finds in it.

Shapes are found analytically, without any weights, and garments by their judge. How often the parser is right itself is
known: `metrics.parser_accuracy`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from infotok_lit.errors import SettingsError
from infotok_lit.scenes.grammar import Prompt, Relation
from infotok_lit.scenes.judge import judge_cells
from infotok_lit.scenes.render import coverage
from infotok_lit.scenes.spec import COLOURS, GARMENTS, PALETTE, Cell, Colour, Kind, SceneSpec, Size

MIN_SATURATION = 0.5
"""A pixel belongs to a colour from this share of the palette colour's saturation on."""
MIN_OVERLAP = 0.65
"""Intersection over union with the best template from which on a shape counts as recognised."""
_SPECK = 0.3  # a component below this share of the smallest template's area is noise
_SHIFTS = np.linspace(-1, 1, 5)  # pixels, on each axis, around the component's centre of mass
_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_SHRINK = 0.1  # GenEval: offsets within this share of the summed extents count as none
_MIN_COMPONENT = 0.5  # GenEval: a relation holds from this share of the offset on


@dataclass(frozen=True)
class ParsedObject:
    """An object found in an image; `kind` and `size` are None where none is recognised.

    `centre` (y, x) and `extent` (height, width) are in pixels; `confidence` in [0, 1] is the best template's
    intersection over union, or the judge's probability of the kind.
    """

    kind: Kind | None
    colour: Colour
    size: Size | None
    cell: Cell
    centre: tuple[float, float]
    extent: tuple[float, float]
    confidence: float


class _Templates(NamedTuple):
    images: np.ndarray  # (K, P, P) coverage, centre of mass near the middle pixel
    areas: np.ndarray  # (K,)
    centres: np.ndarray  # (K, 2) the shape's own centre relative to the middle pixel
    labels: list[tuple[Kind, Size]]  # K entries


def parse_image(image: np.ndarray, spec: SceneSpec) -> list[ParsedObject]:
    """The objects in an image (image_size, image_size, 3) uint8 RGB, in reading order of their cells.

    Raises:
        SettingsError: the image has another shape or type: the model that drew it has another size.
    """
    expected = (spec.image_size, spec.image_size, 3)
    if image.shape != expected or image.dtype != np.uint8:
        raise SettingsError(
            f"pictures of {spec.vocabulary.noun}s are judged at {spec.image_size} x {spec.image_size} pixels (uint8 "
            f"RGB), not {image.dtype} {image.shape}: set the model's image_size to {spec.image_size}, or the score of "
            "GeneratedImages to null"
        )
    found = _find_garments(image, spec) if spec.vocabulary is GARMENTS else _find_shapes(image, spec)
    return sorted(found, key=lambda item: (item.cell, item.centre))


def _find_garments(image: np.ndarray, spec: SceneSpec) -> list[ParsedObject]:
    """One object at most in a cell, in its middle and as large as it: the judge looks for no more."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    side = (spec.cell_size, spec.cell_size)
    found = []
    for number, (kind, colour, confidence) in enumerate(
        zip(*(v.tolist() for v in judge_cells(pixels, spec)), strict=True)
    ):
        row, column = divmod(number, spec.cells)
        if kind < len(GARMENTS.kinds):
            centre = ((row + 0.5) * spec.cell_size, (column + 0.5) * spec.cell_size)
            found.append(
                ParsedObject(GARMENTS.kinds[kind], COLOURS[colour], None, (row, column), centre, side, confidence)
            )
    return found


def _find_shapes(image: np.ndarray, spec: SceneSpec) -> list[ParsedObject]:
    nearest, saturation = _split_colours(image)
    if spec.distractors:
        # What blobs may reach counts for nothing.
        saturation = np.clip((saturation - spec.contrast) / (1 - spec.contrast), 0, 1)
    templates = _templates(spec)
    smallest = _SPECK * templates.areas.min()
    found = []
    for number, colour in enumerate(COLOURS):
        mine = nearest == number
        labels, count = ndimage.label(mine & (saturation >= MIN_SATURATION), _NEIGHBOURS)
        for label, box in enumerate(ndimage.find_objects(labels, count), start=1):
            core = labels == label
            if core.sum() < smallest:
                continue
            # The faint pixels of the anti-aliased edge belong to the object too.
            region = ndimage.binary_dilation(core, _NEIGHBOURS) & mine & (core | (labels == 0))
            extent = tuple(float(side.stop - side.start) for side in box)
            found.append(_recognise(np.where(region, saturation, 0), colour, extent, templates, spec))
    return found


def _split_colours(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel (H, W): the index of the palette colour of nearest hue, and the saturation relative to it, in [0, 1].

    A pixel that an object covers to a share `a` over grey has `a` times the colour's chroma, whatever the grey is: on
    clean renders the saturation *is* the coverage.
    """
    chroma = image - image.mean(axis=2, keepdims=True)
    palette = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float64)
    palette -= palette.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(palette, axis=1)
    projection = chroma @ (palette / norms[:, None]).T
    nearest = projection.argmax(axis=2)
    saturation = projection.max(axis=2) / norms[nearest]
    return nearest, np.clip(saturation, 0, 1).astype(np.float32)


@lru_cache(maxsize=8)
def _templates(spec: SceneSpec) -> _Templates:
    half = int(np.ceil(max(map(spec.radius, spec.sizes)))) + 3
    axis = np.arange(-half, half + 1, dtype=np.float64)
    images, centres, labels = [], [], []
    for shape in spec.vocabulary.kinds:
        for size in spec.sizes:
            radius = spec.radius(size)
            mass = coverage(shape, radius, axis[:, None], axis[None])
            offset = (mass.sum(axis=1) @ axis / mass.sum(), mass.sum(axis=0) @ axis / mass.sum())
            for centre in ((y - offset[0], x - offset[1]) for y in _SHIFTS for x in _SHIFTS):
                images.append(coverage(shape, radius, axis[:, None] - centre[0], axis[None] - centre[1]))
                centres.append(centre)
                labels.append((shape, size))
    stack = np.stack(images).astype(np.float32)
    return _Templates(stack, stack.sum(axis=(1, 2)), np.array(centres), labels)


def _recognise(
    mass: np.ndarray, colour: Colour, extent: tuple[float, float], templates: _Templates, spec: SceneSpec
) -> ParsedObject:
    """Matches one component, (H, W) in [0, 1] and zero outside it, against all templates."""
    total = mass.sum()
    grid = np.arange(spec.image_size)
    middle = (float(mass.sum(axis=1) @ grid / total), float(mass.sum(axis=0) @ grid / total))
    row, column = round(middle[0]), round(middle[1])
    half = templates.images.shape[1] // 2
    patch = np.pad(mass, half)[row : row + 2 * half + 1, column : column + 2 * half + 1]
    common = np.minimum(patch, templates.images).sum(axis=(1, 2))
    overlaps = common / (total + templates.areas - common)
    best = int(overlaps.argmax())
    known = overlaps[best] >= MIN_OVERLAP
    shape, size = templates.labels[best] if known else (None, None)
    shift = templates.centres[best]
    centre = (row + shift[0] + 0.5, column + shift[1] + 0.5) if known else (middle[0] + 0.5, middle[1] + 0.5)
    cell = tuple(min(max(int(value / spec.cell_size), 0), spec.cells - 1) for value in centre)
    return ParsedObject(shape, colour, size, cell, (float(centre[0]), float(centre[1])), extent, float(overlaps[best]))


# Whether they are what a prompt asks for


def score(image: np.ndarray, prompt: Prompt, spec: SceneSpec) -> bool:
    """Whether an image (image_size, image_size, 3) uint8 shows what a prompt asks for.

    Every named object must be found, in its colour where one is named; a count must be met exactly; a relation must
    hold between two matching objects. Other objects are not punished, as in GenEval.
    """
    return satisfies(parse_image(image, spec), prompt)


def satisfies(objects: list[ParsedObject], prompt: Prompt) -> bool:
    """Whether the objects found in an image meet a prompt."""
    matches = [
        [item for item in objects if item.kind == mention.kind and mention.colour in (None, item.colour)]
        for mention in prompt.objects
    ]
    if prompt.category == "counting":
        return len(matches[0]) == prompt.count
    if prompt.relation is None:
        return all(matches)
    return any(_holds(prompt.relation, first, second) for first in matches[0] for second in matches[1])


def _holds(relation: Relation, first: ParsedObject, second: ParsedObject) -> bool:
    """GenEval's rule: the offset, shrunk per axis by the extents, over the length of the raw offset."""
    offset = np.subtract(first.centre, second.centre)
    slack = _SHRINK * np.add(first.extent, second.extent)
    length = np.linalg.norm(offset)
    if length == 0:
        return False
    down, right = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0) / length
    component = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    return bool(component > _MIN_COMPONENT)
