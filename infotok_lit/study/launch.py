"""Running one cell: `fit` in a process of its own, resumed where an earlier try stopped; and on which resources."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

from infotok_lit.errors import SettingsError
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint
from infotok_lit.study.cells import Cell
from infotok_lit.study.config import Study
from infotok_lit.study.record import (
    LOG_FILE,
    Attempt,
    Record,
    is_measured,
    read_record,
    try_lock,
    what_is_missing,
)

FIT = (sys.executable, "-m", "infotok_lit")
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 15.0
"""How long a run that is asked to end may take before it is killed."""


@dataclass(frozen=True)
class Launcher:
    """Starts cells and says how they ended.

    Args:
        study: What the cells belong to.
        environment: Variables set for every run.
        prefix: The command that a cell's arguments are given to.
        stop: Set, it ends the runs that are under way.
        say: Where lines for people go.
    """

    study: Study
    environment: dict[str, str]
    prefix: Sequence[str]
    stop: Event
    say: Callable[[str], None]

    def run(self, cell: Cell) -> Record:
        """Run a cell that has not finished, once nobody else runs it; its record says how it ended."""
        lock = self._wait_for_lock(cell)
        if lock is None:
            return Record(state="interrupted")
        try:
            return self._run_locked(cell, lock)
        finally:
            os.close(lock)

    def _wait_for_lock(self, cell: Cell) -> int | None:
        said = False
        while (lock := try_lock(cell.folder)) is None:
            if not said:
                self.say(f"waiting  {cell.label}: it is being run")
            said = True
            if self.stop.wait(POLL_SECONDS):
                return None
        return lock

    def _run_locked(self, cell: Cell, lock: int) -> Record:
        record = read_record(cell.folder)
        if record.state == "finished":
            return record
        if record.state == "damaged":
            self.say(f"damaged  {cell.label}: {record.reason}")
        elif record.state in ("running", "interrupted", "failed") and not what_is_missing(self.study, cell):
            # Whoever started it was killed and it went on alone to its end, or what it lacked is no longer asked for.
            record.state, record.reason = "finished", ""
            record.write(cell.folder)
        elif record.state == "failed" and is_measured(cell):
            missing = what_is_missing(self.study, cell)
            record.reason = f"{missing}; mend the metric, or delete {cell.folder} to have it run again"
            record.write(cell.folder)
            return record
        if record.state != "finished":
            # A checkpoint that was cut off while it was written is none.
            found = cell.run_folder.rglob("*.ckpt")
            whole = any(zipfile.is_zipfile(path) or is_sharded_checkpoint(path) for path in found)
            resumes = whole and record.state not in ("waiting", "damaged")
            record = self._attempt(cell, lock, record.attempts, resumes)
            if record.state == "failed" and resumes and record.attempts[-1].outcome == "exit status 0":
                # Killed between its last checkpoint and its last validation: there was nothing left to train.
                record = self._attempt(cell, lock, record.attempts, resumes=False)
        if record.state == "finished" and not self.study.keep_checkpoints:
            shutil.rmtree(cell.run_folder / "checkpoints", ignore_errors=True)
        return record

    def _attempt(self, cell: Cell, lock: int, attempts: Sequence[Attempt], resumes: bool) -> Record:
        if not resumes and cell.run_folder.exists():
            shutil.rmtree(cell.run_folder)
        command = [*self.prefix, *cell.arguments, *(["--ckpt_path=last"] if resumes else [])]
        record = Record(command, str(Path.cwd()), self.environment, "running")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record.attempts = [*attempts, Attempt(now, socket.gethostname(), resumes)]
        record.write(cell.folder)
        self.say(f"started  {cell.label}")
        outcome = self._wait_for_fit(cell, lock, record.attempts[-1], command)
        if outcome == "exit status 0":
            record.reason = what_is_missing(self.study, cell)
        elif outcome != "interrupted":
            record.reason = f"{command[len(self.prefix)]} ended with {outcome}"
        record.state = "failed" if record.reason else "interrupted" if outcome == "interrupted" else "finished"
        record.write(cell.folder)
        return record

    def _wait_for_fit(self, cell: Cell, lock: int, attempt: Attempt, command: Sequence[str]) -> str:
        start = time.monotonic()
        with open(cell.folder / LOG_FILE, "ab") as log:
            log.write(f"# {attempt.started} on {attempt.host}: {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                pass_fds=(lock,),
                # A group of its own: a terminal's Ctrl-C reaches us alone, and we end the whole group.
                start_new_session=True,
            )
            attempt.outcome = _ending(process, self.stop)
        attempt.seconds = round(time.monotonic() - start, 3)
        return attempt.outcome


@dataclass(frozen=True)
class Resources:
    """This machine's share in a study.

    Args:
        workers: How many runs at a time, here.
        threads: CPU threads per run; with several workers: 1.
        gpus: GPUs that the workers take turns in, such as 0 1; default: `fit` chooses.
    """

    workers: int = 1
    threads: int | None = None
    gpus: list[int | str] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise SettingsError(f"workers is {self.workers} and threads {self.threads}; give 1 or more")

    def environment(self, worker: int) -> dict[str, str]:
        """The variables that the runs of a worker get: their share of the machine."""
        threads = 1 if self.threads is None and self.workers > 1 else self.threads
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpus[worker % len(self.gpus)])
        return environment


def _ending(process: subprocess.Popen, stop: Event) -> str:
    """Wait for a process, or for the wish to stop; how it ended, in words."""
    try:
        while process.poll() is None:
            if stop.wait(POLL_SECONDS):
                return "interrupted"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode < 0:
        return f"signal {signal.Signals(-process.returncode).name}"
    return f"exit status {process.returncode}"
