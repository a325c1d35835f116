"""Hard negatives: texts about a scene that differ from the true one in one attribute, and are false."""

import re
from collections.abc import Iterator
from dataclasses import replace

from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.grammar import NUMBERS, RELATIONS, Prompt, parse_caption, write_caption
from infotok_lit.scenes.parser import ParsedObject, satisfies
from infotok_lit.scenes.questions import DESCRIBE, describe_scene, question_kind
from infotok_lit.scenes.spec import COLOURS, SIZES, VOCABULARIES, SceneSpec, Split, place_name

_KINDS = [known.kinds for known in VOCABULARIES]
_PLURALS = [known.plurals for known in VOCABULARIES]
_CLASSES = (COLOURS, *_KINDS, *_PLURALS, SIZES, NUMBERS, RELATIONS, ("yes", "no"))
"""Words that stand for one another's attribute."""
_COUNTS = ("zero", *NUMBERS)
_COLOUR, _KIND, _PLURAL, _NOUN, _RELATION = (
    "|".join(words)
    for words in (COLOURS, sum(_KINDS, ()), sum(_PLURALS, ()), (known.noun for known in VOCABULARIES), RELATIONS)
)


def false_captions(scene: Scene, caption: str, spec: SceneSpec, split: Split) -> list[str]:
    """Every caption of the grammar that differs from a true one in one colour, kind, number or relation and is false.

    A full description has no false neighbour but those in which one word for an attribute of an object is another.

    Outside "held_out" none says what only "held_out" shows: that it is only ever said in vain would be learned.
    """
    if caption == describe_scene(scene, spec):
        return [text for text in _one_word_changed(caption) if _may_be_named(text, spec, split)]
    changed = [write_caption(prompt) for prompt in _changed(parse_caption(caption), spec)]
    return [text for text in changed if not is_shown(scene, text, spec) and _may_be_named(text, spec, split)]


def false_exchanges(scene: Scene, question: str, answer: str, spec: SceneSpec, split: Split) -> list[tuple[str, str]]:
    """Every question with its answer that differs from a true pair in one word for an attribute and is false.

    A question that the scene leaves open, because what it asks about is not there or not unique, is none of them.
    """
    found = []
    for text in _one_word_changed(f"{question}\n{answer}"):
        asked, answered = text.split("\n")
        truth = answer_question(scene, asked, spec)
        if truth not in (None, answered):
            found.append((asked, answered))
    if question_kind(question) == "place":
        found += [(question, place) for place in _neighbouring_places(answer, spec)]
    return [(asked, answered) for asked, answered in found if _may_be_named(_said(asked, answered), spec, split)]


def is_shown(scene: Scene, caption: str, spec: SceneSpec) -> bool:
    """Whether a caption is true of a scene, by the rule that drawn images are scored with."""
    objects = []
    for item in scene.objects:
        side = 2 * spec.radius(item.size)
        objects.append(ParsedObject(item.kind, item.colour, item.size, item.cell, item.centre, (side, side), 1.0))
    return satisfies(objects, parse_caption(caption))


def answer_question(scene: Scene, question: str, spec: SceneSpec) -> str | None:
    """The answer to a question of the grammar; None where the scene leaves it open, or for another text."""
    if question == DESCRIBE:
        return describe_scene(scene, spec)
    objects = scene.objects
    if match := re.fullmatch(rf"is there a ({_COLOUR}) ({_KIND})\?", question):
        return _yes(any((o.colour, o.kind) == match.groups() for o in objects))
    if match := re.fullmatch(rf"how many ({_PLURAL}) are there\?", question):
        return _COUNTS[sum(spec.vocabulary.plural(o.kind) == match[1] for o in objects)]
    if match := re.fullmatch(rf"what colour is the ({_KIND})\?", question):
        return _only([o.colour for o in objects if o.kind == match[1]])
    if match := re.fullmatch(rf"what (?:{_NOUN}) is the ({_COLOUR}) object\?", question):
        return _only([o.kind for o in objects if o.colour == match[1]])
    if match := re.fullmatch(rf"is the ({_COLOUR}) ({_KIND}) large or small\?", question):
        return _only([o.size for o in objects if (o.colour, o.kind) == match.groups()])
    if match := re.fullmatch(rf"where is the ({_COLOUR}) ({_KIND})\?", question):
        return _only([place_name(o.cell, spec.cells) for o in objects if (o.colour, o.kind) == match.groups()])
    if match := re.fullmatch(rf"is the ({_COLOUR}) ({_KIND}) ({_RELATION}) the ({_COLOUR}) ({_KIND})\?", question):
        return _related(scene, (match[1], match[2]), match[3], (match[4], match[5]))
    return None


def _related(scene: Scene, first: tuple[str, str], relation: str, second: tuple[str, str]) -> str | None:
    cells = [[o.cell for o in scene.objects if (o.colour, o.kind) == name] for name in (first, second)]
    if [len(found) for found in cells] != [1, 1]:
        return None
    (row, column), (other_row, other_column) = cells[0][0], cells[1][0]
    if (row == other_row) == (column == other_column):
        return None  # neither in one row nor in one column, or the same object twice
    before = {"left of": column < other_column, "right of": column > other_column}
    return _yes((before | {"above": row < other_row, "below": row > other_row})[relation])


def _changed(prompt: Prompt, spec: SceneSpec) -> Iterator[Prompt]:
    """Prompts that differ in one attribute; those that the grammar does not have are left out."""
    for i, mention in enumerate(prompt.objects):
        others = [replace(mention, kind=kind) for kind in spec.vocabulary.kinds if kind != mention.kind]
        if mention.colour is not None:
            others += [replace(mention, colour=colour) for colour in COLOURS if colour != mention.colour]
        for other in others:
            rest = prompt.objects[:i] + prompt.objects[i + 1 :]
            if all(other.kind != o.kind and (o.colour is None or other.colour != o.colour) for o in rest):
                yield replace(prompt, objects=(*prompt.objects[:i], other, *prompt.objects[i + 1 :]))
    if prompt.category == "counting":
        yield from (replace(prompt, count=n) for n in range(1, spec.max_objects + 1) if n != prompt.count)
    if prompt.relation is not None:
        yield from (replace(prompt, relation=relation) for relation in RELATIONS if relation != prompt.relation)


def _one_word_changed(text: str) -> Iterator[str]:
    for words in _CLASSES:
        for match in re.finditer(rf"\b({'|'.join(words)})\b", text):
            yield from (text[: match.start()] + word + text[match.end() :] for word in words if word != match[0])


def _neighbouring_places(place: str, spec: SceneSpec) -> list[str]:
    """The names of places that differ in one word."""
    names = [place_name((row, column), spec.cells) for row in range(spec.cells) for column in range(spec.cells)]
    alike = [name for name in names if len(name.split()) == len(place.split())]
    return [name for name in alike if sum(a != b for a, b in zip(name.split(), place.split(), strict=True)) == 1]


def _said(question: str, answer: str) -> str:
    """What a question and its answer say, with the two words side by side that they give one kind."""
    if match := re.fullmatch(rf"(?:what colour is the|how many) ({_KIND}|{_PLURAL})(?: are there)?\?", question):
        return f"{answer} {match[1]}"
    if match := re.fullmatch(rf"what (?:{_NOUN}) is the ({_COLOUR}) object\?", question):
        return f"{match[1]} {answer}"
    return f"{question} {answer}".replace("?", "")


def _may_be_named(text: str, spec: SceneSpec, split: Split) -> bool:
    unseen = (*spec.vocabulary.held_out, *_more_than_places(spec))
    return split == "held_out" or not any(f"{first} {second}" in text for first, second in unseen)


def _more_than_places(spec: SceneSpec) -> Iterator[tuple[str, str]]:
    """Numbers of a kind of which one would have to lie where the kind is held out."""
    cells = [(row, column) for row in range(spec.cells) for column in range(spec.cells)]
    for kind in spec.vocabulary.kinds:
        room = sum((kind, place_name(cell, spec.cells)) not in spec.vocabulary.held_out_placements for cell in cells)
        yield from ((number, spec.vocabulary.plural(kind)) for number in NUMBERS[room:])


def _only(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else None


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"
