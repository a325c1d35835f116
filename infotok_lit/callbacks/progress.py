"""What a user watches while a run goes on: the bar, and in the logs the values that training starts from."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from infotok_lit.callbacks import throughput
from infotok_lit.callbacks.history import is_partial
from infotok_lit.modules.run_callbacks import logs_now


class Progress(RichProgressBar):
    """A bar over all optimiser steps of the run, with the losses and the speed at the last step that was logged.

    The total loss may rise while both tasks improve, as terms of the objective are weighed in, so it stands last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    @property
    def total_train_batches(self) -> int | float:
        """Batches until `trainer.max_steps`, as the data has no end."""
        if self.trainer.max_steps < 0:
            return super().total_train_batches
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The losses of the tasks, their total, and the speed; read from the device where they are logged only."""
        if logs_now(trainer):
            losses = [name for name in trainer.callback_metrics if name.startswith("train/") and name.endswith("/loss")]
            names = {name: name.removeprefix("train/").removesuffix("/loss") for name in losses if name.count("/") == 2}
            # The total comes last.
            names |= {"train/loss": "total loss"} if "train/loss" in losses else {}
            names |= {name: label for name, label in throughput.SHOWN.items() if name in trainer.callback_metrics}
            self._shown = {label: float(trainer.callback_metrics[name]) for name, label in names.items()}
        return dict(self._shown)

    def _get_train_description(self, current_epoch: int) -> str:
        # There is one epoch, which never ends; Lightning would count it.
        return "Training"


class StartingValues(pl.Callback):
    """Logs all `val/*` of the validation before training as step 0, which Lightning drops.

    It must be a whole one: `trainer.num_sanity_val_steps: -1`.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the values to the loggers."""
        if trainer.sanity_checking and not is_partial(trainer):
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=0)
