"""The points of a sweep that no other point beats in every objective."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from infotok_lit.study.cells import Job
from infotok_lit.study.config import Study
from infotok_lit.study.results import read_results
from infotok_lit.study.statistics import Estimate, estimate

DIRECTIONS = {"higher": "maximize", "lower": "minimize"}
"""Optuna's words for what is better."""


@dataclass(frozen=True)
class Point:
    """A point of a search whose seeds have all finished.

    Args:
        job: What was run.
        estimates: Every metric over the seeds, by name.
        on_front: Whether no other point is at least as good in all objectives and better in one.
    """

    job: Job
    estimates: dict[str, Estimate]
    on_front: bool


def measured_points(study: Study, jobs: Sequence[Job]) -> list[Point]:
    """The finished points, best first by the first objective."""
    objectives = study.search.objectives
    measured = []
    for job in jobs:
        results = read_results(study, job.cells)
        if all(result.state == "finished" for result in results):
            by_metric = {
                name: estimate({r.cell.seed: r.values[name] for r in results if name in r.values}, study.confidence)
                for name in study.metrics
            }
            measured.append((job, {name: value for name, value in by_metric.items() if value is not None}))
    values = [[estimates[name].mean for name in objectives] for _, estimates in measured]
    on_front = pareto_front(values, [DIRECTIONS[study.metrics[name].better] for name in objectives])
    points = [Point(*pair, number in on_front) for number, pair in enumerate(measured)]
    sign = -1 if study.metrics[objectives[0]].better == "higher" else 1
    return sorted(points, key=lambda point: sign * point.estimates[objectives[0]].mean)


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[str]) -> set[int]:
    """Which of some points no other dominates.

    Args:
        values: Per point, one number per objective.
        directions: Per objective, `maximize` or `minimize`.
    """
    trials = optuna.create_study(directions=directions)
    trials.add_trials([optuna.create_trial(values=point) for point in values])
    if len(directions) > 1:
        return {trial.number for trial in trials.best_trials}
    best = trials.best_value if values else None
    return {trial.number for trial in trials.trials if trial.value == best}
