"""The table that a run ends with: both tasks before and after, against chance, and what the tokens hold."""

import shlex
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from infotok_lit.batch import GenerationBatch, UnderstandingBatch
from infotok_lit.callbacks.export import ExportInference

LONGEST = 100
"""Characters of a caption or question in a command to try."""
TASK_ROWS = (
    ("answers: exact match", "val/understanding/answers/overall", "val/understanding/answers/chance"),
    ("drawings: score", "val/generation/score/overall", "val/generation/score/chance"),
    ("  single object", "val/generation/score/single_object", None),
    ("  two objects, position", "val/generation/score/position", None),
    ("understanding loss (nats/token)", "val/understanding/loss", None),
    ("generation loss", "val/generation/loss", None),
    ("reconstruction loss", "val/reconstruction/loss", None),
)
"""Label, metric, metric of its chance level."""

INFORMATION_ROWS = (
    ("rate C (bits/token)", "rate_bits_per_token"),
    ("active units (fraction)", "active_units_fraction"),
    ("sufficiency S (nats/element)", "sufficiency_nats_per_element"),
    ("alignment bound (nats)", "alignment_bound_nats"),
    ("structure in the tokens (bits/image)", "probe/structure_bits"),
    ("texture in the tokens (bits/image)", "probe/texture_bits"),
)
"""Label, name in the objective's report."""


class FinalReport(pl.Callback):
    """Prints, when `fit` ends, the first validation beside the last one, and the commands to try next.

    The first validation is the one before training if `trainer.num_sanity_val_steps` is -1.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.after_step = 0
        self.question, self.caption = "what is in the image?", "a picture"

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember a question and a caption of the user's own data, for the commands to try."""
        if batch_idx == 0 and isinstance(batch, UnderstandingBatch):
            self.question = batch.questions[0]
        elif batch_idx == 0 and isinstance(batch, GenerationBatch) and batch.captions:
            self.caption = batch.captions[0]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metrics; those of the first validation for good."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if not self.before:
            self.before = metrics
        else:
            self.after, self.after_step = metrics, trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the report."""
        run = trainer.log_dir
        if not trainer.is_global_zero:
            return
        console = Console()
        if self.after:
            console.print(self._tasks())
            console.print(self._information())
        if hasattr(pl_module, "infotok"):
            heads = sum(parameter.numel() for parameter in pl_module.infotok.parameters())
            console.print(f"Stripped: {heads:,} parameters of heads that only training needs.")
        for line in self._next_commands(trainer, run):
            console.print(line, soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """The first metrics, so that a resumed run still compares with its start."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the first metrics of the run."""
        self.before = state_dict["before"]

    def _tasks(self) -> Table:
        table = Table(title=f"Validation, before training and at step {self.after_step}")
        for column in ("", "before", "after", "chance"):
            table.add_column(column, justify="left" if not column else "right")
        for label, name, chance in TASK_ROWS:
            if name in self.after:
                values = (self.before.get(name), self.after[name], self.after.get(chance) if chance else None)
                table.add_row(label, *(_number(value) for value in values))
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

    def _next_commands(self, trainer: pl.Trainer, folder: str | None) -> list[str]:
        if folder is None:
            return []
        run = Path(folder)
        lines = [f"Run: {run}", f"  tensorboard --logdir {run.parent}"]
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportInference)]
        if exports:
            folder = exports[0].target(run)
            command = "  python -m infotok_lit"
            caption, question = (shlex.quote(shorten(text, LONGEST)) for text in (self.caption, self.question))
            lines += [
                f"Inference weights: {folder}",
                f"{command} generate --model {folder} --prompt {caption} --out picture.png",
                f"{command} describe --model {folder} --image picture.png --prompt {question}",
            ]
        return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
