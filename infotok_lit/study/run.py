"""Running a study: its cells are trials of Optuna, worked off by any number of threads, calls and machines.

Rows and points of a search are trials alike: they are queued, and Optuna's storage gives each to one worker. A worker
that dies leaves a trial whose heartbeat stops; another one marks it as failed, and Optuna's callback queues it again.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Event

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import Trial, TrialState

from infotok_lit.errors import SettingsError
from infotok_lit.files import write_json
from infotok_lit.progress import ProgressBar, progress_bar
from infotok_lit.study.cells import Cell, Job, point_job, row_cells
from infotok_lit.study.config import Study
from infotok_lit.study.launch import FIT, Launcher, Resources
from infotok_lit.study.record import LOG_FILE, Record, is_finished, log_tail, read_results, what_was_not_asked
from infotok_lit.study.search import (
    DIRECTIONS,
    POINT_FILE,
    known_points,
    make_sampler,
    planned_points,
    search_name,
    suggest,
)
from infotok_lit.study.store import STORAGE_ERRORS, Storage, open_storage

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
    jobs = {cell.key: Job(cell.key, (cell,)) for cell in row_cells(study)}
    name = f"{study.name} rows: {', '.join(study.objectives)}"
    return Part(name, list(jobs.values()), len(jobs), lambda trial: jobs.get(trial.user_attrs["job"]))


def search_part(study: Study) -> Part:
    """The search: each point, with all seeds of the study, is a trial."""
    planned = list({job.key: job for job in planned_points(study)}.values())

    def job_of(trial: Trial) -> Job:
        job = point_job(study, suggest(trial, study.search))
        trial.set_user_attr("job", job.key)
        write_json(Path(study.out, job.key, POINT_FILE), dict(job.params))
        return job

    jobs, count = planned or known_points(study), len(planned) or study.search.trials
    return Part(search_name(study), jobs, count, job_of, lambda number: make_sampler(study.search, number))


@dataclass(frozen=True)
class Worker:
    """Takes trials of a part from Optuna and runs their cells, one after the other."""

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
        study = self.launcher.study
        values = [result.values for result in read_results(study, job.cells)]
        if not all(math.isfinite(own.get(name, math.nan)) for own in values for name in study.objectives):
            raise CellFailed("it ran when the study had other metrics")
        return [fmean(own[name] for own in values) for name in study.objectives]


def run_study(study: Study, resources: Resources, prefix: Sequence[str] = FIT) -> bool:
    """Run what is not finished yet; whether everything is, now, and measured what the study asks for.

    Args:
        prefix: The command that runs a cell, before the cell's arguments.

    Raises:
        MissingFileError: for a configuration file that does not exist.
        SettingsError: if the study's folder has no file locks, or its storage cannot be opened.
        KeyboardInterrupt: after the runs that were under way have been ended.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning, module="optuna|infotok_lit")
    searched = study.search is not None
    total = len(row_cells(study)) + (len(study.seeds) * search_part(study).count if searched else 0)
    with progress_bar(total) as bar:
        shown = Display(bar, total, lambda: sum(is_finished(cell.folder) for cell in _known_cells(study)))
        numbers, stop = range(resources.workers), Event()
        launchers = [Launcher(study, resources.environment(number), prefix, stop, shown.say) for number in numbers]
        if study.rows:
            _work_off(study, rows_part, launchers, shown)
        if searched:
            _work_off(study, search_part, launchers, shown)
        for cell in _known_cells(study):
            if why := what_was_not_asked(study, cell):
                shown.say(f"lacking  {cell.label}: {why}")
    return is_complete(study)


def is_complete(study: Study) -> bool:
    """Whether all that the rows ask for, and all points that were planned or begun, finished and have all metrics."""
    planned = planned_points(study) if study.search is not None else []
    cells = [*_known_cells(study), *(cell for job in planned for cell in job.cells)]
    return all(is_finished(cell.folder) and not what_was_not_asked(study, cell) for cell in cells)


def _work_off(study: Study, make_part: Callable[[Study], Part], launchers: Sequence[Launcher], shown: Display) -> None:
    """Run the trials of a part until none is left; from what has finished, if the storage fails meanwhile."""
    for _ in range(OPENINGS):
        try:
            return _work_together(study, make_part(study), launchers, shown)
        except STORAGE_ERRORS as error:
            shown.say(f"the storage failed: {str(error).splitlines()[0]}")
    raise SettingsError(f"storage: it failed {OPENINGS} times in a row; is its disk full, or its server down?")


def _work_together(study: Study, part: Part, launchers: Sequence[Launcher], shown: Display) -> None:
    """Let workers run the trials of a part until all is done. If something but the storage goes wrong, all runs end."""
    # Neither opening the storage nor filling it is one atomic act.
    with FileLock(Path(study.out, "opening.lock")):
        storage = open_storage(study, shown.say)
        directions = [DIRECTIONS[study.metrics[name].better] for name in study.objectives]
        trials = optuna.create_study(storage=storage, study_name=part.name, directions=directions, load_if_exists=True)
        _queue(trials, part)
    workers = []
    for number, launcher in enumerate(launchers):
        own = optuna.load_study(study_name=part.name, storage=storage)
        workers.append(Worker(part, storage, own, launcher, shown, number))
    failure = None
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.work) for worker in workers]
        try:
            for done in as_completed(running):
                try:
                    done.result()
                except STORAGE_ERRORS as error:
                    failure = error
        except BaseException:
            launchers[0].stop.set()
            raise
    if failure is not None:
        raise failure


def _queue(trials: optuna.Study, part: Part) -> None:
    """Queue what is neither finished nor queued nor running: jobs, and points that are still to be chosen."""
    known = trials.get_trials(deepcopy=False)
    live = [trial.user_attrs.get("job") for trial in known if trial.state in LIVE]
    told = [trial.user_attrs.get("job") for trial in known if trial.state == TrialState.COMPLETE]
    new = {}
    for job in part.jobs:
        done = job.key in told and all(is_finished(cell.folder) for cell in job.cells)
        if job.key not in live and not done:
            new[job.key] = job
            trials.enqueue_trial(dict(job.params or {}), user_attrs={"job": job.key})
    for _ in range(part.count - len(live) - len(new) - sum(key not in new for key in told)):
        trials.enqueue_trial({}, user_attrs={"job": ""})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known_cells(study: Study) -> list[Cell]:
    """The cells of the rows, and of the points that somebody began."""
    points = known_points(study) if study.search is not None else []
    return [*row_cells(study), *(cell for job in points for cell in job.cells)]
