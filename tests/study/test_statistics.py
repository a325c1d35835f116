"""Means, intervals and tests against scipy's own and textbook values."""

import math

import numpy as np
import pytest
from scipy import stats

from infotok_lit.study.statistics import compare, estimate


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


def test_without_an_effect_few_comparisons_are_significant() -> None:
    rng = np.random.default_rng(4)
    draws = rng.normal(size=(3000, 2, 3))
    p_values = [compare(dict(enumerate(a)), dict(enumerate(b)), 0.95).p_value for a, b in draws]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
