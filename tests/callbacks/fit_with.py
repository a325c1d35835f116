"""Fits the tiny model with callbacks, on few Scenes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TinyModule, scenes_data

from infotok_lit.data.datamodule import UnifiedDataModule

Logged = dict[str, torch.Tensor]


def fit(
    folder: Path,
    callbacks: Sequence[pl.Callback],
    module: TinyModule | None = None,
    steps: int = 4,
    checkpoint: Path | None = None,
    data: UnifiedDataModule | None = None,
    **options: Any,
) -> pl.Trainer:
    """A validation, then steps of which every second is logged and followed by a checkpoint and a validation."""
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": -1,
        "log_every_n_steps": 2,
        "logger": TensorBoardLogger(folder, "log"),
        "callbacks": [*callbacks, ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(**{**defaults, **options})
    module = TinyModule() if module is None else module
    trainer.fit(module, scenes_data(val_samples=8) if data is None else data, ckpt_path=checkpoint)
    return trainer


def events(trainer: pl.Trainer) -> EventAccumulator:
    """What a trainer's TensorBoard logger wrote."""
    for logger in trainer.loggers:
        logger.experiment.flush()
    found = EventAccumulator(trainer.log_dir, size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def pictures(trainer: pl.Trainer) -> list[str]:
    """The names of the PNG files of a run."""
    return sorted(path.name for path in Path(trainer.log_dir, "pictures").glob("*.png"))


class Keep(pl.Callback):
    """Leaves what each rank logged under a part of a name in a folder."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder = folder
        self.part = part

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: value for name, value in trainer.callback_metrics.items() if self.part in name}
        torch.save(logged, self.folder / f"{trainer.global_rank}_of_{trainer.world_size}.pt")


def validate_in_one_and_two_processes(
    folder: Path, make: Callable[[], tuple[pl.Callback, TinyModule]], part: str
) -> tuple[Logged, Logged, Logged]:
    """What one process logs under `part` of a name, and the first and the second of two."""
    for processes in (1, 2):
        validate_in(folder, processes, make, part)
    return tuple(torch.load(folder / f"{name}.pt", weights_only=True) for name in ("0_of_1", "0_of_2", "1_of_2"))


def validate_in(folder: Path, processes: int, make: Callable[[], tuple[pl.Callback, TinyModule]], part: str) -> None:
    """Validate in so many processes; each leaves in the folder what it has logged under `part` of a name."""
    callback, module = make()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        callbacks=[callback, Keep(folder, part)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, scenes_data(val_samples=8), verbose=False)
