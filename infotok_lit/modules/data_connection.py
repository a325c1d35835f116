"""Hands the data what it takes from the model, and logs what it could not use."""

from typing import Any

import lightning.pytorch as pl

from infotok_lit.batch import BRANCHES
from infotok_lit.data.datamodule import UnifiedDataModule


class DataConnection(pl.Callback):
    """Connects a UnifiedDataModule with the module that it feeds; other data is left alone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before any loader is made; the base model, which has the processor, is built after this."""
        if isinstance(trainer.datamodule, UnifiedDataModule):
            negatives = {branch: pl_module.hard_negatives(branch) for branch in BRANCHES}
            trainer.datamodule.connect(lambda: pl_module.base.processor, negatives)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many broken samples training has skipped so far."""
        if isinstance(trainer.datamodule, UnifiedDataModule) and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("data/broken_samples", float(trainer.datamodule.broken_samples))
