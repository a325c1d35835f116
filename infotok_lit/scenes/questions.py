"""Questions about scenes of one to four objects, with their answers."""

from collections import Counter
from typing import Literal, get_args

import numpy as np

from infotok_lit.scenes.generator import Scene, SceneObject, Slot, draw_scene, fits_split
from infotok_lit.scenes.grammar import NUMBERS, PLURALS
from infotok_lit.scenes.spec import COLOURS, HELD_OUT_COMBINATIONS, SHAPES, SceneSpec, Split, place_name

QuestionKind = Literal["existence", "counting", "attribute", "size", "place", "relation", "description"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
DESCRIBE = "describe the image."


def draw_question(
    rng: np.random.Generator, spec: SceneSpec, split: Split, kind: QuestionKind
) -> tuple[Scene, str, str]:
    """A scene, a question about it and the answer. Yes and no are equally likely, and so are the counts.

    A scene that admits no unambiguous question of the kind is drawn again.
    """
    least = 2 if kind == "relation" else 1
    number = int(rng.integers(least, spec.max_objects + 1))
    count = int(rng.integers(1, number + 1)) if kind != "counting" else int(rng.integers(1, spec.max_objects + 1))
    number = max(number, count)
    while True:
        target = SHAPES[rng.integers(len(SHAPES))]
        slots = _counting_slots(rng, target, count, number) if kind == "counting" else [Slot()] * number
        scene = draw_scene(rng, spec, slots)
        if not fits_split(scene, spec, split):
            continue
        if kind == "counting":
            return scene, f"how many {PLURALS[target]} are there?", NUMBERS[count - 1]
        pair = _ask(rng, scene, spec, split, kind)
        if pair is not None:
            return scene, *pair


def question_kind(question: str) -> QuestionKind | None:
    """The kind of a question of this grammar, None for any other text."""
    if question == DESCRIBE:
        return "description"
    if question.startswith("is the "):
        return "size" if question.endswith(" large or small?") else "relation"
    starts: dict[str, QuestionKind] = {
        "is there a ": "existence",
        "how many ": "counting",
        "what colour is the ": "attribute",
        "what shape is the ": "attribute",
        "where is the ": "place",
    }
    return next((kind for start, kind in starts.items() if question.startswith(start)), None)


def describe_scene(scene: Scene, spec: SceneSpec) -> str:
    """Every object in reading order, e.g. "a large red circle top left and a small blue square bottom right"."""
    names = [f"a {o.size} {o.colour} {o.shape} {place_name(o.cell, spec.cells)}" for o in scene.objects]
    return " and ".join(names)


def _counting_slots(rng: np.random.Generator, target: str, count: int, number: int) -> list[Slot]:
    others = [shape for shape in SHAPES if shape != target]
    return [Slot(target)] * count + [Slot(others[rng.integers(len(others))]) for _ in range(number - count)]


def _ask(
    rng: np.random.Generator, scene: Scene, spec: SceneSpec, split: Split, kind: QuestionKind
) -> tuple[str, str] | None:
    if kind == "existence":
        return _ask_existence(rng, scene, split)
    if kind == "attribute":
        return _ask_attribute(rng, scene)
    if kind == "size":
        return _ask_size(rng, scene)
    if kind == "place":
        return _ask_place(rng, scene, spec)
    if kind == "relation":
        return _ask_relation(rng, scene)
    return DESCRIBE, describe_scene(scene, spec)


def _ask_existence(rng: np.random.Generator, scene: Scene, split: Split) -> tuple[str, str] | None:
    present = sorted({(o.colour, o.shape) for o in scene.objects})
    if rng.integers(2):
        colour, shape = present[rng.integers(len(present))]
        return f"is there a {colour} {shape}?", "yes"
    # Outside "held_out" a held-out pair is never present: asking for it would teach that it never is.
    banned = set(present) | (set() if split == "held_out" else HELD_OUT_COMBINATIONS)
    colours, shapes = {o.colour for o in scene.objects}, {o.shape for o in scene.objects}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in banned]
    # Half of the absent pairs share a colour or a shape with an object, as in POPE's adversarial setting.
    near = [(colour, shape) for colour, shape in absent if colour in colours or shape in shapes]
    pool = near if near and rng.integers(2) else absent
    colour, shape = pool[rng.integers(len(pool))]
    return f"is there a {colour} {shape}?", "no"


def _ask_attribute(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    shapes = Counter(o.shape for o in scene.objects)
    colours = Counter(o.colour for o in scene.objects)
    pairs = [(f"what colour is the {o.shape}?", o.colour) for o in scene.objects if shapes[o.shape] == 1]
    pairs += [(f"what shape is the {o.colour} object?", o.shape) for o in scene.objects if colours[o.colour] == 1]
    return pairs[rng.integers(len(pairs))] if pairs else None


def _unique(scene: Scene) -> list[SceneObject]:
    """The objects that their colour and shape name unambiguously."""
    names = Counter((o.colour, o.shape) for o in scene.objects)
    return [o for o in scene.objects if names[o.colour, o.shape] == 1]


def _ask_size(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    objects = _unique(scene)
    if not objects:
        return None
    chosen = objects[rng.integers(len(objects))]
    return f"is the {chosen.colour} {chosen.shape} large or small?", chosen.size


def _ask_place(rng: np.random.Generator, scene: Scene, spec: SceneSpec) -> tuple[str, str] | None:
    objects = _unique(scene)
    if not objects:
        return None
    chosen = objects[rng.integers(len(objects))]
    return f"where is the {chosen.colour} {chosen.shape}?", place_name(chosen.cell, spec.cells)


def _ask_relation(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    objects = _unique(scene)
    pairs = [
        (a, b) for a in objects for b in objects if a is not b and (a.cell[0] == b.cell[0] or a.cell[1] == b.cell[1])
    ]
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    axis = 1 if first.cell[0] == second.cell[0] else 0
    relations = ("left of", "right of") if axis == 1 else ("above", "below")
    is_true = bool(rng.integers(2))
    relation = relations[(first.cell[axis] > second.cell[axis]) == is_true]
    question = f"is the {first.colour} {first.shape} {relation} the {second.colour} {second.shape}?"
    return question, "yes" if is_true else "no"
