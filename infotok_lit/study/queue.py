"""Who runs what: jobs as trials of an Optuna study, which any number of processes and machines work off together.

Optuna's storage gives each waiting trial to one worker. What it leaves open is settled by two rules that every worker
derives from the same storage, without talking to others:

- Workers that start at once may queue the same job twice. A trial carries its job and the number of the try; of
  several with both the same, the one with the lowest number counts.
- A worker may die. It holds the job's lock (lock.py) as long as it or its `fit` lives; a trial that is running while
  its lock is free has no owner: it is marked as failed, and the job is queued again.
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from infotok_lit.study.cells import Job
from infotok_lit.study.lock import is_visible, try_lock, unlock
from infotok_lit.study.record import Record, is_finished

GRACE = timedelta(minutes=1)
"""A worker that has not signed the trial that it took for so long died between the two."""
LIVE = (TrialState.WAITING, TrialState.RUNNING)

JobOf = Callable[[FrozenTrial | Trial], Job | None]
Values = Callable[[Job, Sequence[Record]], Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """A job that this worker, and no other, is to run.

    Args:
        number: The trial's number in its study.
        lock: Descriptor of the job's lock.
    """

    number: int
    job: Job
    lock: int


class JobQueue:
    """The jobs of one Optuna study.

    Args:
        study: The study.
        storage: Where it is.
        job_of: The job that a trial stands for; None if it belongs to another configuration of the study.
        values: What a finished job, with its cells' records, tells Optuna.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage, job_of: JobOf, values: Values) -> None:
        self.study = study
        self.storage = storage
        self.job_of = job_of
        self.values = values
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def fill(self, jobs: Sequence[Job], trial_of: Callable[[Job], dict[str, Any]] = lambda _: {}) -> None:
        """Queue the jobs that are neither finished nor queued nor running; failed ones get another try.

        Args:
            trial_of: Further arguments of `optuna.create_trial`, such as params.
        """
        trials = self._trials()
        for job in jobs:
            own = [trial for trial in trials if trial.user_attrs.get("job") == job.key]
            done = all(is_finished(cell.folder) for cell in job.cells)
            told = any(trial.state == TrialState.COMPLETE for trial in own)
            if not (done and told) and not any(trial.state in LIVE for trial in own):
                attempt = 1 + max((trial.user_attrs.get("attempt", 1) for trial in own), default=0)
                self.add(job, attempt, **trial_of(job))

    def jobs(self) -> list[Job]:
        """Every job that was ever queued, once."""
        jobs = {trial.user_attrs["job"]: self.job_of(trial) for trial in self._trials() if "job" in trial.user_attrs}
        return [job for job in jobs.values() if job is not None]

    def add(self, job: Job, attempt: int, **trial: Any) -> None:
        """Queue a job."""
        attributes = {"job": job.key, "attempt": attempt}
        self.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attributes, **trial))

    def claim(self) -> Claim | None:
        """A waiting job; None if there is none that this worker can have now."""
        for trial, job in self._known(TrialState.WAITING):
            lock = try_lock(job.folder)
            if lock is None:
                continue
            if self._take(trial):
                return Claim(trial.number, job, lock)
            unlock(lock)
        return None

    def finish(self, claim: Claim, values: Sequence[float] | None) -> None:
        """Tell the storage how a job ended: with its values, or None if it failed. Gives the lock back."""
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        self.study.tell(claim.number, values, state=state, skip_if_finished=True)
        unlock(claim.lock)

    def recover(self) -> list[Job]:
        """Queue the jobs again whose worker has died."""
        recovered = []
        for trial, job in self._known(TrialState.RUNNING):
            lock = try_lock(job.folder) if self._can_be_judged(trial) and is_visible(job.folder) else None
            if lock is None:
                continue
            if self._give_up(trial):
                attempt = 1 + trial.user_attrs.get("attempt", 1)
                self.add(job, attempt, params=trial.params, distributions=trial.distributions)
                recovered.append(job)
            unlock(lock)
        return recovered

    def live(self) -> list[tuple[FrozenTrial, Job]]:
        """The jobs that wait or run, here or elsewhere."""
        return list(self._known(*LIVE))

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _known(self, *states: TrialState) -> Iterator[tuple[FrozenTrial, Job]]:
        """Trials in one of some states that count, with their jobs."""
        seen = set()
        for trial in self._trials():
            tried = (trial.user_attrs.get("job"), trial.user_attrs.get("attempt"))
            if tried in seen:
                if trial.state == TrialState.WAITING:
                    self._set_state(trial, TrialState.PRUNED)
                continue
            seen.add(tried)
            job = self.job_of(trial) if trial.state in states else None
            if job is not None:
                yield trial, job

    def _take(self, trial: FrozenTrial) -> bool:
        if not self._set_state(trial, TrialState.RUNNING):
            return False
        self.storage.set_trial_user_attr(self._trial_id(trial), "owner", self.owner())
        return True

    @staticmethod
    def owner() -> dict[str, object]:
        """Who runs a trial, for people who look into the storage."""
        return {"host": socket.gethostname(), "process": os.getpid()}

    @staticmethod
    def _can_be_judged(trial: FrozenTrial) -> bool:
        """Whether its lock says if a running trial has a worker: not yet while the worker is about to sign."""
        return "owner" in trial.user_attrs or trial.datetime_start < datetime.now() - GRACE

    def _give_up(self, trial: FrozenTrial) -> bool:
        """Mark a trial as failed, whose lock we hold; False if it has ended by itself."""
        still = self.storage.get_trial(self._trial_id(trial)).state == TrialState.RUNNING
        return still and self._set_state(trial, TrialState.FAIL)

    def _set_state(self, trial: FrozenTrial, state: TrialState) -> bool:
        try:
            return self.storage.set_trial_state_values(self._trial_id(trial), state)
        except UpdateFinishedTrialError:
            return False

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)


def open_storage(storage: str | None, folder: Path) -> BaseStorage:
    """Optuna's storage: a database by its URL, or a journal file; None is `journal.log` in the study's folder."""
    if storage is not None and "://" in storage:
        return optuna.storages.RDBStorage(storage)
    path = folder / "journal.log" if storage is None else Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Inside, no other worker of the study opens the storage: creating a database's tables is no atomic act."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "opening.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
