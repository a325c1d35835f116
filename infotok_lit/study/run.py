"""Running a study: its rows, then its search, on this machine and beside any other that works on it."""

from collections.abc import Sequence
from pathlib import Path

import optuna

from infotok_lit.study.cells import Job, row_jobs
from infotok_lit.study.config import Study
from infotok_lit.study.display import display
from infotok_lit.study.launch import FIT, Launcher
from infotok_lit.study.queue import JobQueue, open_storage, opening
from infotok_lit.study.record import Record, read_record
from infotok_lit.study.results import required_tags
from infotok_lit.study.work import work_off


def run_study(
    study: Study,
    workers: int = 1,
    threads: int | None = None,
    gpus: Sequence[str] = (),
    prefix: tuple[str, ...] = FIT,
) -> bool:
    """Run what is not finished yet; whether everything is, now.

    Args:
        workers: How many runs at a time.
        threads: CPU threads per run; None is 1 with several workers, and otherwise what the environment says.
        gpus: GPUs that the workers take turns in.
        prefix: The command that runs a cell, before the cell's arguments.

    Raises:
        FileNotFoundError: for a configuration file that does not exist.
        OSError: if the study's folder has no file locks.
        ValueError: if there is no worker.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; there must be 1 or more")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = Path(study.out)
    jobs = row_jobs(study)
    with opening(out):
        storage = open_storage(study.storage, out)
        # What a row measures is read from its event files; Optuna is told how long a cell took.
        rows = optuna.create_study(storage=storage, study_name=study.name, direction="minimize", load_if_exists=True)
    known = {job.key: job for job in jobs}
    queue = JobQueue(rows, storage, lambda trial: known.get(trial.user_attrs.get("job")))
    queue.fill(jobs, is_finished, lambda job: {})
    launchers = _launchers(study, workers, threads, gpus, prefix)
    with display(len(jobs), sum(map(is_finished, jobs))) as shown:
        work_off(queue, launchers, _seconds, shown)
    return all(map(is_finished, jobs))


def is_finished(job: Job) -> bool:
    """Whether every cell of a job has finished."""
    records = [read_record(cell.folder) for cell in job.cells]
    return all(record is not None and record.state == "finished" for record in records)


def worker_environment(number: int, workers: int, threads: int | None, gpus: Sequence[str]) -> dict[str, str]:
    """The variables that a worker's runs get: their share of the machine."""
    count = 1 if threads is None and workers > 1 else threads
    environment = {} if count is None else {"OMP_NUM_THREADS": str(count)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment


def _launchers(
    study: Study, workers: int, threads: int | None, gpus: Sequence[str], prefix: tuple[str, ...]
) -> list[Launcher]:
    first = Launcher(required_tags(study), prefix, keep_checkpoints=study.keep_checkpoints)
    return [
        Launcher(
            first.required_tags,
            prefix,
            worker_environment(number, workers, threads, gpus),
            first.keep_checkpoints,
            first.stop,
        )
        for number in range(workers)
    ]


def _seconds(job: Job, records: Sequence[Record]) -> list[float]:
    return [sum(record.seconds for record in records)]
