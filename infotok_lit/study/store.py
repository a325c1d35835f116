"""Optuna's storage of a study: opened, checked, and set aside if it is damaged.

It only deals out the work. What has finished is read from the cells' folders, so a storage that is lost is filled anew.
"""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from infotok_lit.errors import SettingsError
from infotok_lit.study.config import Study

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 30
"""A worker that has not been heard of for so long is dead."""
RETRIES = 5
"""How often a trial is queued again because its worker died."""
LOCK_SECONDS = 60
"""How long a worker waits for its turn to write to SQLite's file."""
SQLITE = "sqlite:///"
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
"""What Optuna raises when its database fails."""


class Storage(RDBStorage):
    """Optuna's database, with what its heartbeats lack."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        if url.startswith(SQLITE):
            # SQLite ignores Optuna's SELECT FOR UPDATE: two workers would take the same trial.
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        self._started: set[int] = set()

    def record_heartbeat(self, trial_id: int) -> None:
        """Note that a trial's worker is alive; silent if the database breaks, as the next look at it will say so."""
        with suppress(STORAGE_ERRORS):
            super().record_heartbeat(trial_id)

    def start_heartbeats(self, trial_ids: Iterable[int]) -> None:
        """Give trials a heartbeat, once each: Optuna overlooks a worker that died before its first one."""
        for trial_id in set(trial_ids) - self._started:
            self.record_heartbeat(trial_id)
            self._started.add(trial_id)


def open_storage(study: Study, say: Callable[[str], None]) -> Storage:
    """The study's storage; a damaged file of SQLite is set aside, which `say` is told, and a new one begun.

    Raises:
        SettingsError: for a database that cannot be reached.
    """
    url = study.storage or f"{SQLITE}{Path(study.out, 'study.db')}"
    path = Path(url.removeprefix(SQLITE)) if url.startswith(SQLITE) else None
    if path is not None and path.exists() and not _is_whole(path):
        say(f"{path} is damaged; it is now {_set_aside(path)}, and what has finished counts from its folder")
    try:
        return _connect(url)
    except (*STORAGE_ERRORS, RuntimeError) as error:
        if path is None or not path.is_file() or "locked" in str(error):
            raise SettingsError(f"storage: {url} cannot be opened: {str(error).splitlines()[0]}") from None
        say(f"{path} is no storage of this Optuna; it is now {_set_aside(path)}")
        return _connect(url)
    except ImportError as error:
        raise SettingsError(f"storage: the driver of {url.split(':')[0]} is not installed: {error}") from None


def _connect(url: str) -> Storage:
    options = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith(SQLITE) else {"pool_pre_ping": True}
    return Storage(
        url,
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
    )


def _is_whole(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as database:
            return database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError as error:
        return "locked" in str(error)


def _set_aside(path: Path) -> Path:
    """Rename a damaged database, with the files that SQLite keeps beside it; its new name."""
    aside = path.with_name(f"{path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}")
    for suffix in ("", "-journal", "-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + suffix))
    return aside
