"""The tables that a run ends with: both tasks before and after, against chance, and what the tokens hold."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infotok_lit.batch import BRANCHES, Batch, GenerationBatch, UnderstandingBatch
from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.history import RESULT_FILE, RunResult, is_partial
from infotok_lit.modules.run_callbacks import run_folder
from infotok_lit.scenes.questions import DESCRIBE

WORD = re.compile(r"\w+")
LONGEST = 100
"""Characters of a caption or question in a command to try."""
TASK_ROWS = (
    ("answers: exact match", "val/understanding/answers/overall"),
    ("drawings: score", "val/generation/score/overall"),
    ("  single object", "val/generation/score/single_object"),
    ("  two objects, position", "val/generation/score/position"),
    ("  the parser's own accuracy", "val/generation/score/parser_accuracy"),
    ("understanding loss (nats/token)", "val/understanding/loss"),
    ("generation loss", "val/generation/loss"),
    ("reconstruction loss", "val/reconstruction/loss"),
)
"""Label, metric. What is called `overall` has its standard error and its chance level beside it."""
BESIDE = ("standard_error", "chance")
"""What stands beside such a score."""
ANSWERS = "val/understanding/answers/"
OPEN = {f"{ANSWERS}{name}" for name in ("overall", "standard_error", "chance", "other")}
"""What there is of questions that are not of Scenes, whose answers are too free for an exact match to mean anything."""
SHOWN_ANSWERS = 4

INFORMATION_ROWS = (
    ("rate C (bits/token)", "rate_bits_per_token"),
    ("active units (fraction)", "active_units_fraction"),
    ("sufficiency S (nats/element)", "sufficiency_nats_per_element"),
    ("alignment bound (nats)", "alignment_bound_nats"),
    ("structure in the tokens (bits/image)", "probe/structure_bits"),
    ("texture in the tokens (bits/image)", "probe/texture_bits"),
)
"""Label, name in the objective's report."""
OF_THE_OBJECTIVE = re.compile(rf"val/({'|'.join(BRANCHES)})/[^/]+(/t_[^/]+)?")
"""Metrics of a branch that its terms report; nothing else of a branch but its loss has so short a name."""


class FinalReport(pl.Callback):
    """Prints, when `fit` ends, the first validation beside the last one, and the commands to try next.

    When `validate` ends, it prints what was measured; what the terms report is in the logs and in `result.json`.

    Of data whose answers have no score, it shows some of the last validation's answers beside the truth. The commands
    draw and ask what that validation did: a caption, and of the questions the one that is nearest to it. Where other
    images are read than drawn, no question is about what is drawn, and a description is asked for.

    The first validation is the one before training if `trainer.num_sanity_val_steps` is -1.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.before_step = 0
        self.after: dict[str, float] = {}
        self.after_step = 0
        self._questions: list[str] = []
        self._answers: list[tuple[str, str, str]] = []
        self._caption = "a red circle"

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember what the first batches asked for, and the answers."""
        if batch_idx == 0 and isinstance(batch, UnderstandingBatch):
            answers = getattr(outputs, "answers", None) or [""] * len(batch.questions)
            self._questions = batch.questions
            self._answers = list(zip(batch.questions, answers, batch.answers, strict=True))[:SHOWN_ANSWERS]
        elif batch_idx == 0 and isinstance(batch, GenerationBatch):
            self._caption = batch.captions[0]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metrics; those of the first whole validation for good."""
        if is_partial(trainer):
            return
        metrics = _measured(trainer)
        if not self.before:
            self.before, self.before_step = metrics, trainer.global_step
        else:
            self.after, self.after_step = metrics, trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the report."""
        run = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        console = Console()
        if not self.after and self.before_step:  # the only validation came after training had begun
            self.before, self.after, self.after_step = {}, self.before, self.before_step
        self._print(console)
        if not self.after and trainer.enable_validation:
            interval = f"trainer.val_check_interval is {trainer.val_check_interval}"
            console.print(f"No table of both tasks: {interval}, so no validation came after training.", soft_wrap=True)
        if hasattr(pl_module, "infotok"):
            heads = sum(parameter.numel() for parameter in pl_module.infotok.parameters())
            console.print(f"Stripped: {heads:,} parameters of heads that only training needs.")
        for line in self._next_commands(trainer, Path(run) if run else None):
            console.print(escape(line), soft_wrap=True, highlight=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print what `validate` found: all but what the terms report, and some of that if heads were trained."""
        run = run_folder(trainer) if stage == "validate" else None
        if stage != "validate" or not trainer.is_global_zero:
            return
        console = Console()
        # Lightning keeps the callbacks' state of a checkpoint: its "before" may be of other data.
        self.before, self.after, self.after_step = {}, _measured(trainer), trainer.global_step
        self._print(console, self._others(trainer))
        if run is not None:
            console.print(f"All numbers: {escape(str(Path(run, RESULT_FILE)))}", soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """The first metrics, so that a resumed run still compares with its start."""
        return {"before": self.before, "before_step": self.before_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the first metrics of the run."""
        # Older checkpoints do not say when it was.
        self.before, self.before_step = state_dict["before"], state_dict.get("before_step", 0)

    def _print(self, console: Console, others: Mapping[str, float] | None = None) -> None:
        if not self.after:
            return
        console.print(self._tasks(others or {}))
        if self.after_step:  # else no head was trained
            console.print(self._information())
        if not self._has_scores():
            console.print(self._answer_table())

    def _tasks(self, others: Mapping[str, float]) -> Table:
        first = "before training and " if self.before_step == 0 else f"at step {self.before_step} and "
        table = Table(title=f"Validation, {first if self.before else ''}at step {self.after_step}")
        # Names that begin alike would be cut to the same.
        table.add_column("", overflow="fold")
        for column in (*(("before", "after") if self.before else ("measured",)), "standard error", "chance"):
            table.add_column(column, justify="right")
        for label, name in TASK_ROWS:
            if name in self.after and (name not in OPEN or self._has_scores()):
                before = [self.before.get(name)] if self.before else []
                values = (*before, self.after[name], *(self.after.get(other) for other in _beside(name)))
                table.add_row(label, *(_number(value) for value in values))
        for name, value in others.items():
            table.add_row(name, _number(value))
        return table

    def _others(self, trainer: pl.Trainer) -> dict[str, float]:
        """What else was measured, under its own name: scores of each kind, and what other callbacks log."""
        labelled = {other for _, name in TASK_ROWS for other in (name, *_beside(name))}
        others = {
            name: value
            for name, value in self.after.items()
            if name not in labelled | OPEN and not OF_THE_OBJECTIVE.fullmatch(name)
        }
        for callback in trainer.callbacks:
            if isinstance(callback, RunResult) and callback.benchmarks.rows:
                others |= {name: value for name, value in callback.benchmarks.rows[-1].items() if name != "step"}
        return others

    def _has_scores(self) -> bool:
        """Whether the questions are ones whose answers can be scored."""
        return any(name.startswith(ANSWERS) for name in self.after.keys() - OPEN)

    def _answer_table(self) -> Table:
        table = Table(title="Answers about images that were not trained on")
        for column in ("question", "answer", "truth"):
            table.add_column(column)
        for row in self._answers:
            table.add_row(*map(escape, row))
        return table

    def _information(self) -> Table:
        table = Table(title="Information in the shared tokens")
        for column in ("", "understanding", "generation"):
            table.add_column(column, justify="left" if not column else "right")
        for label, name in INFORMATION_ROWS:
            values = [self.after.get(f"val/{branch}/{name}") for branch in ("understanding", "generation")]
            if any(value is not None for value in values):
                table.add_row(label, *(_number(value) for value in values))
        return table

    def _next_commands(self, trainer: pl.Trainer, run: Path | None) -> list[str]:
        lines = [] if run is None else [f"Run: {run}"]
        if run is not None and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            lines += [f"  tensorboard --logdir {shlex.quote(str(run.parent))}"]
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportInference)]
        if exports and not trainer.fast_dev_run:
            folder = exports[0].target(run or Path(trainer.default_root_dir))
            model = shlex.quote(str(folder))
            command = "  python -m infotok_lit"
            sources = getattr(trainer.datamodule, "validation_sources", {}).values()
            asked = _about(self._caption, self._questions if len(set(map(id, sources))) < 2 else [])
            caption, question = (shlex.quote(shorten(text, LONGEST)) for text in (self._caption, asked))
            lines += [
                f"Inference weights: {folder}",
                f"{command} generate --model {model} --prompt {caption} --out picture.png",
                f"{command} describe --model {model} --image picture.png --prompt {question}",
            ]
        return lines


def _beside(name: str) -> list[str]:
    """The metrics that stand beside one in the table."""
    group, _, last = name.rpartition("/")
    return [f"{group}/{other}" for other in BESIDE] if last == "overall" else []


def _measured(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def _about(caption: str, questions: Sequence[str]) -> str:
    """The question that says most in a caption's own words; what is drawn from the caption can then answer it."""
    words = set(WORD.findall(caption.lower()))

    def share(question: str) -> float:
        asked = WORD.findall(question.lower())
        return sum(word in words for word in asked) / max(len(asked), 1)

    return max(questions, key=share, default=DESCRIBE)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
