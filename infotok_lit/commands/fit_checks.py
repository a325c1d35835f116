"""Settings that no run can be meant to have: refused, or warned of, before anything is built."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_warn

from infotok_lit.callbacks.history import is_finished_run
from infotok_lit.errors import SettingsError
from infotok_lit.objective.config import ObjectiveConfig

GPUS = ("gpu", "cuda")
LIGHTNINGS_SHARDING = ("fsdp", "deepspeed")
"""How the names begin of strategies of Lightning that a run refuses."""
HSIC_IMAGES = 4
"""The unbiased estimate divides by n - 3."""


def check_settings(config: Namespace, command: str) -> None:
    """Raise SettingsError for what the trainer would only stumble over."""
    _check_numbers(config)
    _check_trainer(config.trainer, command)
    _check_checkpoint(config.checkpoint)


def _check_numbers(config: Namespace) -> None:
    """SettingsError for a setting that is not a number (`.nan` in YAML), which no bound refuses."""
    for name, value in _leaves("", config.as_dict()):
        if isinstance(value, float) and math.isnan(value):
            raise SettingsError(f"{name} is nan, which is not a number; set it to one, or leave it out")


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """What stands at the ends of a configuration, each with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(f"{name}[{place}]", inner)
    else:
        yield name, value


def _check_trainer(trainer: Namespace, command: str) -> None:
    """Raise SettingsError for a trainer that has nothing to run on, or nothing to do."""
    if trainer.accelerator in GPUS and not torch.cuda.is_available():
        built = "this PyTorch is built for the CPU only" if torch.version.cuda is None else "PyTorch sees none"
        raise SettingsError(
            f"trainer.accelerator is {trainer.accelerator}, but there is no GPU here ({built}); add --config "
            "trainer/cpu, or set trainer.accelerator to auto"
        )
    _check_strategy(trainer.strategy)
    if trainer.devices in (0, "0", []):
        raise SettingsError(f"trainer.devices is {trainer.devices}; set it to 1 or more, or to auto")
    if trainer.accumulate_grad_batches < 1:
        raise SettingsError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; set it to 1 or more"
        )
    if (trainer.gradient_clip_val or 0) < 0:
        raise SettingsError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; set it above 0, or to null for none"
        )
    if command != "fit":
        return
    for name in ("limit_train_batches", "max_epochs", "max_steps"):
        if getattr(trainer, name) == 0:
            raise SettingsError(f"trainer.{name} is 0, so nothing would be trained; to measure only, use validate")


def _check_strategy(strategy: str | Namespace) -> None:
    """SettingsError for strategies of Lightning that would shard the model, whatever the machine."""
    name = (strategy if isinstance(strategy, str) else strategy.class_path).rpartition(".")[2]
    if name.lower().startswith(LIGHTNINGS_SHARDING):
        where = "" if torch.cuda.is_available() else " (it needs GPUs, and there is none here)"
        raise SettingsError(
            f"trainer.strategy {name} shards the model in a way that the objective's collectives do not support; take "
            f"it out, and add --config trainer/fsdp for FSDP2{where}; see docs/sharding.md"
        )


def _check_checkpoint(checkpoint: Namespace) -> None:
    """SettingsError for a link to the last checkpoint in a place that knows no links."""
    if checkpoint.save_last == "link" and "://" in str(checkpoint.dirpath or ""):
        raise SettingsError(
            f"checkpoint.dirpath is {checkpoint.dirpath}, where last.ckpt cannot be a link; add --checkpoint.save_last "
            "true for a copy, or take a folder of this machine"
        )


def check_run_folder(trainer: Trainer) -> None:
    """SettingsError where a finished run has the folder already: its settings and its results would be replaced."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        folder = getattr(logger, "log_dir", None)
        if folder is not None and is_finished_run(Path(folder)):
            raise SettingsError(
                f"{folder} holds a finished run, whose settings and results would be replaced; take another "
                "trainer.logger.init_args.version (null for the next number), or another name, or remove that folder"
            )


def check_slurm(trainer: Trainer) -> None:
    """SettingsError where SLURM started another number of processes, with which Lightning would train."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return
    started, wanted = int(os.environ["SLURM_NTASKS"]), trainer.num_devices * trainer.num_nodes
    if started != wanted:
        raise SettingsError(
            f"trainer.devices and trainer.num_nodes ask for {wanted} process(es), and SLURM started {started}: ask it "
            f"for --nodes={trainer.num_nodes} --ntasks-per-node={trainer.num_devices} and begin the command with srun, "
            "or set SLURM_JOB_NAME=interactive to have the processes started without SLURM"
        )


def check_batches(config: Namespace, trainer: Trainer) -> None:
    """Raise SettingsError where the global batch is too small for a term of the objective."""
    given, data = config.get("model.init_args.objective"), config.get("data.init_args")
    if given is None or data is None:
        return
    objective = ObjectiveConfig.from_dict(given.as_dict())
    for branch in objective.branches:
        size = data.get(f"{branch}_batch_size")
        if size is None:
            continue
        images = size * trainer.world_size
        where = f"data.init_args.{branch}_batch_size is {size} on {trainer.world_size} process(es)"
        if objective.estimator == "hsic" and objective.terms and images < HSIC_IMAGES:
            raise SettingsError(f"{where}: estimator hsic needs {HSIC_IMAGES} images at a time; raise it")
        aligned = objective.estimator == "variational" and "alignment" in objective.active_terms(branch)
        if aligned and images == 1 and not objective.negatives.queue_size and not objective.negatives.from_data:
            raise SettingsError(
                f"{where}: alignment has no other text to tell its own from; raise it, or set "
                "objective.negatives.queue_size"
            )


def warn_of_odd_settings(config: Namespace) -> None:
    """Warn of what can be run and is hardly meant."""
    batches, per_step = config.trainer.limit_train_batches, config.trainer.accumulate_grad_batches
    if isinstance(batches, int) and batches % per_step:
        rank_zero_warn(
            f"trainer.accumulate_grad_batches, {per_step}, does not divide trainer.limit_train_batches, {batches}: the "
            f"last step of each epoch has {batches % per_step} of {per_step} batches, and a gradient that is so much "
            "smaller"
        )
    optimiser, steps = config.get("model.init_args.optimiser"), config.trainer.max_steps
    if optimiser is None:
        return
    if optimiser.lr == 0 and not any(optimiser.group_lr.values()):
        rank_zero_warn("optimiser.lr is 0: no weight of the model moves, only the heads are trained")
    if 0 < steps <= optimiser.warmup_steps:
        rank_zero_warn(
            f"optimiser.warmup_steps is {optimiser.warmup_steps}, and trainer.max_steps {steps}: the learning rate "
            "never reaches its value; shorten the warm-up"
        )
    objective = config.get("model.init_args.objective")
    if objective is not None:
        _warn_of_idle_budgets(ObjectiveConfig.from_dict(objective.as_dict()))


def _warn_of_idle_budgets(objective: ObjectiveConfig) -> None:
    for branch in objective.branches if objective.terms else ():
        term = objective.weights(branch).constrained
        if term is not None and term not in objective.terms:
            rank_zero_warn(
                f"objective.{branch} has a budget or target for {term}, which is off: nothing keeps to it; add {term} "
                "to objective.terms"
            )


def is_off(callback: Callback, settings: Namespace) -> bool:
    """Whether a switch of the trainer turns a callback off, which Lightning would call a contradiction."""
    return (
        (settings.enable_progress_bar is False and isinstance(callback, ProgressBar))
        or (settings.enable_checkpointing is False and isinstance(callback, Checkpoint))
        or (settings.enable_model_summary is False and isinstance(callback, ModelSummary))
        or (settings.logger is False and isinstance(callback, LearningRateMonitor))
    )
