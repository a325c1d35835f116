"""The distribution of described scenes against every scene that there is, and against draws."""

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from infotok_lit.scenes.generator import Scene, SceneObject, fits_split
from infotok_lit.scenes.prior import FACTORS, ScenePrior, answer_bits, answer_entropy_bits, kind_entropy_bits
from infotok_lit.scenes.questions import QUESTION_KINDS, draw_question
from infotok_lit.scenes.spec import COLOURS, GARMENTS, SIZES, SPECS, SceneSpec

SMALL = (SceneSpec(max_objects=2), SceneSpec(max_objects=2, jitter=0.3, vocabulary=GARMENTS))


def every_scene(spec: SceneSpec) -> list[Scene]:
    """All that the training split admits, one per discrete description."""
    cells = list(product(range(spec.cells), repeat=2))
    scenes = []
    for count in range(1, spec.max_objects + 1):
        for taken in combinations(cells, count):
            for kinds in product(product(spec.vocabulary.kinds, COLOURS, SIZES), repeat=count):
                objects = tuple(SceneObject(*kind, cell, (0, 0)) for kind, cell in zip(kinds, taken, strict=True))
                scenes.append(Scene(objects, 0))
    return [scene for scene in scenes if fits_split(scene, spec, "train")]


@pytest.mark.parametrize("spec", SMALL, ids=["shapes", "garments"])
def test_entropies_are_those_of_all_scenes_counted(spec):
    scenes = every_scene(spec)
    numbers = Counter(len(scene.objects) for scene in scenes)
    chance = [1 / len(numbers) / numbers[len(scene.objects)] for scene in scenes]
    prior = ScenePrior(spec)
    factors = prior.factors(scenes)
    # Chain rule by counting: H(first factors) for one, two, three and all four of them.
    joint, expected = [], {}
    for name in FACTORS:
        values = getattr(factors, name)
        joint.append([tuple(np.atleast_1d(value)) for value in values.tolist()])
        mass: Counter = Counter()
        for key, share in zip(zip(*joint, strict=True), chance, strict=True):
            mass[key] += share
        expected[name] = -sum(share * math.log2(share) for share in mass.values()) - sum(expected.values())
    assert prior.entropy_bits() == pytest.approx(expected)
    assert prior.number_bits() == pytest.approx({count: math.log2(2 * total) for count, total in numbers.items()})


def test_draws_have_the_frequencies_of_the_prior():
    prior, rng = ScenePrior(SPECS["scenes32"]), np.random.default_rng(0)
    scenes = [draw_question(rng, SPECS["scenes32"], "val", "description")[0] for _ in range(4000)]
    factors = prior.factors(scenes)
    places = np.bincount(factors.place, minlength=len(prior.places)) / len(scenes)
    assert np.abs(places - np.exp2(prior.place_log2)).max() < 0.03
    shown = factors.kind >= 0
    assert np.array_equal(shown, prior.places[factors.place])
    cells = np.broadcast_to(np.arange(4), shown.shape)[shown]
    assert prior.allowed[cells, factors.kind[shown], factors.colour[shown]].all()


def test_descriptions_are_worth_their_entropy_and_other_answers_at_most_theirs():
    spec, rng = SPECS["scenes32"], np.random.default_rng(0)
    pairs = [draw_question(rng, spec, "train", "description")[1:] for _ in range(4000)]
    worth = np.mean([answer_bits(question, answer, spec) for question, answer in pairs])
    assert worth == pytest.approx(kind_entropy_bits(spec, "description"), abs=0.3)
    most = {"existence": 1, "counting": 2, "attribute": math.log2(6), "size": 1, "relation": 1}
    for kind, bits in most.items():
        assert 0.5 * bits < kind_entropy_bits(spec, kind) <= bits
        assert answer_bits(draw_question(rng, spec, "train", kind)[1], "yes", spec) == kind_entropy_bits(spec, kind)
    assert answer_entropy_bits(spec) == pytest.approx(np.mean([kind_entropy_bits(spec, k) for k in QUESTION_KINDS]))
    assert answer_bits("what is this?", "a dog", spec) is None
    assert answer_bits("describe the image.", " and ".join("abcdef"), spec) is None
