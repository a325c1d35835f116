"""Dual ascent: where the multiplier goes, when it moves, and that nothing is lost in a checkpoint."""

import math

import pytest
import torch

from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.constraint import Constraint, DualConfig
from infotok_lit.objective.term import PAPER_TERMS

RATE, NATS = "rate_bits_per_token", "sufficiency_nats_per_element"


def budget(limit: float = 8.0, step_size: float = 0.1) -> Constraint:
    return Constraint("compactness", RATE, limit, 1.0, DualConfig(step_size=step_size, lowest=0.5, highest=2.0))


def passes(constraint: Constraint, step: int, *rates: float) -> float:
    """The multiplier at a step whose passes measure these rates."""
    for rate in rates:
        multiplier = constraint.multiplier(step)
        constraint.observe({constraint.quantity: torch.tensor(rate)})
    return multiplier.item()


def test_the_log_moves_by_the_relative_gap_of_the_step_before():
    constraint = budget(limit=8.0)
    assert passes(constraint, 0, 12.0) == 1.0
    assert passes(constraint, 1, 4.0) == pytest.approx(math.exp(0.1 * 0.5))
    assert passes(constraint, 2, 8.0) == pytest.approx(1.0)
    assert passes(constraint, 3, 8.0) == pytest.approx(1.0)


def test_accumulated_passes_count_once_with_their_mean():
    constraint = budget(limit=8.0)
    assert passes(constraint, 0, 12.0, 8.0, 10.0, 6.0) == 1.0
    assert passes(constraint, 1, 8.0) == pytest.approx(math.exp(0.1 * (0.5 + 0 + 0.25 - 0.25) / 4))


def test_far_gaps_are_clipped_and_the_multiplier_stays_in_its_range():
    constraint = budget(limit=8.0)
    passes(constraint, 0, 1e6)
    assert passes(constraint, 1, 1e6) == pytest.approx(math.exp(0.1))
    for step in range(2, 12):
        high = passes(constraint, step, 1e6)
    for step in range(12, 40):
        low = passes(constraint, step, 0.0)
    assert high == pytest.approx(2.0) and low == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rate_that_is_not_finite_moves_nothing_and_is_forgotten(bad):
    constraint = budget(limit=8.0)
    passes(constraint, 0, bad)
    assert passes(constraint, 1, 12.0, bad) == 1.0
    assert passes(constraint, 2, 8.0) == pytest.approx(math.exp(0.1 * 0.5))


def test_a_target_in_nats_has_an_absolute_gap_and_may_be_negative():
    constraint = Constraint("sufficiency", NATS, -1.0, 3.0, DualConfig(step_size=0.2))
    assert passes(constraint, 0, -0.5) == pytest.approx(3.0)
    assert passes(constraint, 1, -0.5) == pytest.approx(3.0 * math.exp(0.2 * 0.5))


def test_evaluation_reads_and_moves_nothing():
    constraint = budget()
    passes(constraint, 0, 12.0)
    before = {name: value.clone() for name, value in constraint.state_dict().items()}
    constraint.eval()
    assert passes(constraint, 5, 100.0) == 1.0
    assert constraint.observe({RATE: torch.tensor(9.0)})["constraint_gap"] == 1.0
    assert before == constraint.state_dict()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_goes_on_exactly(cut):
    rates = [(12.0, 3.0), (9.0, 15.0), (7.0, 7.5), (1.0, 2.0)]
    whole = budget()
    expected = [passes(whole, step, *rates[step]) for step in range(4)]
    first, second = budget(), budget()
    seen = [passes(first, step, *rates[step]) for step in range(cut)]
    second.load_state_dict(first.state_dict())
    assert seen + [passes(second, step, *rates[step]) for step in range(cut, 4)] == expected


def config(weights: BranchWeights, terms=PAPER_TERMS, **others) -> ObjectiveConfig:
    small = ProjectionConfig(kind="linear", latent_width=4)
    return ObjectiveConfig(terms=terms, projection=small, understanding=weights, **others)


def test_the_multiplier_replaces_the_factor_of_its_term(make_infotok, make_inputs):
    noise = torch.randn(3, 5, 4)
    plain = make_infotok(config(BranchWeights(0.3, 2.0, 3.0)))("understanding", make_inputs(), 0, noise=noise)
    for weights, term in (
        (BranchWeights(0.3, 2.0, 3.0, rate_budget_bits=1.0), "compactness"),
        (BranchWeights(0.3, 2.0, 3.0, sufficiency_target_nats=1.0), "sufficiency"),
    ):
        infotok = make_infotok(config(weights, dual=DualConfig(step_size=0.5)))
        first = infotok("understanding", make_inputs(), 0, noise=noise)
        torch.testing.assert_close(first.terms, plain.terms)  # the multiplier starts at 1, or at beta
        second = infotok("understanding", make_inputs(), 1, noise=noise)
        # Both limits are exceeded by more than the clip.
        assert first.report["constraint_gap"] > 1
        expected = {name: value * (math.exp(0.5) if name == term else 1) for name, value in plain.terms.items()}
        torch.testing.assert_close(second.terms, expected)
        torch.testing.assert_close(second.loss, sum(expected.values()))
        assert "constraint_gap" not in infotok("generation", make_inputs(), 1, noise=noise).report


def test_state_is_in_the_checkpoint_and_only_where_it_is_asked_for(make_infotok):
    limited = make_infotok(config(BranchWeights(rate_budget_bits=2.0)))
    names = {name for name in limited.state_dict() if name.startswith("constraints.")}
    assert names == {f"constraints.understanding.{n}" for n in ("log_multiplier", "gap_sum", "passes", "last_step")}
    assert not any("constraint" in name for name in make_infotok(config(BranchWeights())).state_dict())
    off = config(BranchWeights(rate_budget_bits=2.0), terms=("alignment",))
    assert not any("constraint" in name for name in make_infotok(off).state_dict())
