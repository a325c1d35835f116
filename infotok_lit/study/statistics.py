"""Means over seeds with their uncertainty, and paired comparisons."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

Seeds = Mapping[int, float]
"""Seed -> value."""


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
    common = [seed for seed in row if seed in reference]
    difference = estimate({seed: row[seed] - reference[seed] for seed in common}, confidence)
    if difference is None:
        return None
    return Comparison(difference, _paired_p_value([row[s] for s in common], [reference[s] for s in common]))


def _paired_p_value(row: list[float], reference: list[float]) -> float | None:
    differences = np.subtract(row, reference)
    if len(differences) < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max(initial=0):
        return None
    with warnings.catch_warnings():
        # scipy warns of a loss of precision where all differences are nearly the same; the result stands.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_rel(row, reference).pvalue)
