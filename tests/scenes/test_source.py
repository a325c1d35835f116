import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from infotok_lit.scenes import Scenes
from infotok_lit.scenes.grammar import CATEGORIES, parse_caption
from infotok_lit.scenes.questions import QUESTION_KINDS, question_kind
from infotok_lit.scenes.spec import SPECS

HERE = Path(__file__).resolve().parent
SPLIT_NAMES = ("train", "val", "held_out")
BRANCHES = ("understanding", "generation")


def digest(source: Scenes, branch: str, index: int) -> str:
    sample = source.sample(branch, index, np.random.default_rng(index))
    text = sample.caption if branch == "generation" else f"{sample.question}|{sample.answer}"
    return hashlib.sha256(sample.image.tobytes() + text.encode() + sample.name.encode()).hexdigest()


def digests(order: Iterable[int]) -> dict[str, str]:
    """Of samples of every kind of scene, in this order."""
    sources = {spec: Scenes(spec, "val", seed=3) for spec in SPECS}
    wanted = [(spec, branch, index) for spec in SPECS for branch in BRANCHES for index in order]
    return {f"{spec}/{branch}/{index}": digest(sources[spec], branch, index) for spec, branch, index in wanted}


def test_samples_are_the_same_in_another_process_and_order():
    script = (
        f"import json, sys; sys.path[:0] = {[str(HERE), str(HERE.parents[1])]!r}; from test_source import digests;"
        "print(json.dumps(digests(range(11, -1, -1))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    here = digests(range(12))
    assert json.loads(done.stdout) == here
    assert len(set(here.values())) == len(SPECS) * len(BRANCHES) * 12


def test_rng_seed_and_split_have_their_documented_effect():
    first = Scenes(seed=0).sample("generation", 5, np.random.default_rng(0))
    again = Scenes(seed=0).sample("generation", 5, np.random.default_rng(99))
    assert first.image.tobytes() == again.image.tobytes() and first.caption == again.caption
    others = [Scenes(seed=1), Scenes(split="val"), Scenes(split="held_out")]
    images = {source.sample("generation", 5).image.tobytes() for source in others}
    assert first.image.tobytes() not in images and len(images) == 3
    assert first.name == "scenes32/train/generation/5"
    assert (first.crop_offset, first.drop_prompt, first.image.mode) == (0.5, False, "RGB")


@pytest.mark.parametrize("spec", sorted(SPECS))
@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_held_out_things_occur_exactly_in_the_held_out_split(spec, split):
    rows = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}[SPECS[spec].cells]
    columns = {2: ["left", "right"], 3: ["left", "middle", "right"]}[SPECS[spec].cells]
    source = Scenes(spec, split)
    words = SPECS[spec].vocabulary
    combinations, placements = words.held_out_combinations, words.held_out_placements
    for branch in BRANCHES:
        for index in range(400):
            scene, text, answer = source.draw(branch, index)
            shown = {(o.colour, o.kind) for o in scene.objects} & combinations
            placed = {(o.kind, f"{rows[o.cell[0]]} {columns[o.cell[1]]}") for o in scene.objects}
            assert bool(shown or placed & placements) == (split == "held_out")
            named = any(f"{colour} {kind}" in f"{text} {answer}" for colour, kind in combinations)
            if split != "held_out":
                assert not named
            elif branch == "generation" and parse_caption(text).objects[0].colour is not None:
                assert named


@pytest.mark.parametrize(
    ("spec", "combinations", "placements"), [("scenes32", 24 - 4, 16 - 2), ("garments32", 36 - 6, 24 - 2)]
)
def test_every_kind_and_colour_and_place_is_seen_in_training(spec, combinations, placements):
    objects = [o for index in range(600) for o in Scenes(spec).draw("understanding", index)[0].objects]
    assert len({(o.colour, o.kind) for o in objects}) == combinations
    assert len({(o.kind, o.cell) for o in objects}) == placements


def test_categories_and_kinds_are_equally_likely_and_can_be_chosen():
    source = Scenes()
    categories = [parse_caption(source.draw("generation", i)[1]).category for i in range(1200)]
    kinds = [question_kind(source.draw("understanding", i)[1]) for i in range(1200)]
    for drawn, known in ((categories, CATEGORIES), (kinds, QUESTION_KINDS)):
        assert set(drawn) == set(known)
        assert all(abs(drawn.count(name) - 1200 / len(known)) < 60 for name in known)  # 4.6 standard deviations
    narrow = Scenes(categories=("counting",), question_kinds=("size",))
    assert {parse_caption(narrow.draw("generation", i)[1]).category for i in range(20)} == {"counting"}
    assert {question_kind(narrow.draw("understanding", i)[1]) for i in range(20)} == {"size"}


def test_dense_captions_describe_their_whole_scene_and_nothing_else_changes():
    source, plain = Scenes(dense_captions=0.25), Scenes()
    drawn = [source.draw("generation", index) for index in range(1200)]
    dense = [(scene, caption) for scene, caption, _ in drawn if caption.startswith(("a large ", "a small "))]
    assert abs(len(dense) - 300) < 70  # 4.7 standard deviations
    for scene, caption in dense:
        parts = caption.split(" and ")
        assert len(parts) == len(scene.objects)
        assert all(f"a {o.size} {o.colour} {o.kind} " in part for o, part in zip(scene.objects, parts, strict=True))
    assert {len(scene.objects) for scene, _ in dense} == {1, 2, 3, 4}
    assert source.draw("understanding", 7) == plain.draw("understanding", 7)
    assert not any(plain.draw("generation", index)[1].startswith(("a large ", "a small ")) for index in range(200))


def test_texture_and_jitter_are_parameters():
    flat = np.array(Scenes(texture=0.0, jitter=0.0).sample("generation", 0).image).astype(int)
    strong = np.array(Scenes(texture=1.0, jitter=0.0).sample("generation", 0).image).astype(int)
    grey = (flat == 128).all(axis=2)
    assert grey.mean() > 0.3
    assert strong[grey].std() > 25 and (np.ptp(strong[grey], axis=1) == 0).all()
    scene, _, _ = Scenes(jitter=0.0).draw("generation", 0)
    assert all(centre in (8.0, 24.0) for item in scene.objects for centre in item.centre)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "scenes16"}, "spec"),
        ({"split": "test"}, "split"),
        ({"texture": 1.5}, "texture"),
        ({"jitter": 3.0}, "jitter"),
        ({"categories": ("style",)}, "categories"),
        ({"question_kinds": ()}, "question_kinds"),
        ({"seed": -1}, "seed"),
        ({"dense_captions": 1.5}, "dense_captions"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError):
        Scenes(num_samples=10).sample("generation", 10)
