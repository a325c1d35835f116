"""A sweep: where its points come from, and which of them no other beats."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import Trial

from infotok_lit.study.cells import DIGEST_LENGTH, Job, digest, point_job
from infotok_lit.study.config import Dimension, Search, Study
from infotok_lit.study.record import CellResult, read_results
from infotok_lit.study.statistics import Estimate, estimate

POINT_FILE = "point.json"
"""Below a point's folder: which point it is."""
DIRECTIONS = {"higher": "maximize", "lower": "minimize", "none": "maximize"}
"""Optuna's words for what is better; it has none for what is only reported, and rows are not sampled."""


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


def suggest(trial: Trial, search: Search) -> dict[str, Any]:
    """A point: what the trial's sampler, or whoever queued the trial, chose for each dimension."""
    point: dict[str, Any] = {}
    for name, dimension in search.space.items():
        if dimension.options is not None:
            point[name] = trial.suggest_categorical(name, dimension.options)
        elif dimension.integer:
            point[name] = trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            point[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return point


def planned_points(study: Study) -> list[Job]:
    """All points of a search whose sampler does not learn from results; none of one that does."""
    search = study.search
    if search.sampler == "grid":
        names, choices = list(search.space), [dimension.options for dimension in search.space.values()]
        grid = [dict(zip(names, point, strict=True)) for point in itertools.product(*choices)]
        count = len(grid) if search.trials is None else min(search.trials, len(grid))
        # In random order, so that the first half of a grid is a fair look at it.
        return [point_job(study, point) for point in random.Random(search.seed).sample(grid, count)]
    if search.sampler == "random":
        planner = optuna.create_study(sampler=RandomSampler(search.seed))
        return [point_job(study, suggest(planner.ask(), search)) for _ in range(search.trials)]
    return []


def known_points(study: Study) -> list[Job]:
    """The points below the study's folder that belong to its present configuration."""
    found = []
    for path in sorted(Path(study.out, "points").glob(f"*/{POINT_FILE}")):
        try:
            params = json.loads(path.read_bytes())
            space = study.search.space
            known = set(params) == set(space) and all(space[name].holds(value) for name, value in params.items())
        except (ValueError, TypeError, RecursionError):
            continue  # a damaged note: the sampler may choose the point again
        job = point_job(study, params) if known else None
        if job is not None and job.key == f"points/{path.parent.name}":
            found.append(job)
    return found


def make_sampler(search: Search, offset: int) -> BaseSampler:
    """A sampler that learns; `offset` moves its seed, for one that works beside others or goes on after them."""
    if search.sampler == "nsga2":
        return NSGAIISampler(population_size=max(2, min(50, search.trials // 4)), seed=search.seed + offset)
    # constant_liar: points that others are running count as bad, so that workers spread out.
    return TPESampler(seed=search.seed + offset, constant_liar=True)


def search_name(study: Study) -> str:
    """The search's name in Optuna's storage: another space, configuration or objective is another search.

    An objective is also another where its name alone has stayed: what the old one measured would mislead the sampler.
    """
    search = study.search
    objectives = [(name, study.metrics[name].tag, study.metrics[name].better) for name in search.objectives]
    space = {name: _contents(study, dimension) for name, dimension in search.space.items()}
    what = json.dumps([digest(study, search.row), space, objectives, search.sampler, study.seeds], default=str)
    return f"{study.name} search {hashlib.sha256(what.encode()).hexdigest()[:DIGEST_LENGTH]}"


def measured_points(study: Study, jobs: Sequence[Job]) -> list[Point]:
    """The finished points, best first by the first objective."""
    objectives = study.search.objectives
    measured = []
    for job in jobs:
        results = read_results(study, job.cells)
        known = estimates(study, results)
        whole = all(name in known and known[name].count == len(results) for name in objectives)
        if whole and all(result.record.state == "finished" for result in results):
            measured.append((job, known))
    values = [[estimates[name].mean for name in objectives] for _, estimates in measured]
    on_front = pareto_front(values, [DIRECTIONS[study.metrics[name].better] for name in objectives])
    points = [Point(*pair, number in on_front) for number, pair in enumerate(measured)]
    sign = -1 if study.metrics[objectives[0]].better == "higher" else 1
    return sorted(points, key=lambda point: sign * point.estimates[objectives[0]].mean)


def estimates(study: Study, results: Collection[CellResult]) -> dict[str, Estimate]:
    """Over some results: the metrics of which one of them has a finite value, by name."""
    values = {
        name: {r.cell.seed: r.values[name] for r in results if math.isfinite(r.values.get(name, math.nan))}
        for name in study.metrics
    }
    return {name: estimate(by_seed, study.confidence) for name, by_seed in values.items() if by_seed}


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[str]) -> set[int]:
    """Which of some points no other dominates.

    Args:
        values: Per point, one number per objective.
        directions: Per objective, `maximize` or `minimize`.
    """
    # Making even a study in memory is logged.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.create_study(directions=directions)
    trials.add_trials([optuna.create_trial(values=point) for point in values])
    if len(directions) > 1:
        return {trial.number for trial in trials.best_trials}
    best = trials.best_value if values else None
    return {trial.number for trial in trials.trials if trial.value == best}


def _contents(study: Study, dimension: Dimension) -> object:
    """A dimension with what its variants' files say in place of their names."""
    if dimension.variants is None:
        return asdict(dimension)
    return {name: digest(study, row) for name, row in dimension.variants.items()}
