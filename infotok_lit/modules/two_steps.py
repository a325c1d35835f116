"""Two training steps, of which the second does all that a step of a fit may do; and the memory that it takes."""

import ctypes
import gc
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from infotok_lit.errors import SettingsError
from infotok_lit.modules.gradients import ENCODER_EVERY

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""


def run_two_steps(
    module: pl.LightningModule, data: pl.LightningDataModule, callbacks: list[pl.Callback], **trainer_settings: Any
) -> None:
    """Train for two optimiser steps, keeping nothing: one as most are, and one that logs all that a step may log."""
    every = 2
    settings = {"max_steps": every * ENCODER_EVERY, "log_every_n_steps": every}
    settings |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    with quiet_lightning():
        pl.Trainer(**settings, callbacks=[LastSteps(), *callbacks], **trainer_settings).fit(module, datamodule=data)


class LastSteps(pl.Callback):
    """Begins a run two steps before its end."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the steps as done that are not taken."""
        loop = trainer.fit_loop.epoch_loop
        for progress in (
            loop.automatic_optimization.optim_progress.optimizer.step,
            loop.manual_optimization.optim_step_progress,
        ):
            progress.total.completed = trainer.max_steps - 2


def measured_run(
    build: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    callbacks: list[pl.Callback],
    **trainer_settings: Any,
) -> int:
    """The memory in bytes that the same two steps take in truth: on a GPU of its tensors, else of this process.

    The steps run twice, for what is loaded or compiled once is no part of a step.

    Args:
        build: makes a module, not yet configured.
        data: makes the data.
        callbacks: what else acts in a step.
        trainer_settings: as for `dry_run`, and accelerator.

    Raises:
        SettingsError: on a CPU, where glibc is not.
    """
    on_cpu = trainer_settings["accelerator"] == "cpu"
    if on_cpu:
        if not _glibc():
            raise SettingsError("on a CPU --measure needs Linux with glibc, which says what is held; leave it out")
        # Before any tensor: blocks of 64 KiB and more go back to the system when they are freed, so that what is
        # resident is what is held, and not what the allocator keeps. A fit leaves it off: steps take 1.8 times as long.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    run_two_steps(build(), data(), callbacks, **trainer_settings)
    module = build()
    if not on_cpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        run_two_steps(module, data(), callbacks, **trainer_settings)
        return torch.cuda.max_memory_allocated()
    before = resident_memory() or 0
    Path("/proc/self/clear_refs").write_text("5")
    run_two_steps(module, data(), callbacks, **trainer_settings)
    return _resident("VmHWM") - before


def resident_memory() -> int | None:
    """Bytes that this process has in memory, without what its allocator could give back; None where glibc is not."""
    if not _glibc():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS")


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _resident(kind: str) -> int:
    """VmRSS, the memory of this process now, or VmHWM, at its worst since it was last asked to forget; bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside, Lightning says nothing that is no error, and warns of nothing: short fits are meant to be short."""
    names = ("lightning.fabric", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
