"""The Pareto front against its definition."""

import numpy as np
import pytest

from infotok_lit.study.search import pareto_front


def brute_force(values: np.ndarray, directions: list[str]) -> set[int]:
    signed = values * [1 if direction == "maximize" else -1 for direction in directions]
    return {
        i for i, point in enumerate(signed) if not any(all(other >= point) and any(other > point) for other in signed)
    }


@pytest.mark.parametrize(
    "directions",
    [["maximize"], ["minimize"], ["maximize", "maximize"], ["maximize", "minimize"], ["minimize"] * 3],
)
@pytest.mark.parametrize("levels", [5, 1000])
def test_no_point_dominates_the_front(directions, levels) -> None:
    """Few levels make ties and equal points."""
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, levels, size=(15, len(directions))).astype(float)
        assert pareto_front(values.tolist(), directions) == brute_force(values, directions)


def test_without_points_there_is_no_front() -> None:
    assert pareto_front([], ["maximize", "minimize"]) == set() == pareto_front([], ["maximize"])
