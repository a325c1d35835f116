"""Hard negatives of Scenes: one attribute away from the truth, and false, by other means than those that made them."""

from itertools import product

import pytest

from infotok_lit.scenes import Scenes
from infotok_lit.scenes.generator import Scene, SceneObject
from infotok_lit.scenes.grammar import CATEGORIES, parse_caption
from infotok_lit.scenes.negatives import answer_question, false_captions, false_exchanges
from infotok_lit.scenes.parser import score
from infotok_lit.scenes.questions import QUESTION_KINDS, describe_scene
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import GARMENTS, SHAPES, SPECS, SPLITS

SPEC = SPECS["scenes32"]
COUNT = 60


def thing(name: str, cell: tuple[int, int]) -> SceneObject:
    size, colour, shape = name.split()
    return SceneObject(shape, colour, size, cell, ((cell[0] + 0.5) * 16, (cell[1] + 0.5) * 16))


def scene(**cells: str) -> Scene:
    """Objects by place: top_left="large red circle", and so on."""
    places = {"top_left": (0, 0), "top_right": (0, 1), "bottom_left": (1, 0), "bottom_right": (1, 1)}
    return Scene(tuple(thing(name, places[place]) for place, name in cells.items()), texture_seed=0)


PAIR = scene(top_left="large red circle", top_right="small blue square")
THREE = scene(top_left="large red circle", bottom_left="small green circle", bottom_right="small blue square")


def attributes(caption: str) -> list[tuple]:
    prompt = parse_caption(caption)
    return [(prompt.count, prompt.relation), *((m.kind, m.colour) for m in prompt.objects)]


def names_held_out(text: str) -> bool:
    words = text.replace("?", "")
    return any(f"{first} {second}" in words for first, second in SHAPES.held_out | GARMENTS.held_out)


# Not the garments: their judge errs, and its word is no truth.
@pytest.mark.parametrize("spec", sorted(set(SPECS) - {"garments32"}))
@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_false_in_one_attribute(spec, split) -> None:
    """The truth is what the parser finds in the picture."""
    changed = set()
    for category in CATEGORIES:
        source = Scenes(spec, split, categories=(category,))
        for index in range(10):
            shown, caption, _ = source.draw("generation", index)
            image = render(shown, source.spec)
            assert score(image, parse_caption(caption), source.spec)
            negatives = source.hard_negatives("generation", index)
            assert len(set(negatives)) == len(negatives) >= 3
            for text in negatives:
                assert not score(image, parse_caption(text), source.spec), (caption, text)
                pairs = zip(attributes(caption), attributes(text), strict=True)
                differing = [i for old, new in pairs for i in range(2) if old[i] != new[i]]
                assert len(differing) == 1, (caption, text)
            changed |= {(category, len(text.split()) - len(caption.split())) for text in negatives}
            assert not any(map(names_held_out, negatives)) or split == "held_out"
    assert {category for category, _ in changed} == set(CATEGORIES)


def test_captions_by_hand() -> None:
    one = scene(top_left="large red circle")
    assert set(false_captions(one, "a circle", SPEC, "train")) == {"a square", "a triangle", "a cross"}
    assert set(false_captions(THREE, "two circles", SPEC, "train")) == {
        *("one circle", "three circles", "four circles"),
        *("two squares", "two triangles", "two crosses"),
    }
    # Blue circles, red triangles and yellow squares are held out; a red square is not, and none is there.
    assert set(false_captions(PAIR, "a red circle left of a blue square", SPEC, "train")) == {
        *(f"a red circle {relation} a blue square" for relation in ("right of", "above", "below")),
        *(f"a {colour} circle left of a blue square" for colour in ("green", "yellow", "purple", "cyan")),
        *(f"a red circle left of a {colour} square" for colour in ("green", "purple", "cyan")),
        "a red cross left of a blue square",
        *(f"a red circle left of a blue {shape}" for shape in ("triangle", "cross")),
    }


def test_what_is_true_as_well_is_no_negative() -> None:
    """Two of the pairs that differ by a colour are both there."""
    texts = false_captions(THREE, "a red circle and a blue square", SPEC, "held_out")
    assert "a purple circle and a blue square" in texts
    assert "a green circle and a blue square" not in texts


@pytest.mark.parametrize("spec", sorted(SPECS))
@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_questions_are_answered_as_when_they_were_drawn(spec, kind) -> None:
    for split in SPLITS:
        source = Scenes(spec, split, question_kinds=(kind,))
        for index in range(COUNT):
            shown, question, answer = source.draw("understanding", index)
            assert answer_question(shown, question, source.spec) == answer, question


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_exchanges_differ_in_one_word_and_name_nothing_held_out(kind) -> None:
    for spec, split in product(sorted(SPECS), SPLITS):
        source = Scenes(spec, split, question_kinds=(kind,))
        for index in range(10):
            _, question, answer = source.draw("understanding", index)
            truth = f"{question} {answer}".replace("left of", "left").replace("right of", "right").split()
            negatives = source.hard_negatives("understanding", index)
            # The middle's name has no place that differs from it in one word.
            assert len(set(negatives)) == len(negatives) >= (answer != "middle")
            for asked, answered in negatives:
                words = f"{asked} {answered}".replace("left of", "left").replace("right of", "right").split()
                assert sum(old != new for old, new in zip(truth, words, strict=True)) == 1
                assert not names_held_out(f"{asked} {answered}") or split == "held_out"


EXCHANGES = {
    ("is there a red circle?", "yes"): {
        ("is there a red circle?", "no"),
        *((f"is there a {colour} circle?", "yes") for colour in ("yellow", "purple", "cyan")),
        *((f"is there a red {shape}?", "yes") for shape in ("square", "cross")),
    },
    ("is there a red square?", "no"): {
        ("is there a red square?", "yes"),
        ("is there a red circle?", "no"),
        ("is there a blue square?", "no"),
    },
    ("how many circles are there?", "two"): {
        *(("how many circles are there?", number) for number in ("one", "three", "four")),
        *((f"how many {shapes} are there?", "two") for shapes in ("squares", "triangles", "crosses")),
    },
    # Two circles have two colours: which is meant is open.
    ("what colour is the square?", "blue"): {
        ("what colour is the square?", colour) for colour in ("red", "green", "purple", "cyan")
    },
    ("what shape is the blue object?", "square"): {
        *(("what shape is the blue object?", shape) for shape in ("triangle", "cross")),
        *((f"what shape is the {colour} object?", "square") for colour in ("red", "green")),
    },
    ("is the red circle large or small?", "large"): {
        ("is the red circle large or small?", "small"),
        ("is the green circle large or small?", "large"),
    },
    # Below is true, and red above blue is a diagonal: open.
    ("is the red circle above the green circle?", "yes"): {
        ("is the red circle above the green circle?", "no"),
        *((f"is the red circle {relation} the green circle?", "yes") for relation in ("left of", "right of", "below")),
    },
}


@pytest.mark.parametrize("spec", ["scenes32", "scenes64", "garments32"])
@pytest.mark.parametrize("kind", ["attribute", "counting"])
def test_what_is_said_in_vain_is_said_truly_elsewhere(spec, kind) -> None:
    """Else it would be learnt that no triangle is red, and that there are never four."""
    source = Scenes(spec, question_kinds=(kind,), categories=("counting",))
    asked = {source.draw("understanding", index)[1:] for index in range(3000)}
    assert {pair for index in range(100) for pair in source.hard_negatives("understanding", index)} <= asked
    named = {source.draw("generation", index)[1] for index in range(1000)}
    assert {text for index in range(100) for text in source.hard_negatives("generation", index)} <= named


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchanges_by_hand(exchange) -> None:
    assert set(false_exchanges(THREE, *exchange, SPEC, "train")) == EXCHANGES[exchange]


def test_a_description_is_false_once_any_word_is_changed() -> None:
    text = "a large red circle top left and a small blue square top right"
    found = false_exchanges(PAIR, "describe the image.", text, SPEC, "held_out")
    assert len(found) == 2 * (1 + 5 + 3)  # sizes, colours and shapes
    assert ("describe the image.", text.replace("large", "small")) in found
    assert ("describe the image.", text) not in found


def test_other_texts_have_no_answer() -> None:
    assert answer_question(PAIR, "what is this?", SPEC) is None
    assert answer_question(PAIR, "what colour is the cross?", SPEC) is None


def test_full_descriptions_are_changed_in_one_word_of_an_object():
    caption = "a large red circle top left and a small blue square top right"
    assert describe_scene(PAIR, SPEC) == caption
    texts = false_captions(PAIR, caption, SPEC, "held_out")
    assert len(texts) == len(set(texts)) == 2 * (1 + 5 + 3)  # sizes, colours, shapes of two objects
    for text in texts:
        changed = [pair for pair in zip(caption.split(), text.split(), strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1
    assert not any("blue circle" in text for text in false_captions(PAIR, caption, SPEC, "train"))


@pytest.mark.parametrize("spec", sorted(SPECS))
def test_dense_captions_have_false_neighbours(spec) -> None:
    source = Scenes(spec, dense_captions=1.0)
    for index in range(20):
        _, caption, _ = source.draw("generation", index)
        phrases = set(caption.split(" and "))
        negatives = source.hard_negatives("generation", index)
        assert len(set(negatives)) == len(negatives) > 4 * len(phrases)
        assert all(len(set(text.split(" and ")) - phrases) == 1 for text in negatives)
        assert not any(map(names_held_out, negatives))


def test_a_triangle_is_never_said_to_be_where_none_is_ever_shown() -> None:
    shown = scene(top_right="large red circle", bottom_left="small purple triangle")
    question = "where is the purple triangle?"
    places = {split: {a for _, a in false_exchanges(shown, question, "bottom left", SPEC, split)} for split in SPLITS}
    assert places == {"train": {"bottom right"}, "val": {"bottom right"}, "held_out": {"top left", "bottom right"}}
