"""`fit` and `validate`: LightningCLI over our modules and data."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from infotok_lit.assets import QUICKSTART_CONFIG
from infotok_lit.callbacks.step_seed import StepSeed
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.modules.infotok_module import InfoTokModule
from infotok_lit.modules.run import LAST


class InfoTokCLI(LightningCLI):
    """LightningCLI with our two subcommands, and a `--ckpt_path last` that never starts afresh in silence."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, with the arguments that the CLI fills in."""
        skipped = {"model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}
        return {"fit": skipped, "validate": skipped}

    def before_instantiate_classes(self) -> None:
        """Resolve `--ckpt_path last`."""
        config = self.config[self.subcommand]
        if config.ckpt_path == "last":
            config.ckpt_path = str(last_checkpoint(_log_root(config)))


def last_checkpoint(root: Path) -> Path:
    """The newest last.ckpt below a folder; FileNotFoundError if there is none, rather than a silent fresh start."""
    found = sorted(root.rglob(LAST), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"--ckpt_path last: no {LAST} below {root.resolve()}; start without --ckpt_path")
    return found[-1]


def _log_root(config: Any) -> Path:
    """The folder that holds the versions of the configured logger's runs."""
    logger = config.trainer.logger
    if hasattr(logger, "init_args"):
        return Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
    return Path(config.trainer.default_root_dir or ".")


def main(argv: Sequence[str]) -> int:
    """Run `fit` or `validate`; without a --config it is the quickstart's, and overrides apply to it."""
    arguments = list(argv)
    if not any(argument.startswith(("--config", "-c")) for argument in arguments):
        arguments[1:1] = ["--config", str(QUICKSTART_CONFIG)]
    # The arguments are this process's own: Lightning warns because it cannot know.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    InfoTokCLI(
        InfoTokModule,
        UnifiedDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"callbacks": [StepSeed()]},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        args=arguments,
    )
    return 0
