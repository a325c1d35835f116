"""Questions about scenes of one to four objects, with their answers."""

from collections import Counter
from typing import Literal, get_args

import numpy as np

from infotok_lit.scenes.generator import Scene, SceneObject, Slot, draw_scene, fits_split
from infotok_lit.scenes.grammar import NUMBERS
from infotok_lit.scenes.spec import COLOURS, VOCABULARIES, Kind, SceneSpec, Split, place_name

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
    number, kinds = max(number, count), spec.vocabulary.kinds
    while True:
        target = kinds[rng.integers(len(kinds))]
        slots = _counting_slots(rng, kinds, target, count, number) if kind == "counting" else [Slot()] * number
        scene = draw_scene(rng, spec, split, slots)
        if not fits_split(scene, spec, split):
            continue
        if kind == "counting":
            return scene, f"how many {spec.vocabulary.plural(target)} are there?", NUMBERS[count - 1]
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
        **{f"what {known.noun} is the ": "attribute" for known in VOCABULARIES},
        "where is the ": "place",
    }
    return next((kind for start, kind in starts.items() if question.startswith(start)), None)


def describe_scene(scene: Scene, spec: SceneSpec) -> str:
    """Every object in reading order, e.g. "a large red circle top left and a small blue square bottom right"."""
    names = [f"a {o.size} {o.colour} {o.kind} {place_name(o.cell, spec.cells)}" for o in scene.objects]
    return " and ".join(names)


def _counting_slots(
    rng: np.random.Generator, kinds: tuple[Kind, ...], target: Kind, count: int, number: int
) -> list[Slot]:
    others = [kind for kind in kinds if kind != target]
    return [Slot(target)] * count + [Slot(others[rng.integers(len(others))]) for _ in range(number - count)]


def _ask(
    rng: np.random.Generator, scene: Scene, spec: SceneSpec, split: Split, kind: QuestionKind
) -> tuple[str, str] | None:
    if kind == "existence":
        return _ask_existence(rng, scene, spec, split)
    if kind == "attribute":
        return _ask_attribute(rng, scene, spec)
    if kind in ("size", "place"):
        objects = _unique(scene)
        if not objects:
            return None
        chosen = objects[rng.integers(len(objects))]
        name = f"the {chosen.colour} {chosen.kind}"
        if kind == "size":
            return f"is {name} large or small?", chosen.size
        return f"where is {name}?", place_name(chosen.cell, spec.cells)
    if kind == "relation":
        return _ask_relation(rng, scene)
    return DESCRIBE, describe_scene(scene, spec)


def _ask_existence(rng: np.random.Generator, scene: Scene, spec: SceneSpec, split: Split) -> tuple[str, str] | None:
    present = sorted({(o.colour, o.kind) for o in scene.objects})
    if rng.integers(2):
        colour, kind = present[rng.integers(len(present))]
        return f"is there a {colour} {kind}?", "yes"
    # Outside "held_out" a held-out pair is never present: asking for it would teach that it never is.
    banned = set(present) | (set() if split == "held_out" else spec.vocabulary.held_out_combinations)
    colours, kinds = {o.colour for o in scene.objects}, {o.kind for o in scene.objects}
    absent = [(colour, kind) for colour in COLOURS for kind in spec.vocabulary.kinds if (colour, kind) not in banned]
    # Half of the absent pairs share a colour or a kind with an object, as in POPE's adversarial setting.
    near = [(colour, kind) for colour, kind in absent if colour in colours or kind in kinds]
    pool = near if near and rng.integers(2) else absent
    colour, kind = pool[rng.integers(len(pool))]
    return f"is there a {colour} {kind}?", "no"


def _ask_attribute(rng: np.random.Generator, scene: Scene, spec: SceneSpec) -> tuple[str, str] | None:
    kinds = Counter(o.kind for o in scene.objects)
    colours = Counter(o.colour for o in scene.objects)
    noun = spec.vocabulary.noun
    pairs = [(f"what colour is the {o.kind}?", o.colour) for o in scene.objects if kinds[o.kind] == 1]
    pairs += [(f"what {noun} is the {o.colour} object?", o.kind) for o in scene.objects if colours[o.colour] == 1]
    return pairs[rng.integers(len(pairs))] if pairs else None


def _unique(scene: Scene) -> list[SceneObject]:
    """The objects that their colour and kind name unambiguously."""
    names = Counter((o.colour, o.kind) for o in scene.objects)
    return [o for o in scene.objects if names[o.colour, o.kind] == 1]


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
    question = f"is the {first.colour} {first.kind} {relation} the {second.colour} {second.kind}?"
    return question, "yes" if is_true else "no"
