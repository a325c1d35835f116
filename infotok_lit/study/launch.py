"""Running one cell: `fit` in a process of its own, resumed where an earlier try left a checkpoint."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from infotok_lit.study.cells import Cell
from infotok_lit.study.events import read_curves
from infotok_lit.study.record import LOG_FILE, Attempt, Record, new_attempt, read_record

FIT = (sys.executable, "-m", "infotok_lit")
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 15.0
"""How long a run that is asked to end may take before it is killed."""


@dataclass(frozen=True)
class Launcher:
    """Starts cells and says how they ended.

    Args:
        required_tags: What a finished run must have logged at its last validation.
        prefix: The command that a cell's arguments are given to.
        environment: Variables set for every run.
        keep_checkpoints: False deletes a finished run's checkpoints.
        stop: Set, it ends the runs that are under way.
    """

    required_tags: Sequence[str]
    prefix: tuple[str, ...] = FIT
    environment: dict[str, str] = field(default_factory=dict)
    keep_checkpoints: bool = True
    stop: Event = field(default_factory=Event)

    def run(self, cell: Cell, lock: int) -> Record:
        """Run a cell; its record says how it ended.

        Args:
            lock: Descriptor of the lock that the process inherits.
        """
        record = read_record(cell.folder)
        record = self._attempt(cell, lock, record, resumed=has_checkpoint(cell.run_folder))
        if record.state == "failed" and record.attempts[-1].resumed and record.attempts[-1].outcome == "exit status 0":
            # Killed between its last checkpoint and its last validation: there was nothing left to train.
            record = self._attempt(cell, lock, record, resumed=False)
        if record.state == "finished" and not self.keep_checkpoints:
            shutil.rmtree(cell.run_folder / "checkpoints", ignore_errors=True)
        return record

    def _attempt(self, cell: Cell, lock: int, earlier: Record | None, resumed: bool) -> Record:
        if not resumed and cell.run_folder.exists():
            shutil.rmtree(cell.run_folder)
        command = [*self.prefix, *cell.arguments, *(["--ckpt_path=last"] if resumed else [])]
        attempts = [] if earlier is None else earlier.attempts
        record = Record(command, str(Path.cwd()), self.environment, cell.variant, cell.seed)
        record.attempts = [*attempts, new_attempt(resumed)]
        record.write(cell.folder)
        self._wait_for(cell, lock, record.attempts[-1], command)
        self._judge(cell, record)
        record.write(cell.folder)
        return record

    def _wait_for(self, cell: Cell, lock: int, attempt: Attempt, command: Sequence[str]) -> None:
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

    def _judge(self, cell: Cell, record: Record) -> None:
        outcome = record.attempts[-1].outcome
        record.reason = ""
        if outcome == "exit status 0":
            curves = read_curves(cell.run_folder, self.required_tags) if cell.run_folder.is_dir() else {}
            last = {tag: curves.get(tag, {}).get(cell.last_step, math.nan) for tag in self.required_tags}
            lacking = [tag for tag, value in last.items() if not math.isfinite(value)]
            if lacking:
                record.reason = f"ended well, but logged no finite {', '.join(lacking)} at step {cell.last_step}"
        elif outcome != "interrupted":
            record.reason = f"{record.command[len(self.prefix)]} ended with {outcome}"
        record.state = "interrupted" if outcome == "interrupted" else "failed" if record.reason else "finished"


def has_checkpoint(run_folder: Path) -> bool:
    """Whether there is a whole checkpoint to resume from; one that was cut off while it was written is none."""
    return any(zipfile.is_zipfile(path) for path in run_folder.rglob("*.ckpt"))


def _ending(process: subprocess.Popen, stop: Event) -> str:
    """Wait for a process, or for the wish to stop; how it ended, in words."""
    try:
        while process.poll() is None:
            if stop.wait(POLL_SECONDS):
                return "interrupted"
    finally:
        _end_group(process)
    if process.returncode < 0:
        return f"signal {signal.Signals(-process.returncode).name}"
    return f"exit status {process.returncode}"


def _end_group(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
