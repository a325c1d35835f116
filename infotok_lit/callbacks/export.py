"""Strips the heads at the end of training and leaves an inference folder in the run."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from infotok_lit.callbacks.weight_average import WeightAverage
from infotok_lit.errors import SettingsError
from infotok_lit.files import free_path
from infotok_lit.models.export import (
    DType,
    ExportError,
    ExportExistsError,
    Format,
    Weights,
    export_model,
    replaceable_files,
    run_provenance,
)
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.average import average_updates, weights_in_words
from infotok_lit.modules.run_callbacks import run_folder

DEFAULT_FOLDER = "export"


class ExportInference(pl.Callback):
    """At the end of `fit`, write the model without everything that only training needs.

    No training ends without weights: where the folder cannot be written or replaced after all, they go to the next free
    name beside it, or into the run.

    Args:
        folder: Where to write; default: `export` in the run folder, or of a run without a logger, in its
            `default_root_dir`.
        file_format: `safetensors`, or `pth` for the official single files.
        dtype: Cast the weights; default: as they were trained.
        force: Replace an earlier export; anything else is never replaced.
        weights: Beside the WeightAverage callback, the moving average, or the raw weights of the last step. Without it
            the two are the same.
    """

    def __init__(
        self,
        folder: str | None = None,
        file_format: Format = "safetensors",
        dtype: DType | None = None,
        force: bool = False,
        weights: Weights = "averaged",
    ) -> None:
        self.folder = folder
        self.file_format = file_format
        self.dtype = dtype
        self.force = force
        self.weights = weights
        self.written: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse before training, not after: a target that exists or cannot be written, an average of Lightning's."""
        if stage != "fit":
            return
        self.written = None
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            raise SettingsError(
                "ExportInference: Lightning's averaging loses the weights of the last step, and cannot be sharded; use "
                "infotok_lit.callbacks.WeightAverage in its place"
            )
        if self.folder is not None:
            self._check_folder(Path(self.folder))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On the first process, write to the folder or, where that fails, to where there is room; a dry run does not.

        The others help it to collect a model that they share out.
        """
        if trainer.fast_dev_run:
            return
        own = run_folder(trainer)
        run = Path(own or trainer.default_root_dir)
        # The folder of a run can only hold an earlier export of the same run; that of all runs without one, any.
        force = self.force or (own is not None and self.folder is None)
        average = next((callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)), None)
        # What the run leaves in memory is the average's own setting.
        with nullcontext() if average is None else average.showing(pl_module, self.weights == "averaged"):
            self._export(trainer, pl_module, average, run, force)

    def _export(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, average: WeightAverage | None, run: Path, force: bool
    ) -> None:
        if not trainer.is_global_zero:
            with pl_module.plain_base():
                return
        checkpoint: dict[str, Any] = {"state_dict": {}}
        pl_module.on_save_checkpoint(checkpoint)
        if average:
            checkpoint["callbacks"] = {average.state_key: average.state_dict()}
        if self.weights == "averaged" and average_updates(checkpoint) == 0:
            rank_zero_warn("ExportInference: the average was never updated, so it is what training began with")
        with pl_module.plain_base(exact=True) as base:
            try:
                self.written = self._write(base, self.target(run), checkpoint, run, force)
            except ExportError as error:
                if self.folder is None:
                    raise
                rank_zero_warn(f"ExportInference: {error}; the export goes into the run instead")
                self.written = self._write(base, run / DEFAULT_FOLDER, checkpoint, run, force)

    def target(self, run: Path) -> Path:
        """The folder that `fit` leaves, given the run's; after `fit`, the one that it did leave."""
        return self.written or (Path(self.folder) if self.folder is not None else run / DEFAULT_FOLDER)

    def _check_folder(self, folder: Path) -> None:
        try:
            replaceable_files(folder, self.force)
        except ExportExistsError as error:
            if not self.force:
                raise ExportExistsError(
                    f"ExportInference: {folder} exists; choose another folder or set force: true to replace an export"
                ) from error
            rank_zero_warn(f"ExportInference: {error}. This run's export goes to {free_path(folder)}")
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        if not os.access(above, os.W_OK):
            raise ExportError(f"ExportInference: {folder} cannot be written, because {above} is read-only")

    def _write(self, base: UnifiedModel, out: Path, checkpoint: dict[str, Any], run: Path, force: bool) -> Path:
        try:
            replaceable_files(out, force)
        except ExportExistsError as error:
            rank_zero_warn(f"ExportInference: {error}")
            out = free_path(out)
        words = weights_in_words(checkpoint, self.weights)
        export_model(
            base,
            out,
            run_provenance(checkpoint, run, words),
            self.file_format,
            self.dtype,
            force,
            weights="averaged" if words.startswith("moving") else "raw",
            init_from=checkpoint["infotok_lit"]["init_from"],
        )
        return out
