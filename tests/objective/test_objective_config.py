"""Nonsense is refused, with the mend in the sentence."""

import pytest

from infotok_lit.objective.alignment import NegativesConfig
from infotok_lit.objective.balance import BalanceConfig, Shares
from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.constraint import DualConfig
from infotok_lit.objective.sufficiency import DecoderConfig
from infotok_lit.objective.term import PAPER_TERMS

REFUSED = {
    "unknown term": (lambda: ObjectiveConfig(terms=("compaction",)), "'compaction' is not known; choose out of"),
    "duplicate term": (lambda: ObjectiveConfig(terms=("alignment", "alignment")), "name each once"),
    "terms as a string": (lambda: ObjectiveConfig(terms="compactness"), "give a list out of"),
    "unknown branch": (lambda: ObjectiveConfig(branches=("both",)), "'both' is not known"),
    "no branch": (lambda: ObjectiveConfig(branches=()), r"name a branch, or set terms to \[\]"),
    "unknown bottleneck": (lambda: ObjectiveConfig(bottleneck="outline"), "'outline' is not known"),
    "unknown reduction": (lambda: ObjectiveConfig(reduction="sum"), "'sum' is not known"),
    "inline without its price": (
        lambda: ObjectiveConfig(terms=("alignment",), bottleneck="inline"),
        "add compactness to terms",
    ),
    "inline without its price in a branch": (
        lambda: ObjectiveConfig(
            terms=("compactness", "alignment"),
            bottleneck="inline",
            balance=BalanceConfig(generation=Shares(compactness=0.0, alignment=0.3)),
        ),
        "generation: .* compactness is off in this branch; raise balance.generation.compactness",
    ),
    "a rival where it does not act": (
        lambda: ObjectiveConfig(terms=("captioning",), branches=("understanding",)),
        "captioning: this acts in generation only; add generation to branches",
    ),
    "negative lambda": (lambda: BranchWeights(lambda_=-1.0), "lambda_ is -1.0"),
    "terms without weight": (
        lambda: ObjectiveConfig(understanding=BranchWeights(0.0), generation=BranchWeights(0.0)),
        r"raise lambda_, alpha, beta or a share of balance, or set terms to \[\]",
    ),
    "cold": (lambda: ObjectiveConfig(temperature=0.0), "set it above 0"),
    "warm-up into the past": (lambda: ObjectiveConfig(warmup_steps=-1), "warmup_steps is -1"),
    "every term off": (
        lambda: ObjectiveConfig(
            terms=("alignment",), understanding=BranchWeights(alpha=0), generation=BranchWeights(alpha=0)
        ),
        "raise lambda_, alpha, beta",
    ),
    "unknown estimator": (lambda: ObjectiveConfig(estimator="mine"), "'mine' is not known"),
    "noise without a posterior": (
        lambda: ObjectiveConfig(estimator="hsic", bottleneck="inline"),
        "set bottleneck to projected",
    ),
    "bits without a posterior": (
        lambda: ObjectiveConfig(terms=PAPER_TERMS, estimator="hsic", generation=BranchWeights(rate_budget_bits=1.0)),
        "remove the budget or target",
    ),
    "target that nothing measures": (
        lambda: ObjectiveConfig(
            terms=PAPER_TERMS, bottleneck="inline", generation=BranchWeights(sufficiency_target_nats=1.0)
        ),
        "generation.sufficiency_target_nats: .* set rate_budget_bits instead",
    ),
    "no budget": (lambda: BranchWeights(rate_budget_bits=0.0), "set it above 0"),
    "two constraints": (
        lambda: BranchWeights(rate_budget_bits=1.0, sufficiency_target_nats=1.0),
        "keep one per branch",
    ),
    "target from nothing": (lambda: BranchWeights(beta=0.0, sufficiency_target_nats=1.0), "a beta above 0"),
    "dual ascent that stands": (lambda: DualConfig(step_size=0.0), "dual.step_size is 0.0"),
    "empty range": (lambda: DualConfig(lowest=2.0, highest=1.0), "set 0 < lowest < highest"),
    "negative queue": (lambda: NegativesConfig(queue_size=-1), "negatives.queue_size is -1"),
    "fewer than none from the data": (lambda: NegativesConfig(from_data=-1), "negatives.from_data is -1"),
    "no negatives": (lambda: NegativesConfig(limit=0), "negatives.limit is 0"),
    "unknown choice": (lambda: NegativesConfig(kept="first"), "'first' is not known"),
    "nearest of all": (lambda: NegativesConfig(kept="nearest"), "set negatives.limit"),
    "negative alpha": (lambda: BranchWeights(alpha=-0.1), "alpha is -0.1"),
    "negative beta": (lambda: BranchWeights(beta=-0.1), "beta is -0.1"),
    "unknown projection": (lambda: ProjectionConfig(kind="conv"), "'conv' is not known"),
    "no latent width": (lambda: ProjectionConfig(latent_width=0), "set it to 1 or more"),
    "no initial noise": (lambda: ProjectionConfig(initial_std=0.0), "set it between 0.005 and 1.0"),
    "heads do not divide": (lambda: DecoderConfig(width=20, heads=8), "must be a multiple of 4 and of decoder.heads"),
    "width not of two axes": (lambda: DecoderConfig(width=18, heads=2), "must be a multiple of 4"),
    "no layer": (lambda: DecoderConfig(depth=0), "set it to 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_lists_as_yaml_gives_them_are_accepted():
    config = ObjectiveConfig(terms=["compactness", "sufficiency"], branches=["generation"])
    assert config == ObjectiveConfig(terms=("compactness", "sufficiency"), branches=("generation",))


def test_plain_fine_tuning_needs_nothing_else():
    assert ObjectiveConfig(terms=[]).active_terms("understanding") == ()
    assert ObjectiveConfig(terms=[], branches=[]).active_terms("generation") == ()


def test_a_weight_of_zero_switches_a_term_off_in_its_branch_only():
    config = ObjectiveConfig(terms=PAPER_TERMS, understanding=BranchWeights(alpha=0.0, beta=3.0))
    assert config.active_terms("understanding") == ("compactness", "sufficiency")
    assert config.active_terms("generation") == PAPER_TERMS


def test_terms_are_weighted_as_in_equation_10():
    understanding, generation = BranchWeights(alpha=2.0, beta=3.0), BranchWeights(alpha=4.0, beta=5.0)
    config = ObjectiveConfig(terms=PAPER_TERMS, understanding=understanding, generation=generation)
    assert [config.understanding.factor(t) for t in config.terms] == [1.0, 3.0, 2.0]
    assert [config.generation.factor(t) for t in config.terms] == [1.0, 5.0, 4.0]
