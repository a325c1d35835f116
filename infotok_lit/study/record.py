"""A cell's own record, beside its run: what was run, with which versions, and how it ended.

`cell.json` is the only thing that says whether a cell has finished; Optuna's storage only deals out the work.
"""

import json
import platform
import shlex
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import infotok_lit
from infotok_lit import __version__
from infotok_lit.files import write_whole

RECORD_FILE = "cell.json"
COMMAND_FILE = "command.sh"
LOG_FILE = "fit.log"
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "diffusers", "numpy", "optuna", "scipy")

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass
class Attempt:
    """One try to run a cell."""

    started: str
    host: str
    resumed: bool
    versions: dict[str, str]
    seconds: float = 0.0
    outcome: str = ""


@dataclass
class Record:
    """What `cell.json` holds.

    Args:
        command: The command line, exactly as it was run.
        working_folder: Where it was run.
        environment: The variables that were set for it.
        variant: The row or point.
        seed: The seed.
        state: How far it is.
        reason: Why it failed.
        attempts: Every try, the last one last.
    """

    command: list[str]
    working_folder: str
    environment: dict[str, str]
    variant: str
    seed: int
    state: State = "running"
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long all tries took."""
        return sum(attempt.seconds for attempt in self.attempts)

    def write(self, folder: Path) -> None:
        """Write the record, and the command as a script that anybody can run again."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD_FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_whole(folder / COMMAND_FILE, self.script().encode())

    def script(self) -> str:
        """The command as a shell script."""
        return f"#!/bin/sh\n{self.shell_line()}\n"

    def shell_line(self) -> str:
        """The command for a shell, with its folder and its variables."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"cd {shlex.quote(self.working_folder)} && {variables} {shlex.join(self.command)}".replace("  ", " ")


def read_record(folder: Path) -> Record | None:
    """A cell's record; None if it never ran."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return Record(**content | {"attempts": [Attempt(**attempt) for attempt in content["attempts"]]})


def is_finished(folder: Path) -> bool:
    """Whether the cell of a folder needs no run."""
    record = read_record(folder)
    return record is not None and record.state == "finished"


def new_attempt(resumed: bool) -> Attempt:
    """A try that starts now, here."""
    return Attempt(datetime.now(UTC).isoformat(timespec="seconds"), socket.gethostname(), resumed, versions())


def versions() -> dict[str, str]:
    """What decides a run's numbers besides its configuration: the code and the libraries."""
    found = {"infotok_lit": __version__, "commit": _commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def log_tail(folder: Path, lines: int = 15) -> Sequence[str]:
    """The last lines of a cell's log."""
    path = folder / LOG_FILE
    if not path.is_file():
        return []
    return path.read_text(errors="replace").splitlines()[-lines:]


def _commit() -> str:
    """The commit of a git checkout, with a + if files differ from it; "" for an installed package."""
    source = Path(infotok_lit.__file__).parent
    answers = []
    for question in (
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "."],
    ):
        command = ["git", "--no-optional-locks", *question]
        try:
            done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode != 0:
            return ""
        answers.append(done.stdout.strip())
    _, commit, changes = answers
    return commit + ("+" if changes else "")
