"""The language of captions: six categories as in GenEval, written and read back exactly."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from infotok_lit.scenes.generator import Scene, Slot, draw_scene, fits_split, has_held_out_combination
from infotok_lit.scenes.spec import COLOURS, VOCABULARIES, Cell, Colour, Kind, SceneSpec, Split, Vocabulary

Category = Literal["single_object", "two_objects", "counting", "colors", "position", "color_attribution"]
Relation = Literal["left of", "right of", "above", "below"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
NUMBERS = ("one", "two", "three", "four")

_COLOURED = ("colors", "position", "color_attribution")
_PAIRS = ("two_objects", "position", "color_attribution")
_SINGULAR = {plural: kind for known in VOCABULARIES for kind, plural in zip(known.kinds, known.plurals, strict=True)}
_KINDS = tuple(_SINGULAR.values())
_OBJECT = rf"a (?:({'|'.join(COLOURS)}) )?({'|'.join(_KINDS)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join((*_KINDS, *_SINGULAR))})")
_PHRASE = re.compile(rf"{_OBJECT}(?: (and|{'|'.join(RELATIONS)}) {_OBJECT})?")


@dataclass(frozen=True)
class Mention:
    """An object as a caption names it; `colour` is None where the caption leaves it open."""

    kind: Kind
    colour: Colour | None = None


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for: `count` of the one object, or the two objects, the first `relation` the second.

    Raises:
        ValueError: the combination is not in the grammar.
    """

    category: Category
    objects: tuple[Mention, ...]
    count: int = 1
    relation: Relation | None = None

    def __post_init__(self) -> None:
        kinds = {mention.kind for mention in self.objects}
        colours = {mention.colour for mention in self.objects}
        number = 2 if self.category in _PAIRS else 1
        coloured = self.category in _COLOURED
        valid = (
            len(self.objects) == len(kinds) == number
            and any(kinds <= set(known.kinds) for known in VOCABULARIES)
            and ((None not in colours and len(colours) == number) if coloured else colours == {None})
            and (1 <= self.count <= len(NUMBERS) if self.category == "counting" else self.count == 1)
            and (self.relation is not None) == (self.category == "position")
        )
        if not valid:
            raise ValueError(f"not a prompt of the Scenes grammar: {self.category}, {self.objects}, {self.count}")

    @property
    def vocabulary(self) -> Vocabulary:
        """What its objects are of."""
        return next(known for known in VOCABULARIES if self.objects[0].kind in known.kinds)


def write_caption(prompt: Prompt) -> str:
    """The caption of a prompt, in lower case."""
    if prompt.category == "counting":
        kind = prompt.objects[0].kind
        return f"{NUMBERS[prompt.count - 1]} {kind if prompt.count == 1 else prompt.vocabulary.plural(kind)}"
    names = [" ".join(filter(None, ("a", mention.colour, mention.kind))) for mention in prompt.objects]
    return f" {prompt.relation or 'and'} ".join(names)


def parse_caption(caption: str) -> Prompt:
    """The prompt that a caption was written from: the inverse of `write_caption`.

    Raises:
        ValueError: the caption is not in the grammar.
    """
    prompt = _parse_count(caption) or _parse_phrase(caption)
    if prompt is None or write_caption(prompt) != caption:
        raise ValueError(f"not a caption of the Scenes grammar: {caption!r}")
    return prompt


def _parse_count(caption: str) -> Prompt | None:
    match = _COUNT.fullmatch(caption)
    if match is None:
        return None
    kind = _SINGULAR.get(match[2], match[2])
    return Prompt("counting", (Mention(kind),), count=NUMBERS.index(match[1]) + 1)


def _parse_phrase(caption: str) -> Prompt | None:
    match = _PHRASE.fullmatch(caption)
    if match is None:
        return None
    first, link, second = Mention(match[2], match[1]), match[3], match[5]
    if link is None:
        return Prompt("colors" if first.colour else "single_object", (first,))
    objects = (first, Mention(second, match[4]))
    if link == "and":
        return Prompt("color_attribution" if first.colour else "two_objects", objects)
    return Prompt("position", objects, relation=link)


def draw_prompt(rng: np.random.Generator, spec: SceneSpec, category: Category) -> Prompt:
    """A prompt drawn uniformly from those of a category that a family of scenes can show."""
    number = 2 if category in _PAIRS else 1
    known = spec.vocabulary.kinds
    kinds = [known[i] for i in rng.permutation(len(known))[:number]]
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:number]] if category in _COLOURED else [None] * number
    return Prompt(
        category,
        tuple(Mention(kind, colour) for kind, colour in zip(kinds, colours, strict=True)),
        count=int(rng.integers(spec.max_objects)) + 1 if category == "counting" else 1,
        relation=RELATIONS[rng.integers(len(RELATIONS))] if category == "position" else None,
    )


def draw_captioned_scene(
    rng: np.random.Generator, spec: SceneSpec, split: Split, category: Category
) -> tuple[Prompt, Scene]:
    """A prompt, then a scene that shows what the prompt asks for and nothing else.

    In the split "held_out", a prompt that names colours names a held-out combination: the caption itself then asks
    for something that was never shown.
    """
    while True:
        prompt = draw_prompt(rng, spec, category)
        scene = draw_scene(rng, spec, split, _slots(rng, prompt, spec.cells))
        hidden = split == "held_out" and category in _COLOURED and not has_held_out_combination(scene, spec)
        if fits_split(scene, spec, split) and not hidden:
            return prompt, scene


def _slots(rng: np.random.Generator, prompt: Prompt, cells: int) -> list[Slot]:
    slots = [Slot(mention.kind, mention.colour) for mention in prompt.objects] * prompt.count
    if prompt.relation is None:
        return slots
    first, second = _related_cells(rng, prompt.relation, cells)
    return [Slot(slots[0].kind, slots[0].colour, first), Slot(slots[1].kind, slots[1].colour, second)]


def _related_cells(rng: np.random.Generator, relation: Relation, cells: int) -> tuple[Cell, Cell]:
    """Two cells of one row or one column such that the first is `relation` the second."""
    line = int(rng.integers(cells))
    near, far = sorted(int(number) for number in rng.permutation(cells)[:2])
    pair = ((line, near), (line, far)) if relation in ("left of", "right of") else ((near, line), (far, line))
    return pair if relation in ("left of", "above") else pair[::-1]
