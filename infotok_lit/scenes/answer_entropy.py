"""How uncertain answers are, given the questions: H(Y | Q), the most that images can say about them."""

from collections import Counter
from functools import lru_cache

import numpy as np

from infotok_lit.scenes.prior import ScenePrior
from infotok_lit.scenes.questions import QUESTION_KINDS, QuestionKind, draw_question, question_kind
from infotok_lit.scenes.spec import SceneSpec

DRAWS = 4000


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


def answer_entropy_bits(spec: SceneSpec) -> float:
    """H(Y | Q) in bits over all kinds of questions, which are equally likely, in the splits "train" and "val"."""
    return float(np.mean([kind_entropy_bits(spec, kind) for kind in QUESTION_KINDS]))


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
