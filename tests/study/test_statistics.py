"""Means, intervals and tests against scipy's own and textbook values."""

import math

import numpy as np
import pytest
from scipy import stats

from infotok_lit.study.statistics import (
    compare,
    decide,
    estimate,
    holm,
    seeds_needed,
    steps_to,
    t_test_power,
    tost,
    tost_power,
)


def test_a_mean_and_its_interval_by_the_textbook() -> None:
    """Student's t with 2 degrees of freedom: the 97.5 % quantile is 4.3027."""
    found = estimate({0: 1.0, 1: 2.0, 2: 6.0}, confidence=0.95)
    assert (found.count, found.mean) == (3, 3.0)
    assert found.sd == pytest.approx(math.sqrt(7.0))
    assert found.margin == pytest.approx(4.302653 * math.sqrt(7.0 / 3.0), rel=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_an_interval_is_scipys(confidence) -> None:
    values = np.random.default_rng(1).normal(size=7)
    found = estimate(dict(enumerate(values)), confidence)
    low, high = stats.t.interval(confidence, df=6, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    found = [estimate(dict(enumerate(rng.normal(3.0, 2.0, size=4))), 0.9) for _ in range(4000)]
    covered = np.mean([abs(e.mean - 3.0) <= e.margin for e in found])
    assert abs(covered - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 4000)


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    assert estimate({3: 0.5}, 0.95).margin is None
    assert estimate({}, 0.95) is None
    assert compare({0: 1.0}, {1: 1.0}, 0.95) is None
    assert compare({0: 1.5}, {0: 1.0}, 0.95).p_value is None


def test_a_comparison_pairs_the_seeds_that_both_have() -> None:
    row, reference = {0: 0.9, 1: 0.8, 2: 0.95, 9: 5.0}, {2: 0.85, 1: 0.78, 0: 0.83, 7: -3.0}
    found = compare(row, reference, 0.95)
    differences = [0.9 - 0.83, 0.8 - 0.78, 0.95 - 0.85]
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(3))
    assert found.difference.count == 3
    assert found.difference.mean == pytest.approx(np.mean(differences))
    # Two degrees of freedom have a closed form: P(|T| > t) = 1 - t / sqrt(t^2 + 2).
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-6)
    assert found.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_against_a_constant_base_it_is_the_one_sample_test() -> None:
    row = dict(enumerate(np.random.default_rng(3).normal(0.5, 0.1, size=5)))
    found = compare(row, dict.fromkeys(row, 0.4), 0.95)
    assert found.p_value == pytest.approx(stats.ttest_1samp(list(row.values()), 0.4).pvalue)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_differences_that_do_not_vary_have_no_test(shift) -> None:
    reference = {0: 0.1, 1: 0.7, 2: 0.30000001}
    found = compare({seed: value + shift for seed, value in reference.items()}, reference, 0.95)
    assert found.difference.mean == pytest.approx(shift)
    assert found.p_value is None


@pytest.mark.parametrize("shift", [0.25, 0.3])
def test_of_differences_that_do_not_vary_no_number_of_seeds_is_known_to_decide(shift) -> None:
    """What is left of their spread is rounding, by which two seeds would do; three have not decided."""
    reference = {0: 0.1, 1: 0.7, 2: 0.3}
    found = compare({seed: value + shift for seed, value in reference.items()}, reference, 0.95)
    assert 0 < found.difference.sd < 1e-15
    (decision,) = decide([found], margin=0.02, level=0.05, power=0.8)
    assert (decision.verdict, decision.seeds_needed) == ("undecided", None)


def test_without_an_effect_few_comparisons_are_significant() -> None:
    rng = np.random.default_rng(4)
    draws = rng.normal(size=(3000, 2, 3))
    p_values = [compare(dict(enumerate(a)), dict(enumerate(b)), 0.95).p_value for a, b in draws]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def holm_by_definition(p_values: list[float], level: float) -> list[bool]:
    """Holm's own procedure: from the smallest p on, stop at the first that is not below level / (tests left)."""
    rejected = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] >= level / (len(p_values) - rank):
            break
        rejected[place] = True
    return rejected


def test_corrected_p_values_reject_what_holms_procedure_rejects() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        p_values = (rng.uniform(size=rng.integers(1, 6)) ** 3).tolist()
        for level in (0.01, 0.05, 0.2):
            assert [p < level for p in holm(p_values)] == holm_by_definition(p_values, level)


def test_holms_textbook_example_and_a_test_that_could_not_be_made() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.6]) == [pytest.approx(0.06), None, 1.0]


def test_two_one_sided_tests_are_scipys() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        values = rng.normal(0.01, 0.02, size=rng.integers(2, 12))
        sides = [
            stats.ttest_1samp(values, -0.02, alternative="greater").pvalue,
            stats.ttest_1samp(values, 0.02, alternative="less").pvalue,
        ]
        assert tost(estimate(dict(enumerate(values)), 0.95), 0.02) == pytest.approx(max(sides))


def test_equivalence_at_five_per_cent_is_a_ninety_per_cent_interval_within_the_margin() -> None:
    rng = np.random.default_rng(7)
    seen = set()
    for _ in range(300):
        found = estimate(dict(enumerate(rng.normal(0.0, 0.02, size=6))), 0.9)
        inside = abs(found.mean) + found.margin < 0.02
        assert (tost(found, 0.02) < 0.05) == inside
        seen.add(inside)
    assert seen == {True, False}


def test_one_seed_shows_no_equivalence_and_equal_runs_do() -> None:
    assert tost(estimate({0: 0.0}, 0.95), 0.02) is None
    assert tost(estimate({0: 0.0, 1: 0.0}, 0.95), 0.02) == 0.0
    assert tost(estimate({0: 0.5, 1: 0.5}, 0.95), 0.02) == 1.0


@pytest.mark.parametrize(
    ("mean", "sd", "count"), [(0.02, 0.03, 5), (0.0, 0.02, 8), (-0.01, 0.01, 3), (0.015, 0.02, 30)]
)
def test_powers_are_how_often_the_tests_decide(mean, sd, count) -> None:
    """10,000 simulated studies; four standard errors."""
    draws = np.random.default_rng(8).normal(mean, sd, size=(10_000, count))
    differs = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    means, errors = draws.mean(1), draws.std(1, ddof=1) / math.sqrt(count)
    equivalent = np.abs(means) + stats.t.ppf(0.95, count - 1) * errors < 0.02
    pairs = [
        (differs, t_test_power(mean, sd, count, 0.05)),
        (equivalent, tost_power(mean, sd, count, 0.02, 0.05)),
    ]
    for simulated, computed in pairs:
        assert abs(simulated.mean() - computed) <= 4 * math.sqrt(0.25 / 10_000)


def test_clear_effects_have_a_power_too() -> None:
    """Where scipy's noncentral t distribution is NaN; four standard errors of 10,000 simulated studies."""
    draws = np.random.default_rng(9).normal(0.1, 0.1 / 5.405, size=(10_000, 4))
    share = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05 / 9).mean()
    assert abs(t_test_power(0.1, 0.1 / 5.405, 4, 0.05 / 9) - share) < 4 * math.sqrt(share * (1 - share) / 10_000)
    assert seeds_needed(0.1, 0.1 / 5.405, 0.02, 0.05 / 9, 0.05, 0.8) == 4


def test_as_many_seeds_as_any_study_could_have_are_named() -> None:
    """By the normal distribution, as so many hardly differ from all: (z of 0.975 + z of 0.8)^2 (sd / mean)^2."""
    needed = sum(stats.norm.ppf([0.975, 0.8])) ** 2 * 100**2
    assert 65_536 < needed < 100_000
    assert seeds_needed(0.001, 0.1, 1e-9, 0.05, 0.05, 0.8) == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize(("mean", "sd"), [(0.03, 0.03), (0.0, 0.03), (0.012, 0.01), (-0.02, 0.02)])
def test_the_seeds_needed_decide_and_one_less_does_not(mean, sd) -> None:
    def decides(count: int) -> bool:
        return max(t_test_power(mean, sd, count, 0.05 / 3), tost_power(mean, sd, count, 0.02, 0.05)) >= 0.8

    count = seeds_needed(mean, sd, 0.02, 0.05 / 3, 0.05, 0.8)
    assert decides(count) and not any(decides(fewer) for fewer in range(2, count))


def test_what_no_number_of_seeds_can_decide_has_none() -> None:
    assert seeds_needed(1e-7, 1.0, 1e-6, 0.05, 0.05, 0.8) == math.inf


def test_verdicts_follow_from_corrected_differences_then_equivalence() -> None:
    def against(*differences: float):
        return compare(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0), 0.95)

    higher, lower = against(0.10, 0.11, 0.12, 0.11), against(-0.10, -0.11, -0.12, -0.11)
    equal, open_ = against(0.001, -0.001, 0.002, -0.002), against(0.1, -0.1, 0.05, 0.02)
    found = decide([higher, lower, equal, open_], margin=0.02, level=0.05, power=0.8)
    assert [each.verdict for each in found] == ["higher", "lower", "equivalent", "undecided"]
    assert [each.seeds_needed is None for each in found] == [True, True, True, False]
    # Significant alone, but not among many: three values of which the p-value is 0.03.
    alone = against(0.06, 0.08, 0.12)
    assert alone.p_value == pytest.approx(stats.ttest_1samp([0.06, 0.08, 0.12], 0).pvalue) and alone.p_value < 0.05
    assert decide([alone], 0.02, 0.05, 0.8)[0].verdict == "higher"
    assert decide([alone, open_, equal], 0.02, 0.05, 0.8)[0].verdict == "undecided"


@pytest.mark.parametrize(
    ("curve", "threshold", "better", "step"),
    [
        ({0: 0.0, 100: 1.0}, 0.25, "higher", 25.0),
        ({0: 0.3, 100: 1.0}, 0.25, "higher", 0.0),
        ({0: 0.0, 50: 0.2, 100: 0.1}, 0.25, "higher", None),
        ({100: 1.0, 50: 2.0, 0: 5.0}, 1.5, "lower", 75.0),
        ({0: 0.0, 10: 0.5, 20: 0.3, 30: 0.9}, 0.5, "higher", 10.0),
        ({}, 0.5, "higher", None),
    ],
)
def test_steps_to_a_threshold_lie_on_the_line_between_validations(curve, threshold, better, step) -> None:
    assert steps_to(curve, threshold, better) == (None if step is None else pytest.approx(step))
