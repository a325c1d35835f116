"""A sweep: where its points come from. Optuna samples them; each is a job of the queue like any other."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from infotok_lit.study.cells import DIGEST_LENGTH, POINT_FILE, Job, digest, point_job
from infotok_lit.study.config import Dimension, Search, Study
from infotok_lit.study.front import DIRECTIONS
from infotok_lit.study.lock import try_lock, unlock
from infotok_lit.study.queue import Claim, JobOf, JobQueue, Values
from infotok_lit.study.record import Record
from infotok_lit.study.results import read_results

PROPOSALS = 20
"""How often in a row a sampler may propose a point that somebody is running."""

Params = Mapping[str, Any]


class Points:
    """The jobs of a search's points; each is worked out once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._jobs: dict[str, Job] = {}

    def job(self, params: Params) -> Job:
        """The job of a point."""
        name = json.dumps(params, sort_keys=True)
        if name not in self._jobs:
            self._jobs[name] = point_job(self._study, params)
        return self._jobs[name]

    def of_trial(self, trial: FrozenTrial | Trial) -> Job | None:
        """The job of a trial; None if it has not chosen its point, or if its configuration was another."""
        if set(trial.params) != set(self._study.search.space):
            return None
        job = self.job(trial.params)
        return job if trial.user_attrs.get("job", job.key) == job.key else None


def known_points(study: Study) -> list[Job]:
    """The points below the study's folder that belong to its present configuration."""
    found = []
    for path in sorted(Path(study.out, "points").glob(f"*/{POINT_FILE}")):
        params = json.loads(path.read_text())
        if set(params) == set(study.search.space) and _in_space(study.search, params):
            job = point_job(study, params)
            if job.folder == path.parent:
                found.append(job)
    return found


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """The search space in Optuna's words."""
    return {name: _distribution(dimension) for name, dimension in search.space.items()}


def planned_jobs(study: Study) -> list[Job] | None:
    """The points of a search that does not learn from results; None for one that does."""
    search = study.search
    if search is None:
        return []
    if search.sampler not in ("grid", "random"):
        return None
    count = search.trials
    if search.sampler == "grid":
        size = math.prod(len(choices) for choices in grid_space(search).values())
        count = size if count is None else min(count, size)
    planner = optuna.create_study(sampler=make_sampler(search))
    return [point_job(study, planner.ask(distributions(search)).params) for _ in range(count)]


def search_queue(study: Study, storage: BaseStorage, planned: Sequence[Job] | None) -> JobQueue:
    """The queue of a search."""
    search, points = study.search, Points(study)
    trials = optuna.create_study(
        storage=storage,
        study_name=search_name(study),
        directions=[DIRECTIONS[study.metrics[name].better] for name in search.objectives],
        load_if_exists=True,
    )
    trials.sampler = make_sampler(search, offset=len(trials.get_trials(deepcopy=False)))
    trials.set_user_attr("objectives", search.objectives)
    values = partial(objective_values, study)
    if planned is None:
        queue: JobQueue = LearningQueue(trials, storage, points.of_trial, values, search)
        planned = queue.jobs()
    else:
        queue = JobQueue(trials, storage, points.of_trial, values)
    space = distributions(search)
    queue.fill(planned, lambda job: {"params": dict(job.params), "distributions": space})
    return queue


def objective_values(study: Study, job: Job, records: Sequence[Record]) -> list[float]:
    """The means of the objectives over a point's seeds."""
    results = read_results(study, job.cells)
    return [fmean(result.values[name] for result in results) for name in study.search.objectives]


def make_sampler(search: Search, offset: int = 0) -> BaseSampler:
    """The sampler; `offset` moves its seed, for one that goes on where another stopped."""
    seed = search.seed + offset
    if search.sampler == "grid":
        return GridSampler(grid_space(search), seed=search.seed)
    if search.sampler == "random":
        return RandomSampler(seed=search.seed)
    if search.sampler == "nsga2":
        return NSGAIISampler(population_size=max(2, min(50, search.trials // 4)), seed=seed)
    # constant_liar: points that others are running count as bad, so that workers spread out.
    return TPESampler(seed=seed, constant_liar=True)


def grid_space(search: Search) -> dict[str, list[Any]]:
    """The choices of every dimension."""
    return {name: list(dimension.options) for name, dimension in search.space.items()}


def search_name(study: Study) -> str:
    """The search's name in Optuna's storage: another space, configuration or objective is another search."""
    search = study.search
    space = {name: _contents(study, dimension) for name, dimension in search.space.items()}
    what = json.dumps([digest(study, search.row), space, search.objectives, search.sampler, study.seeds], default=str)
    return f"{study.name} search {hashlib.sha256(what.encode()).hexdigest()[:DIGEST_LENGTH]}"


class LearningQueue(JobQueue):
    """A queue that asks its sampler for a new point when nothing waits, until there are enough.

    Args:
        study: The Optuna study.
        storage: Where it is.
        job_of: The job that a trial stands for.
        values: What a finished job tells Optuna.
        search: What is searched.
    """

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, job_of: JobOf, values: Values, search: Search
    ) -> None:
        super().__init__(study, storage, job_of, values)
        self._search = search
        self._space = distributions(search)

    def claim(self) -> Claim | None:
        """A waiting job, or a new one."""
        return super().claim() or self._propose()

    def recover(self) -> list[Job]:
        """Queue the jobs of dead workers again, and close the trials that died before they said what they run."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and "job" not in trial.user_attrs and self._can_be_judged(trial):
                self._set_state(trial, TrialState.FAIL)
        return super().recover()

    def _propose(self) -> Claim | None:
        for _ in range(PROPOSALS):
            if self._count() >= self._search.trials:
                return None
            trial = self.study.ask(self._space)
            job = self.job_of(trial)
            if "job" not in trial.user_attrs:
                trial.set_user_attr("job", job.key)
                trial.set_user_attr("attempt", 1)
            lock = try_lock(job.folder)
            if lock is not None and self._count(before=trial.number) < self._search.trials:
                trial.set_user_attr("owner", self.owner())
                return Claim(trial.number, job, lock)
            if lock is not None:
                unlock(lock)
            self.study.tell(trial.number, state=TrialState.PRUNED)
        return None

    def _count(self, before: int | None = None) -> int:
        """How many points there are; with `before`, of those with a lower number. Tries after the first do not count.

        Workers that ask at once may ask for one point too many. Numbers are the same for all, so they agree which one.
        """
        return sum(
            trial.user_attrs.get("attempt", 1) == 1
            and trial.state != TrialState.PRUNED
            and not (trial.state == TrialState.FAIL and "job" not in trial.user_attrs)
            for trial in self._trials()
            if before is None or trial.number < before
        )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.options is not None:
        return CategoricalDistribution(dimension.options)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _contents(study: Study, dimension: Dimension) -> object:
    """A dimension with what its variants' files say in place of their names."""
    if dimension.variants is None:
        return asdict(dimension)
    return {name: digest(study, row) for name, row in dimension.variants.items()}


def _in_space(search: Search, params: Params) -> bool:
    for name, dimension in search.space.items():
        if dimension.options is not None and params[name] not in dimension.options:
            return False
        if dimension.options is None and not dimension.low <= params[name] <= dimension.high:
            return False
    return True
