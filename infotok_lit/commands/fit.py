"""`fit` and `validate`: LightningCLI over our modules and data."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from infotok_lit.assets import QUICKSTART_CONFIG
from infotok_lit.checkpoints import CheckpointError, is_run_checkpoint, newest_checkpoint
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.errors import MissingFileError
from infotok_lit.modules.infotok_module import InfoTokModule


class InfoTokCLI(LightningCLI):
    """LightningCLI with our two subcommands, and a `--ckpt_path last` that never starts afresh in silence."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, with the arguments that the CLI fills in."""
        skipped = {"model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}
        return {"fit": skipped, "validate": skipped}

    def instantiate_classes(self) -> None:
        """Instantiate what is configured; a value that a class refuses ends like one that parsing refuses."""
        try:
            super().instantiate_classes()
        except (ValueError, FileNotFoundError) as error:
            self.parser.error(str(error))

    def before_fit(self) -> None:
        """Find the checkpoint to go on from."""
        self._resolve_checkpoint()

    def before_validate(self) -> None:
        """Find the checkpoint to measure."""
        self._resolve_checkpoint()

    def _resolve_checkpoint(self) -> None:
        """Replace `last` by the newest checkpoint, and refuse a damaged one before anything is built."""
        given = self.config[self.subcommand].ckpt_path
        if given == "last":
            found = str(last_checkpoint(self.trainer))
            self.config[self.subcommand].ckpt_path = self.config_init[self.subcommand].ckpt_path = found
        elif given is not None and Path(given).is_file() and not is_run_checkpoint(Path(given)):
            raise CheckpointError(f"--ckpt_path {given} is truncated, or is not a checkpoint of an infotok_lit run")

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint: LightningCLI would read all of it, for hyper-parameters that override."""


def last_checkpoint(trainer: Trainer) -> Path:
    """The newest checkpoint of the trainer's earlier runs: below the folders of its loggers and checkpoint callbacks.

    Raises:
        MissingFileError: if there is none, rather than a silent fresh start.
    """
    folders = [Path(logger.save_dir, logger.name or "") for logger in trainer.loggers if logger.save_dir is not None]
    chosen = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders += [Path(folder) for folder in chosen if folder is not None]
    folders = folders or [Path(trainer.default_root_dir, "checkpoints")]
    found = newest_checkpoint(folders)
    if found is None:
        below = " or ".join(str(folder.resolve()) for folder in folders)
        raise MissingFileError(f"--ckpt_path last: no checkpoint below {below}; start without --ckpt_path")
    return found


def ignore_expected_warnings() -> None:
    """Silence what Lightning says of choices that we make on purpose, and of its own dependencies."""
    for message in (
        "LightningCLI's args parameter is intended",
        r"Found 1 module\(s\) in eval mode",  # the frozen autoencoder
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=rf".*{message}")


def run(argv: Sequence[str]) -> InfoTokCLI:
    """Run `fit` or `validate`; without a --config it is the quickstart's, and overrides apply to it.

    Args:
        argv: the subcommand and its arguments, as on the command line.

    Returns:
        what ran, for Python code that looks further: its `trainer`, `model` and `datamodule`.
    """
    arguments = list(argv)
    if not any(argument.startswith(("--config", "-c")) for argument in arguments):
        arguments[1:1] = ["--config", str(QUICKSTART_CONFIG)]
    ignore_expected_warnings()
    return InfoTokCLI(
        InfoTokModule,
        UnifiedDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "python -m infotok_lit"},
        auto_configure_optimizers=False,
        args=arguments,
    )


def main(argv: Sequence[str]) -> int:
    """`fit` and `validate` of the command line."""
    run(argv)
    return 0
