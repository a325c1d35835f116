"""Who runs what: jobs as trials of an Optuna study, which any number of processes and machines work off together.

Optuna's storage gives each waiting trial to one worker. What it leaves open is settled by two rules that every worker
derives from the same storage, without talking to others:

- Workers that start at once may queue the same job twice. A trial carries its job and the number of the try; of several
  with both the same, the one with the lowest number counts.
- A worker may die. It holds the job's lock (lock.py) as long as it or its `fit` lives; a trial that is running while its
  lock is free has no owner, is marked as failed, and the job is queued again.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from infotok_lit.study.cells import Job
from infotok_lit.study.lock import is_visible, try_lock, unlock

LIVE = (TrialState.WAITING, TrialState.RUNNING)


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
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage, job_of: Callable[[FrozenTrial], Job | None]) -> None:
        self.study = study
        self.storage = storage
        self.job_of = job_of
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def fill(self, jobs: Sequence[Job], is_finished: Callable[[Job], bool], trial_of: Callable[[Job], dict]) -> None:
        """Queue the jobs that are neither finished nor queued nor running; failed ones get another try.

        Args:
            is_finished: Whether a job needs no run.
            trial_of: Further arguments of `optuna.create_trial`, such as params.
        """
        trials = self._trials()
        for job in jobs:
            own = [trial for trial in trials if trial.user_attrs.get("job") == job.key]
            done = is_finished(job) and any(trial.state == TrialState.COMPLETE for trial in own)
            if not done and not any(trial.state in LIVE for trial in own):
                attempt = 1 + max((trial.user_attrs["attempt"] for trial in own), default=0)
                self.add(job, attempt, **trial_of(job))

    def add(self, job: Job, attempt: int, **trial: object) -> None:
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
            if not is_visible(job.folder):
                continue
            lock = try_lock(job.folder)
            if lock is None:
                continue
            if self._give_up(trial):
                self.add(job, trial.user_attrs["attempt"] + 1, params=trial.params, distributions=trial.distributions)
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
            job = None if tried in seen else self.job_of(trial)
            if trial.state in states and job is not None:
                yield trial, job
            elif trial.state == TrialState.WAITING and tried in seen:
                self._set_state(trial, TrialState.PRUNED)
            seen.add(tried)

    def _take(self, trial: FrozenTrial) -> bool:
        if not self._set_state(trial, TrialState.RUNNING):
            return False
        owner = {"host": socket.gethostname(), "process": os.getpid()}
        self.storage.set_trial_user_attr(self._trial_id(trial), "owner", owner)
        return True

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
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "opening.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
