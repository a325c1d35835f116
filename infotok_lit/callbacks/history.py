"""The numbers of a run over its steps: in memory, in its checkpoints, and in `result.json` beside them."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

import infotok_lit
from infotok_lit.files import write_whole
from infotok_lit.modules.run_callbacks import logs_now, run_folder

RESULT_FILE = "result.json"
MOST_ROWS = 2000
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "diffusers", "numpy", "optuna", "scipy")


class MetricHistory:
    """Rows of metrics by step, in primitives.

    Args:
        most_rows: When there are more, every second one is forgotten.
    """

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.rows: list[dict[str, float]] = []
        self.most_rows = most_rows
        self._known: dict[str, Tensor] = {}

    def record_logged(
        self, trainer: pl.Trainer, names: Iterable[str], others: Mapping[str, float] | None = None
    ) -> None:
        """Keep those of the named metrics that were logged since the last time, and others beside them.

        A trainer's `callback_metrics` still hold what was logged once and not again; what is logged anew lies in memory
        of its own.
        """
        metrics, known = trainer.callback_metrics, self._known
        there = [name for name in names if name in metrics]
        new = {name: metrics[name] for name in there if name not in known or not metrics[name].is_set_to(known[name])}
        known |= new
        self.record(trainer.global_step, {**new, **(others or {})})

    def record(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keep some values, once per step."""
        if not values or (self.rows and self.rows[-1]["step"] == step):
            return
        self.rows.append({"step": step} | {name: float(value) for name, value in values.items()})
        if len(self.rows) > self.most_rows:
            del self.rows[1::2]

    def series(self, *names: str) -> list[list[float]]:
        """The steps, then the values of each name, of the rows that have all of them."""
        rows = [row for row in self.rows if all(name in row for name in names)]
        return [[row[name] for row in rows] for name in ("step", *names)]


def is_partial(trainer: pl.Trainer) -> bool:
    """Whether this validation is Lightning's check of a few batches, which is no measurement."""
    return trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps)


class RunResult(pl.Callback):
    """Writes `result.json` into the run's folder: how far the run is, and what it measured, step by step.

    `fit` and `validate` always have this callback. The file holds

    - `state`: running, finished, interrupted (a signal, Ctrl-C) or failed, with the `reason`;
    - `step`: optimiser steps taken; `seconds`: how long all tries took together; `started` and `versions`;
    - `validation`: one row per validation, its `step` and every `val/` metric; the last row is the latest;
    - `training`: the `train/` metrics of the steps that were logged, thinned out to at most 500 rows;
    - `benchmarks`: one row per time that TradeOff ran, its `step` and every `benchmark/` score.

    A number that is not finite is null. A run without a logger has no folder, and leaves no file.
    """

    def __init__(self) -> None:
        self.validation = MetricHistory()
        self.training = MetricHistory(most_rows=500)
        self.benchmarks = MetricHistory()
        self._folder: str | None = None
        self._resumes, self._resumed = True, False
        self._seconds_before = 0.0
        self._begin = time.monotonic()
        self._circumstances: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note when, where and with what the run begins."""
        # All processes ask, as Lightning settles it between them; one that fails alone could not ask any more.
        self._folder = run_folder(trainer)
        self._resumes = stage == "fit"
        self._begin = time.monotonic()
        self._circumstances = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a file before the first step, for a run that is killed before its first validation."""
        if self._resumed and self._folder is not None:
            self._take_missing_rows(Path(self._folder, RESULT_FILE), trainer.global_step)
        self._write(trainer, "running")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what a logged step logged."""
        if logs_now(trainer):
            self._record(self.training, trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember a whole validation; Lightning's check of a few batches is none."""
        if is_partial(trainer):
            return
        self._record(self.validation, trainer, "val/")
        self._write(trainer, "running")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say that the run has ended: by itself, or because a signal asked it to."""
        self._write(trainer, "interrupted" if trainer.received_sigterm else "finished")
        # A trainer may go on, with another fit or with validate.
        self._seconds_before, self._begin = self._seconds(), time.monotonic()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what the run died of; one that failed before it began leaves no file, and predict is no part of a run."""
        began = self._folder and Path(self._folder, RESULT_FILE).exists()
        if not began or trainer.state.fn not in ("fit", "validate"):
            return
        stopped = isinstance(exception, KeyboardInterrupt) or trainer.received_sigterm
        self._write(trainer, "interrupted" if stopped else "failed", f"{type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        """The numbers so far, so that a resumed run goes on with them."""
        rows = {"validation": self.validation.rows, "training": self.training.rows, "benchmarks": self.benchmarks.rows}
        return rows | {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the numbers of the run; `validate` begins its own."""
        if self._resumes:
            self.validation.rows, self.training.rows = state_dict["validation"], state_dict["training"]
            # Older checkpoints have none.
            self.benchmarks.rows = state_dict.get("benchmarks", [])
            self._seconds_before = state_dict["seconds"]
            self._resumed = True

    def _take_missing_rows(self, path: Path, step: int) -> None:
        """Take the validations up to a step that the file of an earlier try has, and its checkpoint has not.

        Lightning may save before it validates at the same step, and does not validate there again after a resume.
        """
        try:
            earlier = json.loads(path.read_bytes())["validation"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        known = {
            row["step"]: {name: math.nan if value is None else value for name, value in row.items()} for row in earlier
        }
        rows = {at: row for at, row in known.items() if at <= step} | {row["step"]: row for row in self.validation.rows}
        self.validation.rows = [rows[at] for at in sorted(rows)]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begin

    @staticmethod
    def _record(history: MetricHistory, trainer: pl.Trainer, kind: str) -> None:
        history.record_logged(trainer, [name for name in trainer.callback_metrics if name.startswith(kind)])

    def _write(self, trainer: pl.Trainer, state: str, reason: str = "") -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        content = {
            "state": state,
            "reason": reason,
            "step": trainer.global_step,
            "seconds": round(self._seconds(), 3),
            **self._circumstances,
            "validation": [_finite(row) for row in self.validation.rows],
            "training": [_finite(row) for row in self.training.rows],
            "benchmarks": [_finite(row) for row in self.benchmarks.rows],
        }
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(self._folder, RESULT_FILE), (json.dumps(content) + "\n").encode())


def is_finished_run(folder: Path) -> bool:
    """Whether a folder holds a run that went to its end."""
    try:
        return json.loads((folder / RESULT_FILE).read_bytes())["state"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def versions() -> dict[str, str]:
    """What decides a run's numbers besides its configuration: the code and the libraries."""
    found = {"infotok_lit": infotok_lit.__version__, "commit": _commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _commit() -> str:
    """The commit of a git checkout, with a + if files differ from it; "" for an installed package."""
    answers = []
    for question in ("ls-files --error-unmatch __init__.py", "rev-parse HEAD", "status --porcelain -uno ."):
        command = ["git", "--no-optional-locks", *question.split()]
        try:
            done = subprocess.run(
                command, cwd=Path(infotok_lit.__file__).parent, capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode != 0:
            return ""
        answers.append(done.stdout.strip())
    return answers[1] + ("+" if answers[2] else "")
