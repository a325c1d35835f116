"""Means over seeds with their uncertainty, paired comparisons, and what they decide."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Seeds = Mapping[int, float]
"""Seed -> value."""
Verdict = Literal["higher", "lower", "equivalent", "undecided"]
MOST_SEEDS = 100_000
"""No study has so many; what would need more is said to need more than this."""
QUANTILES = 2000
"""Of the standard deviation, over which the power of a test is averaged."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        count: Number of seeds.
        mean: Their mean.
        sd: Their standard deviation (n - 1); None for one seed.
        margin: Half the width of Student's confidence interval of the mean; None for one seed.
    """

    count: int
    mean: float
    sd: float | None
    margin: float | None


@dataclass(frozen=True)
class Comparison:
    """A row against a reference, over the seeds that both have.

    Args:
        difference: The differences, seed by seed: row minus reference.
        p_value: Two-sided paired t-test; None for one seed, or if the differences do not vary.
    """

    difference: Estimate
    p_value: float | None


@dataclass(frozen=True)
class Decision:
    """What a planned comparison decides.

    Args:
        comparison: The differences and their t-test; None if the rows have no seed in common.
        corrected: Its p-value after Holm's correction for all planned comparisons.
        equivalence: The p-value of the two one-sided tests that the difference lies within the margin.
        verdict: `higher` or `lower` by the corrected test, else `equivalent`, else `undecided`.
        seeds_needed: If undecided: how many seeds would decide, were mean and spread as they are; infinite if more than
            MOST_SEEDS, None if no spread is known.
    """

    comparison: Comparison | None
    corrected: float | None
    equivalence: float | None
    verdict: Verdict
    seeds_needed: float | None


def estimate(values: Seeds, confidence: float) -> Estimate | None:
    """Mean, standard deviation and confidence interval; None without values."""
    if not values:
        return None
    numbers = np.array(list(values.values()), dtype=np.float64)
    if len(numbers) == 1:
        return Estimate(1, float(numbers[0]), None, None)
    sd = float(numbers.std(ddof=1))
    quantile = stats.t.ppf((1 + confidence) / 2, df=len(numbers) - 1)
    return Estimate(len(numbers), float(numbers.mean()), sd, float(quantile * sd / np.sqrt(len(numbers))))


def compare(row: Seeds, reference: Seeds, confidence: float) -> Comparison | None:
    """Compare seed by seed; None if they have no seed in common."""
    differences = {seed: row[seed] - reference[seed] for seed in row if seed in reference}
    difference = estimate(differences, confidence)
    return None if difference is None else Comparison(difference, _p_value(list(differences.values())))


def decide(comparisons: Sequence[Comparison | None], margin: float, level: float, power: float) -> list[Decision]:
    """What planned comparisons decide together.

    A difference is `higher` or `lower` if its p-value, corrected by Holm's method for all of them, is below `level`;
    else `equivalent` if two one-sided tests (Schuirmann 1987) place it within the margin at `level`; else `undecided`.

    Args:
        comparisons: All that were planned; None for one that nothing is known of, which counts as a test.
        margin: The margin of equivalence, in the unit of the differences.
        level: The level of the tests.
        power: How surely the number of seeds that is named should decide.
    """
    corrected = holm([comparison and comparison.p_value for comparison in comparisons])
    decisions = []
    for comparison, p_value in zip(comparisons, corrected, strict=True):
        if comparison is None:
            decisions.append(Decision(None, None, None, "undecided", None))
            continue
        difference = comparison.difference
        equivalence = tost(difference, margin)
        verdict: Verdict = "undecided"
        if p_value is not None and p_value < level:
            verdict = "higher" if difference.mean > 0 else "lower"
        elif equivalence is not None and equivalence < level:
            verdict = "equivalent"
        needed = None
        # Differences that do not vary have no p-value, and a spread that is rounding alone.
        if verdict == "undecided" and comparison.p_value is not None:
            # Holm's first step, as if this were the clearest of all differences: the strictest that it can meet.
            needed = seeds_needed(difference.mean, difference.sd, margin, level / len(comparisons), level, power)
        decisions.append(Decision(comparison, p_value, equivalence, verdict, needed))
    return decisions


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected by Holm's step-down method (1979), in their order; None stays, and counts as a test."""
    known = sorted((p_value, place) for place, p_value in enumerate(p_values) if p_value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_value))
        corrected[place] = largest
    return corrected


def tost(difference: Estimate, margin: float) -> float | None:
    """The p-value of two one-sided t-tests that the true difference lies within +-margin; None for one seed."""
    if difference.sd is None:
        return None
    distance = margin - abs(difference.mean)
    error = difference.sd / math.sqrt(difference.count)
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, df=difference.count - 1))


def seeds_needed(mean: float, sd: float, margin: float, level: float, tost_level: float, power: float) -> float:
    """The smallest number of seeds at which the t-test or the equivalence test decides with some power.

    Args:
        mean: The true difference, taken to be what was found.
        sd: The true standard deviation of the differences, likewise.
        margin: The margin of equivalence.
        level: Of the two-sided t-test.
        tost_level: Of the equivalence test.
        power: The probability that one of them decides.

    Returns:
        the number; infinite if it is above MOST_SEEDS.
    """

    counts = range(2, MOST_SEEDS + 1)

    def decides(count: int) -> bool:
        return t_test_power(mean, sd, count, level) >= power or tost_power(mean, sd, count, margin, tost_level) >= power

    place = bisect_left(counts, True, key=decides)
    return counts[place] if place < len(counts) else math.inf


def t_test_power(mean: float, sd: float, count: int, level: float) -> float:
    """The probability that a two-sided t-test over `count` differences is significant."""
    critical = stats.t.ppf(1 - level / 2, df=count - 1)
    return 1 - _mean_lies_within(mean, sd, count, lambda error: critical * error)


def tost_power(mean: float, sd: float, count: int, margin: float, level: float) -> float:
    """The probability that two one-sided t-tests over `count` differences find equivalence."""
    critical = stats.t.ppf(1 - level, df=count - 1)
    return _mean_lies_within(mean, sd, count, lambda error: np.maximum(margin - critical * error, 0))


def _mean_lies_within(mean: float, sd: float, count: int, half: Callable[[np.ndarray], np.ndarray]) -> float:
    """The probability that the mean that is found lies in +-half, which depends on the standard error that is found.

    Given that error, it is a normal probability; this averages over the error's own distribution. It is what scipy's
    noncentral t distribution would give for the t-test, had that a value for all large effects: at some it is NaN.
    """
    ranks = (np.arange(QUANTILES) + 0.5) / QUANTILES
    error = sd / math.sqrt(count)
    width = half(error * np.sqrt(stats.chi2.ppf(ranks, df=count - 1) / (count - 1)))
    return float((stats.norm.cdf((width - mean) / error) - stats.norm.cdf((-width - mean) / error)).mean())


def steps_to(curve: Mapping[int, float], threshold: float, better: str) -> float | None:
    """The step at which a curve first reaches a threshold, between two validations by a straight line; None if never.

    Args:
        curve: Step -> value.
        threshold: The value to reach.
        better: `higher` or `lower`: from which side.
    """
    sign = 1 if better == "higher" else -1
    before: tuple[int, float] | None = None
    for step in sorted(curve):
        lead = sign * (curve[step] - threshold)
        if lead >= 0:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * before[1] / (before[1] - lead)
        before = (step, lead)
    return None


def _p_value(differences: list[float]) -> float | None:
    if len(differences) < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max(initial=0):
        return None
    with warnings.catch_warnings():
        # scipy warns of a loss of precision where all differences are nearly the same; the result stands.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_1samp(differences, 0).pvalue)
