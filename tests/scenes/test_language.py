import itertools
import re
from collections import Counter

import pytest

from infotok_lit.scenes import Scenes
from infotok_lit.scenes.grammar import Mention, Prompt, parse_caption, write_caption
from infotok_lit.scenes.spec import SPECS

SHAPES = ("circle", "square", "triangle", "cross")
GARMENTS = ("shirt", "trouser", "dress", "shoe", "boot", "bag")
SINGULAR = {
    **{"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"},
    **{"shirts": "shirt", "trousers": "trouser", "dresses": "dress", "shoes": "shoe", "boots": "boot", "bags": "bag"},
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")


def is_related(first, relation: str, second) -> bool:
    """A relation read off the drawn centres, in pixels, not off the cells."""
    down, right = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    return {"left of": right < -5, "right of": right > 5, "above": down < -5, "below": down > 5}[relation]


def named(scene, name: str) -> list:
    words = set(name.split()) & {*COLOURS, *SHAPES, *GARMENTS}
    return [o for o in scene.objects if words <= {o.colour, o.kind}]


def caption_is_true(caption: str, scene) -> bool:
    """Reads a caption word by word and checks that the scene holds it and nothing else."""
    words = caption.split()
    if words[0] in NUMBERS:
        wanted = SINGULAR.get(words[1], words[1])
        return [o.kind for o in scene.objects] == [wanted] * (NUMBERS.index(words[0]) + 1)
    for link in (" and ", *(f" {relation} " for relation in RELATIONS)):
        if link in caption:
            first, second = (named(scene, part) for part in caption.split(link))
            alone = len(scene.objects) == 2 and len(first) == len(second) == 1 and first != second
            return alone and (link == " and " or is_related(first[0], link.strip(), second[0]))
    return len(scene.objects) == len(named(scene, caption)) == 1


@pytest.mark.parametrize("spec", sorted(SPECS))
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_are_true_of_their_scenes(spec, split):
    source = Scenes(spec, split)
    for index in range(600):
        scene, caption, _ = source.draw("generation", index)
        assert caption_is_true(caption, scene), (caption, scene)


def test_related_objects_share_a_row_or_a_column():
    source = Scenes("scenes64", categories=("position",))
    for index in range(200):
        first, second = source.draw("generation", index)[0].objects
        assert (first.cell[0] == second.cell[0]) != (first.cell[1] == second.cell[1])


def answer_is_true(question: str, answer: str, scene) -> bool:
    if question.startswith("is there a"):
        return (answer == "yes") == bool(named(scene, question.rstrip("?")))
    if question.startswith("how many"):
        wanted = SINGULAR[question.split()[2]]
        return NUMBERS.index(answer) + 1 == sum(o.kind == wanted for o in scene.objects)
    if question.startswith(("what colour", "what shape", "what garment")):
        (item,) = named(scene, question.rstrip("?"))
        return answer == (item.colour if "colour" in question else item.kind)
    if question.endswith("large or small?"):
        (item,) = named(scene, question)
        return answer == item.size
    match = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question)
    (first,), (second,) = named(scene, match[1]), named(scene, match[3])
    return (answer == "yes") == is_related(first, match[2], second)


@pytest.mark.parametrize("spec", sorted(SPECS))
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_true_of_their_scenes(spec, split):
    source = Scenes(spec, split, question_kinds=("existence", "counting", "attribute", "size", "relation"))
    for index in range(600):
        scene, question, answer = source.draw("understanding", index)
        assert answer_is_true(question, answer, scene), (question, answer, scene)


@pytest.mark.parametrize("spec", sorted(SPECS))
def test_places_are_those_of_the_centres(spec):
    source = Scenes(spec, question_kinds=("place",))
    rows, columns = {2: (("top", "bottom"), ("left", "right"))}.get(
        SPECS[spec].cells, (("top", "middle", "bottom"), ("left", "middle", "right"))
    )
    share = SPECS[spec].image_size / len(rows)
    for index in range(300):
        scene, question, answer = source.draw("understanding", index)
        (item,) = named(scene, question.removeprefix("where is the ").removesuffix("?"))
        words = (rows[int(item.centre[0] / share)], columns[int(item.centre[1] / share)])
        assert answer == ("middle" if words == ("middle", "middle") else " ".join(words))


@pytest.mark.parametrize("spec", sorted(SPECS))
def test_descriptions_name_every_object_in_reading_order(spec):
    source = Scenes(spec, question_kinds=("description",))
    size = SPECS[spec].image_size
    for index in range(200):
        scene, question, answer = source.draw("understanding", index)
        assert question == "describe the image."
        parts = answer.split(" and ")
        assert len(parts) == len(scene.objects)
        for part, item in zip(parts, scene.objects, strict=True):
            assert part.startswith(f"a {item.size} {item.colour} {item.kind} ")
            assert ("top" in part) == (item.centre[0] < size / SPECS[spec].cells)
            assert ("right" in part) == (item.centre[1] > size - size / SPECS[spec].cells)
        order = [(o.cell[0], o.cell[1]) for o in scene.objects]
        assert order == sorted(order)


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(kind):
    source = Scenes(question_kinds=(kind,))
    answers = Counter(source.draw("understanding", index)[2] for index in range(2000))
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] - 1000) < 100  # 4.5 standard deviations


def test_counts_are_balanced():
    source = Scenes(question_kinds=("counting",))
    answers = Counter(source.draw("understanding", index)[2] for index in range(2000))
    assert set(answers) == set(NUMBERS) and all(abs(count - 500) < 90 for count in answers.values())


def all_prompts(kinds: tuple[str, ...]) -> list[Prompt]:
    prompts = [Prompt("single_object", (Mention(kind),)) for kind in kinds]
    prompts += [Prompt("colors", (Mention(kind, colour),)) for kind in kinds for colour in COLOURS]
    prompts += [Prompt("counting", (Mention(kind),), count=n) for kind in kinds for n in (1, 2, 3, 4)]
    for first, second in itertools.permutations(kinds, 2):
        prompts.append(Prompt("two_objects", (Mention(first), Mention(second))))
        for one, other in itertools.permutations(COLOURS, 2):
            pair = (Mention(first, one), Mention(second, other))
            prompts.append(Prompt("color_attribution", pair))
            prompts += [Prompt("position", pair, relation=relation) for relation in RELATIONS]
    return prompts


@pytest.mark.parametrize("kinds", [SHAPES, GARMENTS])
def test_parse_caption_inverts_every_caption(kinds):
    prompts = all_prompts(kinds)
    captions = [write_caption(prompt) for prompt in prompts]
    number = len(kinds)
    pairs = number * (number - 1)
    assert len(set(captions)) == len(prompts) == number * (1 + 6 + 4) + pairs * (1 + 30 * 5)
    assert [parse_caption(caption) for caption in captions] == prompts


def test_captions_read_as_specified():
    pair = (Mention("circle", "red"), Mention("square", "blue"))
    assert write_caption(Prompt("counting", (Mention("cross"),), count=3)) == "three crosses"
    assert write_caption(Prompt("counting", (Mention("circle"),), count=1)) == "one circle"
    assert write_caption(Prompt("position", pair, relation="left of")) == "a red circle left of a blue square"
    assert write_caption(Prompt("color_attribution", pair)) == "a red circle and a blue square"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "circle",
        "a Circle",
        "a circle ",
        "a pink circle",
        "a circle and a circle",
        "a red circle and a square",
        "a red circle and a red square",
        "a circle left of a square",
        "one circles",
        "two circle",
        "five circles",
        "a circle and a shoe",
        "one trousers",
        "a red circle and a blue square and a green cross",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="Scenes grammar"):
        parse_caption(caption)
