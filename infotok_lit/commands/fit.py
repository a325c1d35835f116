"""`fit` and `validate`: LightningCLI over any LightningModule and DataModule that a configuration names."""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from infotok_lit.assets import DEFAULTS_CONFIG, OVER, QUICKSTART_CONFIG, config_chain
from infotok_lit.callbacks.history import RunResult
from infotok_lit.callbacks.report import FinalReport
from infotok_lit.commands.fit_checks import (
    check_batches,
    check_run_folder,
    check_settings,
    check_slurm,
    is_off,
    warn_of_odd_settings,
)
from infotok_lit.commands.fit_resume import chosen_checkpoint, explain_misfit, run_folders, shaping_settings
from infotok_lit.commands.mistakes import check_config, one_sentence
from infotok_lit.commands.parsing import PROGRAM, normalised
from infotok_lit.errors import TERMINATED, ExplainedError, SettingsError
from infotok_lit.modules.run_callbacks import run_folder
from infotok_lit.modules.run_checkpoint import WholeCheckpoints, names_in, remove_leftovers, remove_start

LOST = re.compile("Connection (closed|reset) by peer|remote worker|Socket closed")
"""What backends of torch.distributed say where a process is gone."""

HELP = """Fine-tune, or measure, what a configuration describes: a model, data and a trainer.

  {program} {command}                                                the quickstart: a small embedded model, any CPU
  {program} {command} --config harmon/0.5b --config data/folder      shipped configurations, laid over one another
  {program} {command} --config mine.yaml --trainer.max_steps 100     a file of your own, and a single setting

Mostly set: --trainer.max_steps, --trainer.val_check_interval (in batches), --trainer.devices, --trainer.precision,
--data.init_args.understanding_batch_size and generation_batch_size, --model.init_args.init_from (initial weights),
--model.init_args.optimiser.lr, --model.init_args.objective.terms ([] for plain fine-tuning), --ckpt_path last (go on
with an earlier run), and --trainer.logger.init_args.name (a run's folder is runs/NAME/version_N).

Configurations are files, or names below configs/; later ones win. Below are all options of the model (HarmonModule; for
another: --model.help CLASS_PATH), of the data, and of Lightning's trainer. --print_config prints what they come to."""


class InfoTokCLI(LightningCLI):
    """What a configuration describes, instantiated, and run if so wanted.

    Args:
        argv: `fit` or `validate`, and its options as on the command line; without a --config the quickstart's.
        run: False only instantiates `model`, `datamodule` and `trainer`.

    Raises:
        SettingsError: for settings that are unknown, wrong, or cannot be meant.
    """

    def __init__(self, argv: Sequence[str], run: bool = True) -> None:
        self.command, self.arguments = argv[0], with_defaults(normalised(argv[1:]))
        self._call_settings: list[str] = []
        quieten()
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            parser_class=FitParser,
            parser_kwargs={"prog": f"{PROGRAM} {self.command}", "exit_on_error": False, "allow_abbrev": False},
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": RunResult()},
            run=False,
            args=[_with_null(argument) for argument in self.arguments],
        )
        if run:
            self.start()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add how checkpoints are kept, and what the trainer's method takes beside model and data (--ckpt_path)."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_argument(
            f"--{OVER}", type=str | list[str] | None, help="in a file: what it is laid over, as paths from its folder"
        )
        given = {"model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}
        self._call_settings = parser.add_method_arguments(pl.Trainer, self.command, skip=given)
        if self.command == "validate":
            parser.set_defaults(verbose=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is one sentence."""
        with one_sentence(parser, self.arguments):
            super().parse_arguments(parser, args)
        # What is saved as a run's config.yaml is whole: it lies over nothing.
        self.config[OVER] = None

    def before_instantiate_classes(self) -> None:
        """Refuse what the trainer would only stumble over."""
        check_settings(self.config, self.command)

    def instantiate_classes(self) -> None:
        """Instantiate; a value that a class refuses ends like one that parsing refuses."""
        with one_sentence(self.parser, self.arguments):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The configured trainer, without the callbacks that one of its switches turns off."""
        settings = self.config_init.trainer
        if settings.enable_checkpointing is False or any(
            isinstance(one, Checkpoint) for one in _as_list(settings.callbacks)
        ):
            # Off, or configured in the list of callbacks.
            self.parser.callback_keys = []
        settings.callbacks = [one for one in _as_list(settings.callbacks) if not is_off(one, settings)]
        if not any(isinstance(plugin, pl.plugins.io.CheckpointIO) for plugin in _as_list(settings.plugins)):
            settings.plugins = [*_as_list(settings.plugins), WholeCheckpoints()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError) as error:
            raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
        check_slurm(trainer)
        return trainer

    def start(self) -> None:
        """Run the subcommand; a start that fails leaves no run folder.

        Raises:
            SystemExit: 143, after a checkpoint, if the process was asked to end.
        """
        call = {name: self.config_init[name] for name in self._call_settings}
        call["ckpt_path"] = chosen_checkpoint(self.trainer, call["ckpt_path"], self.settings, self.command)
        self.config.ckpt_path = None if call["ckpt_path"] is None else str(call["ckpt_path"])
        if self.command != "fit" or call["ckpt_path"] is None:
            check_run_folder(self.trainer)
        for folder in run_folders(self.trainer) if self.trainer.is_global_zero else ():
            remove_leftovers(folder)
        if self.command == "fit":
            check_batches(self.config, self.trainer)
            warn_of_odd_settings(self.config)
        elif not any(isinstance(callback, FinalReport) for callback in self.trainer.callbacks):
            call["verbose"] = True  # every number, by Lightning: nothing else would say any
        with self._ending(call["ckpt_path"]):
            getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **call)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration in primitives; it was parsed, and need not be validated again."""
        return yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_validation=True))

    @contextlib.contextmanager
    def _ending(self, checkpoint: Path | None) -> Iterator[None]:
        folders = {Path(logger.log_dir) for logger in self.trainer.loggers if getattr(logger, "log_dir", None)}
        before = {folder: names_in(folder) for folder in folders} if self.trainer.is_global_zero else {}
        try:
            yield
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
        except Exception as error:
            if checkpoint is not None:
                explain_misfit(error, checkpoint, self.settings)
            _explain_lost_process(error)
            raise
        finally:
            if not any(callback.began for callback in self.trainer.callbacks if isinstance(callback, RunRecord)):
                for folder, names in before.items():
                    remove_start(folder, names)

    def _set_seed(self) -> None:
        """Seed; SettingsError for a number that is no seed of numpy's."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingsError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint: LightningCLI would read all of it, for hyper-parameters that override."""


class ModelAndData(InfoTokCLI):
    """The model and the data that a configuration of fit describes, without its trainer: so wherever its cards are.

    Args:
        fit_arguments: what `fit` is given.
        command: what needs them, for the message.

    Raises:
        SettingsError: as for `fit`, and for a model or data that are none of ours.
    """

    def __init__(self, fit_arguments: Sequence[str], command: str) -> None:
        super().__init__(["fit", *fit_arguments], run=False)
        if not hasattr(self.model, "build_base") or not hasattr(self.datamodule, "training_sources"):
            raise SettingsError(f"{command} needs a configuration with one of our base models and a UnifiedDataModule")

    def before_instantiate_classes(self) -> None:
        """Nothing is refused: there is no trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """There is none."""


class FitParser(LightningArgumentParser):
    """Lightning's parser, with help that begins with our own options."""

    def format_help(self) -> str:
        """The usual commands, then the options of model and data, then the trainer's; or those of one class."""
        usual = super().format_help()
        if "\noptions:" not in usual:  # what --model.help CLASS_PATH asks for
            return usual
        from infotok_lit.data.datamodule import UnifiedDataModule
        from infotok_lit.modules import HarmonModule

        command = self.prog.split()[-1]
        own = ArgumentParser(
            add_help=False,
            prog=self.prog,
            usage="%(prog)s [--config FILE_OR_NAME ...] [--ckpt_path PATH|last] [--KEY VALUE ...]",
        )
        own.description = "\0"
        own.add_class_arguments(HarmonModule, "model.init_args", fail_untyped=False)
        own.add_class_arguments(UnifiedDataModule, "data.init_args", fail_untyped=False)
        head, _, options = own.format_help().partition("\0")
        return "\n".join(
            [head + HELP.format(program=PROGRAM, command=command), options.rstrip(), usual[usual.index("\noptions:") :]]
        )


class RunRecord(SaveConfigCallback):
    """Writes config.yaml into the run's folder, and into checkpoints the settings that shape the run.

    It also saves when the process is asked to end.
    """

    began = False  # True once the run has come to its first batch: from here on its folder stays
    shaping: dict[str, Any] = {}  # found once, not anew for every checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing: a start that fails leaves no config.yaml, and that of an earlier run as it was."""

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run has begun: write config.yaml; without a logger there is no run folder, and nothing is written.

        Lightning's own way writes where the logger saves, which with some loggers is one folder for all runs.
        """
        if self.began:
            return
        self.began = True
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            path = Path(folder, self.config_filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, skip_validation=True, overwrite=True)

    on_train_start = on_validation_start = on_sanity_check_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Have the state saved where SIGTERM ends the run: it is whole then."""
        if isinstance(exception, SIGTERMException):
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = True

    def state_dict(self) -> dict[str, Any]:
        """What shapes the run, for whoever resumes it."""
        if not self.shaping:
            content = self.parser.dump(self.config, skip_link_targets=False, skip_validation=True)
            self.shaping = shaping_settings(yaml.safe_load(content))
        return {"settings": self.shaping}


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments over what every run has unless told otherwise; without a --config, over the quickstart."""
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith(("--config=", "-c="))]
    files = [DEFAULTS_CONFIG, *config_chain(named or [QUICKSTART_CONFIG])]
    others = [argument for argument in arguments if not argument.startswith(("--config=", "-c="))]
    contents = [check_config(path) for path in files]
    in_files = any("class_path" in (content.get("model") or {}) for content in contents)
    if not in_files and not any(argument.startswith(("--model=", "--model.class_path=")) for argument in others):
        raise SettingsError(
            f"{files[-1]} names no model: it is an overlay; lay it over a complete configuration, as in --config "
            f"harmon/scenes32 --config {files[-1]}"
        )
    return [*(f"--config={path}" for path in files), *others]


def _with_null(argument: str) -> str:
    """A null deep in a class's settings as a piece of configuration: jsonargparse hands it on as the word None."""
    name, _, value = argument.partition("=")
    if "null" not in value or "." not in name.partition(".init_args.")[2]:
        return argument
    with contextlib.suppress(yaml.YAMLError):
        content = yaml.safe_load(value)
        if content is None or (isinstance(content, dict) and None in content.values()):
            for part in reversed(name.removeprefix("--").split(".")):
                content = {part: content}
            return f"--config={json.dumps(content)}"
    return argument


def quieten() -> None:
    """Silence what Lightning says of choices that we make on purpose, of its own dependencies, and of its products."""
    for message in (
        "LightningCLI's args parameter is intended",
        r"Found \d+ module\(s\) in eval mode",  # frozen parts
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "The dirpath has changed",  # a run that goes on has a folder of its own
    ):
        warnings.filterwarnings("ignore", message=rf".*{message}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _explain_lost_process(error: Exception) -> None:
    """In a process that lost another one of its run: one line, since the other says what happened."""
    is_lost = isinstance(error, torch.distributed.DistError) or LOST.search(str(error))
    if is_lost and torch.distributed.is_initialized() and not isinstance(error, ExplainedError):
        raise SettingsError("this process ended because another one of the run did, which says why") from error


def run(argv: Sequence[str]) -> InfoTokCLI:
    """Run `fit` or `validate`; without a --config it is the quickstart's, and overrides apply to it.

    Args:
        argv: the subcommand and its arguments, as on the command line.

    Returns:
        what ran, for Python code that looks further: its `trainer`, `model` and `datamodule`.
    """
    return InfoTokCLI(argv)


def main(argv: Sequence[str]) -> int:
    """`fit` and `validate` of the command line."""
    run(argv)
    return 0
