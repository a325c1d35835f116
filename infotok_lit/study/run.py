"""Running a study: its rows, then its search, on this machine and beside any other that works on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from infotok_lit.study.cells import Job, row_jobs
from infotok_lit.study.config import Study
from infotok_lit.study.display import display
from infotok_lit.study.launch import FIT, Launcher
from infotok_lit.study.queue import JobQueue, open_storage, opening
from infotok_lit.study.record import is_finished
from infotok_lit.study.results import required_tags
from infotok_lit.study.search import known_points, planned_jobs, search_queue
from infotok_lit.study.work import work_off


@dataclass(frozen=True)
class Resources:
    """This machine's share in a study.

    Args:
        workers: How many runs at a time.
        threads: CPU threads per run; None is 1 with several workers, and otherwise what the environment says.
        gpus: GPUs that the workers take turns in; empty leaves the choice to `fit`.
        prefix: The command that runs a cell, before the cell's arguments.
    """

    workers: int = 1
    threads: int | None = None
    gpus: Sequence[str] = ()
    prefix: tuple[str, ...] = FIT

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"workers is {self.workers} and threads {self.threads}; give 1 or more")

    def environment(self, worker: int) -> dict[str, str]:
        """The variables that the runs of a worker get: their share of the machine."""
        threads = 1 if self.threads is None and self.workers > 1 else self.threads
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[worker % len(self.gpus)]
        return environment

    def launchers(self, study: Study) -> list[Launcher]:
        """One for each worker; they stop together."""
        first = Launcher(required_tags(study), self.prefix, keep_checkpoints=study.keep_checkpoints)
        return [replace(first, environment=self.environment(number)) for number in range(self.workers)]


def run_study(study: Study, resources: Resources) -> bool:
    """Run what is not finished yet; whether everything is, now.

    Raises:
        FileNotFoundError: for a configuration file that does not exist.
        OSError: if the study's folder has no file locks.
        KeyboardInterrupt: after the runs that were under way have been ended.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = Path(study.out)
    rows, points = row_jobs(study), planned_jobs(study)
    with opening(out):
        storage = open_storage(study.storage, out)
        queues = [_row_queue(study, storage, rows)] if rows else []
        if study.search is not None:
            queues.append(search_queue(study, storage, points))
    expected = _expected_cells(study, rows, points)
    with display(expected, lambda: _finished_cells(_jobs(study, rows))) as shown:
        for queue in queues:
            work_off(queue, resources.launchers(study), shown)
    return all(is_finished(cell.folder) for job in [*_jobs(study, rows), *(points or [])] for cell in job.cells)


def _row_queue(study: Study, storage: BaseStorage, jobs: Sequence[Job]) -> JobQueue:
    # What a row measures is read from its event files; Optuna is told how long a cell took.
    rows = optuna.create_study(storage=storage, study_name=study.name, direction="minimize", load_if_exists=True)
    known = {job.key: job for job in jobs}
    queue = JobQueue(
        rows,
        storage,
        job_of=lambda trial: known.get(trial.user_attrs.get("job")),
        values=lambda _, records: [sum(record.seconds for record in records)],
    )
    queue.fill(jobs)
    return queue


def _jobs(study: Study, rows: Sequence[Job]) -> list[Job]:
    """The rows' jobs, and those of the points that have been started."""
    return [*rows, *(known_points(study) if study.search is not None else [])]


def _expected_cells(study: Study, rows: Sequence[Job], points: Sequence[Job] | None) -> int:
    count = len(points) if points is not None else study.search.trials
    return sum(len(job.cells) for job in rows) + count * len(study.seeds)


def _finished_cells(jobs: Sequence[Job]) -> int:
    return sum(is_finished(cell.folder) for job in jobs for cell in job.cells)
