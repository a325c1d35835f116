"""Running a study: its cells are trials of Optuna, worked off by any number of threads, calls and machines.

Rows and points of a search are trials alike: they are queued, and Optuna's storage gives each to one worker. A worker
that dies leaves a trial whose heartbeat stops; another one marks it as failed, and Optuna's callback queues it again.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Event

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import Trial, TrialState

from infotok_lit.errors import SettingsError
from infotok_lit.progress import ProgressBar, progress_bar
from infotok_lit.study.cells import Cell, Job, point_job, row_jobs
from infotok_lit.study.config import Study
from infotok_lit.study.launch import FIT, Launcher, Resources
from infotok_lit.study.record import LOG_FILE, Record, is_finished, log_tail, read_results
from infotok_lit.study.search import DIRECTIONS, known_points, make_sampler, planned_points, search_name, suggest
from infotok_lit.study.store import STORAGE_ERRORS, Storage, open_storage, opening

IDLE_SECONDS = 1.0
"""Between two looks at a queue that has nothing for us, but is not done."""
OPENINGS = 3
"""How often in one call a storage that fails is opened again."""
LIVE = (TrialState.WAITING, TrialState.RUNNING)


class CellFailed(Exception):
    """What a trial ends with whose cells have not all finished."""


class Display:
    """A bar over all cells, and a line for each that starts or ends here; threads may share it.

    Args:
        bar: Where they are shown.
        total: How many cells there are.
        count: How many have finished by now, whoever ran them.
    """

    def __init__(self, bar: ProgressBar, total: int, count: Callable[[], int]) -> None:
        self.say = bar.say
        self._bar, self._total, self._count = bar, total, count
        self._running: set[str] = set()
        self._others = self._said = 0
        self._move()

    def began(self, cell: Cell) -> None:
        """A cell is this call's now."""
        self._running.add(cell.key)

    def ended(self, cell: Cell, record: Record) -> None:
        """A cell ended here; of a failed one, the end of its log is shown."""
        self._running.discard(cell.key)
        finished = self._move()
        seconds = f"{record.attempts[-1].seconds:.0f} s; " if record.attempts else ""
        self.say(f"{record.state:<8} {cell.label} ({seconds}{finished} of {self._total} finished)")
        if record.state == "failed":
            self.say(f"  {record.reason}; the end of {cell.folder / LOG_FILE}:")
            for line in log_tail(cell.folder):
                self.say(f"    {line}")

    def wait_for(self, running: int) -> None:
        """Nothing waits any more, but so many trials run; those of other calls are mentioned."""
        others = running - len(self._running)
        # Twice in a row: one that has just been taken here is not yet among our own.
        if others > 0 and others == self._others != self._said:
            self.say(f"waiting for {others} that other calls run, or that died within the last half minute")
            self._said = others
        self._others = others

    def _move(self) -> int:
        finished = self._count()
        self._bar.show(finished, f"cells: {finished}/{self._total}")
        return finished


@dataclass(frozen=True)
class Part:
    """What one study of Optuna holds: the rows, or the search.

    Args:
        name: Its name in Optuna's storage.
        jobs: What is known to be run.
        count: How many trials there are to be; the points of those beyond `jobs` are chosen by the sampler.
        job_of: The job that a trial stands for; None if it belongs to another configuration of the study.
        sampler: From a number, the sampler that chooses points.
    """

    name: str
    jobs: Sequence[Job]
    count: int
    job_of: Callable[[Trial], Job | None]
    sampler: Callable[[int], BaseSampler] = RandomSampler


def rows_part(study: Study) -> Part:
    """The rows: each with each of its seeds is a trial."""
    jobs = {job.key: job for job in row_jobs(study)}
    name = f"{study.name} rows: {', '.join(study.objectives)}"
    return Part(name, list(jobs.values()), len(jobs), lambda trial: jobs.get(trial.user_attrs["job"]))


def search_part(study: Study) -> Part:
    """The search: each point, with all seeds of the study, is a trial."""
    planned = list({job.key: job for job in planned_points(study)}.values())

    def job_of(trial: Trial) -> Job:
        job = point_job(study, suggest(trial, study.search))
        trial.set_user_attr("job", job.key)
        job.write_point()
        return job

    jobs, count = planned or known_points(study), len(planned) or study.search.trials
    return Part(search_name(study), jobs, count, job_of, lambda number: make_sampler(study.search, number))


@dataclass(frozen=True)
class Worker:
    """Takes trials of a part from Optuna and runs their cells, one after the other."""

    study: Study
    part: Part
    storage: Storage
    trials: optuna.Study
    launcher: Launcher
    shown: Display
    number: int

    def work(self) -> None:
        """Run trials until none waits or runs any more, here or elsewhere."""
        while not self.launcher.stop.is_set():
            live = self.trials.get_trials(deepcopy=False, states=LIVE)
            waiting = [trial.number for trial in live if trial.state == TrialState.WAITING]
            if waiting:
                self.trials.sampler = self.part.sampler(waiting[0] + 1000 * self.number)
                if len(waiting) < len(live):
                    self.trials.sampler.reseed_rng()  # others, who may have begun alike, must not propose the same
                self._run_next()
            elif live:
                self.shown.wait_for(len(live))
                self.storage.start_heartbeats(trial._trial_id for trial in live)
                self.launcher.stop.wait(IDLE_SECONDS)
                optuna.storages.fail_stale_trials(self.trials)
            else:
                return

    def _run_next(self) -> None:
        try:
            self.trials.optimize(self._run, n_trials=1, catch=(CellFailed,))
        except Exception as error:
            # Optuna stumbles over its own bookkeeping where its storage fails; what it stumbled over counts.
            causes = list(_causes(error))
            for cause in causes:
                if isinstance(cause, STORAGE_ERRORS):
                    raise cause from None
            # Others have taken this worker for dead, as after a sleep of the machine, and its trial has ended. The
            # cells count all the same.
            if not any(isinstance(c, UpdateFinishedTrialError) or str(c).startswith("Cannot tell a") for c in causes):
                raise

    def _run(self, trial: Trial) -> list[float]:
        """What Optuna calls: run a trial's cells; the means of the objectives over them."""
        if "job" not in trial.user_attrs:
            raise CellFailed("another worker took the last trial that waited; Optuna made this one up")
        job = self.part.job_of(trial)
        if job is None:
            raise CellFailed("the trial belongs to another configuration of the study")
        for cell in job.cells:
            if not is_finished(cell.folder):
                self.shown.began(cell)
                record = self.launcher.run(cell)
                self.shown.ended(cell, record)
                if record.state != "finished":
                    raise CellFailed(record.reason)
        values = [result.values for result in read_results(self.study, job.cells)]
        if any(name not in own for own in values for name in self.study.objectives):
            raise CellFailed("it ran when the study had other metrics")
        return [fmean(own[name] for own in values) for name in self.study.objectives]


def run_study(study: Study, resources: Resources, prefix: Sequence[str] = FIT) -> bool:
    """Run what is not finished yet; whether everything is, now.

    Args:
        prefix: The command that runs a cell, before the cell's arguments.

    Raises:
        MissingFileError: for a configuration file that does not exist.
        SettingsError: if the study's folder has no file locks, or its storage cannot be opened.
        KeyboardInterrupt: after the runs that were under way have been ended.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning, module="optuna|infotok_lit")
    makers = [rows_part] if study.rows else []
    makers += [search_part] if study.search is not None else []
    parts = [make_part(study) for make_part in makers]
    total = len(row_jobs(study)) + (len(study.seeds) * parts[-1].count if study.search is not None else 0)
    with progress_bar(total) as bar:
        shown = Display(bar, total, lambda: _count_finished(study))
        numbers, stop = range(resources.workers), Event()
        launchers = [Launcher(study, resources.environment(number), prefix, stop, shown.say) for number in numbers]
        for make_part in makers:
            _work_off(study, make_part, launchers, shown)
    known = [cell for make_part in makers for job in make_part(study).jobs for cell in job.cells]
    return all(is_finished(cell.folder) for cell in known)


def _work_off(study: Study, make_part: Callable[[Study], Part], launchers: Sequence[Launcher], shown: Display) -> None:
    """Run the trials of a part until none is left; from what has finished, if the storage fails meanwhile."""
    for _ in range(OPENINGS):
        part = make_part(study)
        try:
            with opening(Path(study.out)):
                storage = open_storage(study, shown.say)
                directions = [DIRECTIONS[study.metrics[name].better] for name in study.objectives]
                trials = optuna.create_study(
                    storage=storage, study_name=part.name, directions=directions, load_if_exists=True
                )
                _queue(trials, part)
        except STORAGE_ERRORS as error:
            shown.say(f"the storage failed: {str(error).splitlines()[0]}")
            continue
        workers = []
        for number, launcher in enumerate(launchers):
            own = optuna.load_study(study_name=part.name, storage=storage)
            workers.append(Worker(study, part, storage, own, launcher, shown, number))
        if _work_together(workers):
            return
    raise SettingsError(f"storage: it failed {OPENINGS} times in a row; is its disk full, or its server down?")


def _queue(trials: optuna.Study, part: Part) -> None:
    """Queue what is neither finished nor queued nor running: jobs, and points that are still to be chosen."""
    known = trials.get_trials(deepcopy=False)
    live = {trial.number: trial.user_attrs.get("job") for trial in known if trial.state in LIVE}
    told = {trial.number: trial.user_attrs.get("job") for trial in known if trial.state == TrialState.COMPLETE}
    new = [
        job
        for job in part.jobs
        if job.key not in live.values()
        and not (job.key in told.values() and all(is_finished(cell.folder) for cell in job.cells))
    ]
    for job in new:
        trials.enqueue_trial(dict(job.params or {}), user_attrs={"job": job.key})
    keys = {job.key for job in new}
    missing = part.count - len(live) - len(new) - sum(key not in keys for key in told.values())
    for _ in range(missing):
        trials.enqueue_trial({}, user_attrs={"job": ""})


def _work_together(workers: Sequence[Worker]) -> bool:
    """Let workers work until all is done; False if the storage failed. What else goes wrong ends all runs."""
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.work) for worker in workers]
        failed = False
        try:
            for done in as_completed(running):
                try:
                    done.result()
                except STORAGE_ERRORS as error:
                    failed = True
                    workers[0].shown.say(f"the storage failed: {str(error).splitlines()[0]}")
        except BaseException:
            workers[0].launcher.stop.set()
            raise
    return not failed


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _count_finished(study: Study) -> int:
    points = known_points(study) if study.search is not None else []
    return sum(is_finished(cell.folder) for job in [*row_jobs(study), *points] for cell in job.cells)
