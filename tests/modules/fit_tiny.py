"""Fits the tiny model with dropout, and records every step; as a script: in a process that can be killed.

python fit_tiny.py FOLDER CHECKPOINT|none PAUSE_AT
"""

import json
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from tiny import TinyModule, scenes_data

STEPS = 7
NEVER = 10**9


class Crash(Exception):
    """What a run dies of."""


class OneFolderLogger(Logger):
    """As that of Weights & Biases: one folder for all runs, in which each has a name, and its checkpoints."""

    runs = count()

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, f"run{next(self.runs)}"

    name, experiment = "project", None
    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._save_dir)

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        """Nowhere."""

    def log_hyperparams(self, params: dict) -> None:
        """Nowhere."""


class Record(pl.Callback):
    """Per batch: step, samples, and after the last batch of a step its metrics. Stops a run where it is told to."""

    def __init__(self, crash_at: int = NEVER, pause_at: int = NEVER, path: Path | None = None) -> None:
        self.crash_at = crash_at
        self.pause_at = pause_at
        self.path = path
        self.rows: list[list[Any]] = []
        self.trained = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self.trained &= pl_module.base.training
        if trainer.global_step == self.crash_at:
            raise Crash
        if trainer.global_step == self.pause_at:
            self.path.with_name("paused").touch()
            signal.pause()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = [batch[branch].names for branch in ("understanding", "generation")]
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # Without bands of noise levels: where a step has no sample in a band, its last value is still there.
        logged = [name for name in trainer.callback_metrics if name.startswith("train/") and "/t_" not in name]
        metrics = {name: float(trainer.callback_metrics[name]) for name in logged}
        self.rows.append([trainer.global_step, *names, metrics if is_last else {}])
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows))


def fit(
    folder: Path,
    checkpoint: Path | None = None,
    record: Record | None = None,
    accumulate: int = 1,
    val_every: int = 3,
    module: pl.LightningModule | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> pl.Trainer:
    """A run of `steps` steps, from its start or from a checkpoint, with a checkpoint every second step.

    The Trainer is built as a notebook would: nothing in it knows that resuming must be exact.
    """
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, "log"),
        callbacks=[ModelCheckpoint(every_n_train_steps=2, save_last=True), *([] if record is None else [record])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = TinyModule(dropout=0.1) if module is None else module
    trainer.fit(module, scenes_data(), ckpt_path=checkpoint)
    return trainer


def main(folder: str, checkpoint: str, pause_at: str) -> None:
    """Fit, leaving rows.json after every step and end.ckpt at the end."""
    record = Record(pause_at=int(pause_at), path=Path(folder, "rows.json"))
    trainer = fit(Path(folder), None if checkpoint == "none" else Path(checkpoint), record)
    trainer.save_checkpoint(Path(folder, "end.ckpt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
