"""What a cell's folder says of it: the lock of whoever runs it, `cell.json` (its tries), and `result.json` of its run.

These files alone say whether a cell has finished; Optuna's storage only deals out the work.
"""

import fcntl
import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from infotok_lit.errors import SettingsError
from infotok_lit.files import write_json, write_whole
from infotok_lit.study.cells import RUN_FOLDER, Cell
from infotok_lit.study.config import Study

RECORD_FILE = "cell.json"
RESULT_FILE = "result.json"
COMMAND_FILE = "command.sh"
LOG_FILE = "fit.log"
LOCK_FILE = "lock"

Curve = dict[int, float]
"""Step -> value."""
State = Literal["waiting", "running", "finished", "failed", "interrupted", "damaged"]


@dataclass
class Attempt:
    """One try to run a cell."""

    started: str
    host: str
    resumed: bool
    seconds: float = 0.0
    outcome: str = ""


@dataclass
class Record:
    """What `cell.json` holds.

    Args:
        command: The command line, exactly as it was run, in `working_folder` and with the variables of `environment`.
        state: How far the cell is; `reason` says why it failed.
        attempts: Every try, the last one last.
    """

    command: list[str] = field(default_factory=list)
    working_folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    state: State = "waiting"
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long all tries took."""
        return sum(attempt.seconds for attempt in self.attempts)

    def write(self, folder: Path) -> None:
        """Write the record, and the command as a script that anybody can run again."""
        write_json(folder / RECORD_FILE, asdict(self))
        write_whole(folder / COMMAND_FILE, f"#!/bin/sh\n{self.shell_line()}\n".encode())

    def shell_line(self) -> str:
        """The command for a shell, with its folder and its variables."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return f"cd {shlex.quote(self.working_folder)} && {' '.join([*variables, shlex.join(self.command)])}"


@dataclass(frozen=True)
class CellResult:
    """A cell and what is known of it.

    Args:
        record: Its record.
        values: Final value of each metric that it logged, by the metric's name; empty unless it has finished.
        curves: Every curve that its run left, by tag; empty unless it has finished.
        versions: What its run ran with.
    """

    cell: Cell
    record: Record
    values: dict[str, float]
    curves: dict[str, Curve]
    versions: dict[str, str]


def read_results(study: Study, cells: Sequence[Cell]) -> list[CellResult]:
    """The results of cells, in their order."""
    found = []
    for cell in cells:
        record, result = read_record(cell.folder), _read_run(cell.run_folder)
        curves = _curves(result) if record.state == "finished" and result else {}
        values = {
            name: curves[metric.tag][cell.last_step]
            for name, metric in study.metrics.items()
            if cell.last_step in curves.get(metric.tag, {})
        }
        found.append(CellResult(cell, record, values, curves, result.get("versions", {})))
    return found


def read_curves(run_folder: Path) -> dict[str, Curve]:
    """Every curve of a run of `fit`, by tag; none if it left no whole `result.json`."""
    result = _read_run(run_folder)
    return _curves(result) if result else {}


def read_record(folder: Path) -> Record:
    """A cell's record; if it or the result of a finished run cannot be read, it says `damaged`: to be run again."""
    try:
        content = json.loads((folder / RECORD_FILE).read_bytes())
        record = Record(**content | {"attempts": [Attempt(**attempt) for attempt in content["attempts"]]})
    except FileNotFoundError:
        return Record()
    except (ValueError, TypeError, KeyError, RecursionError):
        return Record(state="damaged", reason=f"{folder / RECORD_FILE} is empty or damaged; the cell is run again")
    if record.state == "finished" and not _read_run(folder / RUN_FOLDER):
        record.state = "damaged"
        record.reason = f"{folder / RUN_FOLDER / RESULT_FILE} is gone or damaged; the cell is run again"
    return record


def is_finished(folder: Path) -> bool:
    """Whether the cell of a folder needs no run."""
    return read_record(folder).state == "finished"


def what_is_missing(study: Study, cell: Cell) -> str:
    """Why what `fit` left is not a finished run, in words; "" if it is one."""
    result = _read_run(cell.run_folder)
    if not result:
        return f"it left no readable {RESULT_FILE}"
    if result["state"] != "finished":
        return f"its {RESULT_FILE} says {result['state']} at step {result['step']}: {result['reason']}"
    curves = _curves(result)
    required = [metric.tag for metric in study.metrics.values() if not metric.optional]
    lacking = [tag for tag in required if not math.isfinite(curves.get(tag, {}).get(cell.last_step, math.nan))]
    return f"it measured no finite {', '.join(lacking)} at step {cell.last_step}" if lacking else ""


def is_measured(cell: Cell) -> bool:
    """Whether a run trained and validated to its end: what it lacks then, the same run would lack again."""
    result = _read_run(cell.run_folder)
    whole = bool(result) and result["state"] == "finished"
    return whole and any(row["step"] == cell.last_step for row in result["validation"])


def what_was_not_asked(study: Study, cell: Cell) -> str:
    """What a finished cell lacks of what the study asks for by now, in words; "" for nothing, or one not finished."""
    missing = what_is_missing(study, cell) if is_finished(cell.folder) else ""
    return f"{missing}; it ran when the study had other metrics" if missing else ""


def try_lock(folder: Path) -> int | None:
    """Take a cell's lock; its file descriptor, or None if somebody runs the cell.

    Whoever starts `fit` takes it and `fit` inherits it, so the operating system frees it when the last of them has
    ended, however it ended: a `fit` that outlives a killed parent keeps it.

    Raises:
        SettingsError: if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise SettingsError(f"out: {folder} is on a file system without file locks ({error}); choose another") from None
    return descriptor


def log_tail(folder: Path, lines: int = 15) -> list[str]:
    """The last lines of a cell's log."""
    path = folder / LOG_FILE
    return path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []


def _read_run(folder: Path) -> dict[str, Any]:
    """What `fit` has left of a run; empty without a whole `result.json`."""
    try:
        content = json.loads((folder / RESULT_FILE).read_bytes())
        return content if {"state", "step", "reason", "versions", "training", "validation"} <= set(content) else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _curves(result: dict[str, Any]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    # Older runs have no benchmarks.
    for row in [*result["training"], *result["validation"], *result.get("benchmarks", ())]:
        for tag, value in row.items():
            curves.setdefault(tag, {})[row["step"]] = math.nan if value is None else value
    curves.pop("step", None)
    return curves
