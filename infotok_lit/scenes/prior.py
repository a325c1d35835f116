"""What is known of a scene before its image is seen: how likely it is, and how uncertain answers about it are.

A scene that questions of the kind "description" are asked about has 1 to max_objects objects, each number equally
likely, and is uniform over all scenes of that number that its split admits: draw_scene is uniform, and what a split
does not admit is drawn again. So places come first, and given them the cells are independent. Everything here holds for
the splits "train" and "val".

Shapes: C cells, P sets of occupied cells.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np

from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.questions import QUESTION_KINDS, QuestionKind, draw_question, question_kind
from infotok_lit.scenes.spec import COLOURS, SceneSpec, place_name

FACTORS = ("place", "kind", "colour", "size")
"""What a scene's objects are made of, in the order of the chain rule: colours given the kinds."""
DRAWS = 4000
"""Questions that an entropy is estimated from where it is not known exactly."""


@dataclass(frozen=True)
class SceneFactors:
    """Scenes as numbers; -1 where a cell is empty."""

    place: np.ndarray
    """(n,) int64: the row of `ScenePrior.places`."""
    kind: np.ndarray
    """(n, C) int64: index into the vocabulary's kinds."""
    colour: np.ndarray
    """(n, C) int64: index into COLOURS."""
    size: np.ndarray
    """(n, C) int64: index into the family's sizes."""


@dataclass(frozen=True)
class ScenePrior:
    """The distribution of a family of scenes."""

    spec: SceneSpec

    @cached_property
    def places(self) -> np.ndarray:
        """(P, C) bool: every set of cells that may be occupied."""
        cells = range(self.spec.cells**2)
        sets = [taken for count in range(1, self.spec.max_objects + 1) for taken in combinations(cells, count)]
        return np.array([[cell in taken for cell in cells] for taken in sets])

    @cached_property
    def allowed(self) -> np.ndarray:
        """(C, kinds, colours) bool: what an object in a cell may be."""
        words = self.spec.vocabulary
        allowed = np.ones((self.spec.cells**2, len(words.kinds), len(COLOURS)), dtype=bool)
        for cell in range(len(allowed)):
            place = place_name(divmod(cell, self.spec.cells), self.spec.cells)
            for i, kind in enumerate(words.kinds):
                for k, colour in enumerate(COLOURS):
                    combined = (colour, kind) in words.held_out_combinations
                    allowed[cell, i, k] = not (combined or (kind, place) in words.held_out_placements)
        return allowed

    @cached_property
    def place_log2(self) -> np.ndarray:
        """(P,): log2 of each set's probability."""
        bits = self.number_bits()
        return self._log2_scenes - np.array([bits[number] for number in self.places.sum(1).tolist()])

    def number_bits(self) -> dict[int, float]:
        """-log2 of the probability of any scene that has so many objects."""
        numbers = self.places.sum(1)
        per_number = {number: self._log2_scenes[numbers == number] for number in set(numbers.tolist())}
        return {
            number: float(np.logaddexp2.reduce(log2_scenes) + np.log2(len(per_number)))
            for number, log2_scenes in per_number.items()
        }

    @cached_property
    def _log2_scenes(self) -> np.ndarray:
        """(P,): log2 of how many scenes there are on each set of cells."""
        return self.places @ np.log2(self.allowed.sum((1, 2)) * len(self.spec.sizes))

    def entropy_bits(self) -> dict[str, float]:
        """H of each factor given those before it, in bits per scene; they add up to that of the whole scene."""
        chance = np.exp2(self.place_log2)
        occupied = chance @ self.places
        kind_chance = self.allowed.sum(2) / self.allowed.sum((1, 2))[:, None]
        colours = np.log2(np.maximum(self.allowed.sum(2), 1))
        return {
            "place": float(-chance @ self.place_log2),
            "kind": float(occupied @ -_xlog2x(kind_chance).sum(1)),
            "colour": float(occupied @ (kind_chance * colours).sum(1)),
            "size": float(occupied.sum() * np.log2(len(self.spec.sizes))),
        }

    def factors(self, scenes: list[Scene]) -> SceneFactors:
        """Scenes -> numbers."""
        rows = {tuple(taken): row for row, taken in enumerate(self.places.tolist())}
        values = np.full((3, len(scenes), self.spec.cells**2), -1)
        for number, scene in enumerate(scenes):
            for item in scene.objects:
                cell = item.cell[0] * self.spec.cells + item.cell[1]
                values[:, number, cell] = (
                    self.spec.vocabulary.kinds.index(item.kind),
                    COLOURS.index(item.colour),
                    self.spec.sizes.index(item.size),
                )
        place = np.array([rows[tuple(taken)] for taken in (values[0] >= 0).tolist()])
        return SceneFactors(place, *values)


def _xlog2x(chance: np.ndarray) -> np.ndarray:
    return chance * np.log2(np.where(chance > 0, chance, 1.0))


# H(Y | Q), the most that images can say about answers


def answer_bits(question: str, answer: str, spec: SceneSpec) -> float | None:
    """Bits that an answer is worth before the image is seen, whose mean over questions is H(Y | Q).

    For a description exactly -log2 p(Y), which varies by the number of objects; for the other kinds their H(Y | Q).

    Returns:
        None for a question, or a description, that is not of Scenes.
    """
    kind = question_kind(question)
    if kind != "description":
        return None if kind is None else kind_entropy_bits(spec, kind)
    # All scenes of one number of objects are equally likely.
    return _number_bits(spec).get(1 + answer.count(" and "))


def answer_entropy_bits(spec: SceneSpec, kinds: Sequence[QuestionKind] = QUESTION_KINDS) -> float:
    """H(Y | Q) in bits over kinds of questions, the likelier the oftener named, in the splits "train" and "val"."""
    return float(np.mean([kind_entropy_bits(spec, kind) for kind in kinds]))


@lru_cache(maxsize=8)
def _number_bits(spec: SceneSpec) -> dict[int, float]:
    return ScenePrior(spec).number_bits()


@lru_cache(maxsize=32)
def kind_entropy_bits(spec: SceneSpec, kind: QuestionKind) -> float:
    """H(Y | Q) of one kind of questions, in bits.

    Exact for descriptions, which name everything there is. For the other kinds it is the plug-in estimate of DRAWS
    questions; that is too small rather than too large (most so for relations, by up to half of their one bit), so that
    H(Y | Q) - S stays a lower bound.
    """
    if kind == "description":
        return sum(ScenePrior(spec).entropy_bits().values())
    rng = np.random.default_rng(0)
    pairs = Counter(draw_question(rng, spec, "train", kind)[1:] for _ in range(DRAWS))
    questions: Counter[str] = Counter()
    for (question, _), count in pairs.items():
        questions[question] += count
    return sum(count * np.log2(questions[question] / count) for (question, _), count in pairs.items()) / DRAWS
