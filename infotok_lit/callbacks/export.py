"""Strips the heads at the end of training and leaves an inference folder in the run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from infotok_lit.models.export import DType, Format, export_model, run_provenance


class ExportInference(pl.Callback):
    """At the end of `fit`, write the model without everything that only training needs.

    Args:
        folder: Where to write; default: `export` in the run folder.
        file_format: `safetensors`, or `pth` for the official single files.
        dtype: Cast the weights; default: as they were trained.
        force: Replace an existing folder.
    """

    def __init__(
        self,
        folder: str | None = None,
        file_format: Format = "safetensors",
        dtype: DType | None = None,
        force: bool = False,
    ) -> None:
        self.folder = folder
        self.file_format = file_format
        self.dtype = dtype
        self.force = force

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a target that exists before training, not after."""
        if stage == "fit" and self.folder is not None and Path(self.folder).exists() and not self.force:
            raise FileExistsError(f"ExportInference: {self.folder} exists; choose another folder or set force: true")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export on the first process."""
        run = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        checkpoint: dict[str, Any] = {}
        pl_module.on_save_checkpoint(checkpoint)
        # The run's own export folder can only hold an earlier export of the same run.
        force = self.force or self.folder is None
        with pl_module.plain_base() as base:
            export_model(base, self.target(run), run_provenance(checkpoint, run), self.file_format, self.dtype, force)

    def target(self, run: Path) -> Path:
        """The folder that `fit` leaves, given the run's."""
        return Path(self.folder) if self.folder is not None else run / "export"
