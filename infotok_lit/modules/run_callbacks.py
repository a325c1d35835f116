"""What every run gets, whatever its Trainer: exact resuming, orderly ends, data that knows its model, fit kernels."""

import os
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from infotok_lit.batch import BRANCHES
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.models.common.language_model import without_cudnn_attention
from infotok_lit.modules.base_model import encoding_of
from infotok_lit.seeding import seed_of


class ModelCallback(pl.Callback):
    """A callback that needs the module's weights before a run to resume is read, where Lightning has no hook."""

    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All weights are there, sharded if they are to be."""


def tell_model_is_built(pl_module: pl.LightningModule) -> None:
    """Call `on_model_built` of the trainer's callbacks, if there is a trainer."""
    trainer = pl_module._trainer
    for callback in () if trainer is None else trainer.callbacks:
        if isinstance(callback, ModelCallback):
            callback.on_model_built(trainer, pl_module)


def callbacks_of_every_run() -> list[pl.Callback]:
    """What makes resuming exact and what is logged true, whatever is trained."""
    return [StepSeed(), WholeSteps(), CheckpointStep(), OwnNumbers(), FreshScores()]


def callbacks_of_models() -> list[pl.Callback]:
    """The same, and what a unified model needs of its data and its device."""
    return [*callbacks_of_every_run(), DataConnection(), AttentionKernels()]


class WholeSteps(pl.Callback):
    """Ends and saves a run between two optimiser steps, as a checkpoint holds no gradients of a step's first batches.

    SIGTERM, and SLURM's signal to requeue, are obeyed in all processes if any of them got it. Lightning's handlers call
    at once, wherever a process is, what all must call together: one that gets the signal before another waits for it in
    the midst of a step, and neither ends.
    """

    def __init__(self) -> None:
        self._got = [0, 0]
        """The numbers of SIGTERM and of the signal to requeue, once they came."""
        self._held: dict[ModelCheckpoint, tuple[float | None, int]] = {}
        """Checkpoint callbacks that wait for the end of the step -> when they looked at the clock, and saved a step."""
        self._seen_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put notes in the place of handlers, which Lightning registers after this."""
        self._got = [0, 0]
        connector = trainer._signal_connector
        self._requeue = partial(type(connector)._slurm_sigusr_handler_fn, connector)
        connector._sigterm_notifier_fn = partial(self._note, 0)
        connector._slurm_sigusr_handler_fn = partial(self._note, 1)
        # With several processes it reads from the device at each batch whether the first one got the signal.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not save the step that a run goes on from again after the first batch of the next one."""
        self._seen_step = trainer.global_step
        for callback in trainer.checkpoint_callbacks if trainer.global_step else ():
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step: a collective call, which reads from the device where there are several processes."""
        # Not by the number of the batch: the last step of an epoch may have fewer.
        stepped, self._seen_step = trainer.global_step > self._seen_step, trainer.global_step
        if not stepped:
            self._hold(trainer)
            return
        terminated, requeued = self._agreed(trainer)
        if requeued:
            self._got[1] = 0
            self._requeue(requeued, None)
        # Lightning then ends the run at the end of the batch.
        trainer._signal_connector.received_sigterm = bool(terminated)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The same of SIGTERM."""
        trainer._signal_connector.received_sigterm = bool(self._agreed(trainer)[0])

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let checkpoint callbacks go on."""
        for callback, (looked, saved) in self._held.items():
            callback._last_time_checked, callback._last_global_step_saved = looked, saved
        self._held = {}

    on_validation_start = on_train_batch_start

    def _hold(self, trainer: pl.Trainer) -> None:
        """Have no checkpoint callback save after this batch what is due by time, or was not saved with its step."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                self._held[callback] = (callback._last_time_checked, callback._last_global_step_saved)
                callback._last_time_checked, callback._last_global_step_saved = None, trainer.global_step

    def _note(self, which: int, number: int, *_: Any) -> None:
        self._got[which] = number

    def _agreed(self, trainer: pl.Trainer) -> list[int]:
        """The numbers of the signals that any process got, 0 for none."""
        if trainer.world_size == 1:
            return self._got
        got = torch.tensor(self._got, dtype=torch.int32, device=trainer.strategy.root_device)
        dist.all_reduce(got, op=dist.ReduceOp.MAX)
        return got.tolist()


class OwnNumbers(pl.Callback):
    """Tells loggers in a step what was logged in it; Lightning repeats a number until it is logged anew."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget what earlier steps logged, but for what adds up over the epoch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            for number in trainer._results.values():
                number.has_reset |= not number.meta.on_epoch


class FreshScores(pl.Callback):
    """Has checkpoints that are chosen by a validation's number wait for it, where one follows at the same step.

    Lightning saves before it validates, by the number of the validation before.
    """

    def __init__(self) -> None:
        self._stale = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hide a stale number from ModelCheckpoint, which then waits for the validation by itself."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and (callback.monitor or "").startswith("val/"):
                callback._monitor_candidates = partial(self._candidates, callback)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before the checkpoints, which are the last callbacks."""
        self._stale = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What comes now is new."""
        self._stale = False

    def _candidates(self, callback: ModelCheckpoint, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        found = type(callback)._monitor_candidates(callback, trainer)
        return {name: value for name, value in found.items() if not (self._stale and name == callback.monitor)}


class CheckpointStep(pl.Callback):
    """Has `validate` measure a checkpoint at its own step, where Lightning takes its weights and stays at step 0.

    The objective's warm-ups, the names of pictures and the logs go by the step.
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the step; a run that goes on does so by itself."""
        if trainer.state.fn == "validate":
            self._before = trainer.global_step
            self._set(trainer, checkpoint["global_step"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Back to the trainer's own step, from which it may train."""
        if self._before is not None:
            self._set(trainer, self._before)
            self._before = None

    @staticmethod
    def _set(trainer: pl.Trainer, step: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        # What loggers are told.
        loop._batches_that_stepped = step


class AttentionKernels(pl.Callback):
    """Keeps a run's attention out of cuDNN, which plans a kernel anew for every length that a sequence has.

    Texts are as long as the longest of a batch, and masks leave as many tokens as they leave: nearly each step has
    lengths of its own, and such calls took a quarter of a profiled step (docs/sizes.md).
    """

    def __init__(self) -> None:
        self._switched = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From now on."""
        self._switched.enter_context(without_cudnn_attention())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As it was before."""
        self._switched.close()

    on_exception = teardown


class StepSeed(pl.Callback):
    """Reseeds torch before every training batch, by a pure function of the seed, the batches so far and the rank.

    Nothing has to be saved but the seed, so a run that is killed at any moment and resumed draws what it would have
    drawn.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the seed of `seed_everything`; a resumed run then gets its own back."""
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed from (seed, batches so far, rank)."""
        torch.manual_seed(self.seed_at(trainer.fit_loop.epoch_loop.batch_progress.total.processed, trainer))

    def seed_at(self, done: int, trainer: pl.Trainer) -> int:
        """What the batch after so many is seeded with, in this process."""
        return seed_of(self.seed, done, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed of the run."""
        self.seed = state_dict["seed"]


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether the step that has just ended is one that is logged; none is with log_every_n_steps 0."""
    every = trainer.log_every_n_steps
    return every > 0 and trainer.global_step > 0 and trainer.global_step % every == 0


def run_folder(trainer: pl.Trainer) -> str | None:
    """The folder of a run's own files, that of its first logger; None without one, as in a dry run; a collective call.

    Weights & Biases, MLflow and others have one folder for all runs; the run's own is the one in which Lightning puts
    its checkpoints.
    """
    if not trainer.loggers or trainer.fast_dev_run:
        return None
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return trainer.strategy.broadcast(folder)


def seeds_of_step(trainer: pl.Trainer, batch_idx: int) -> list[int]:
    """What all batches that make one optimiser step with the present one are seeded with, in their order."""
    (own,) = (callback for callback in trainer.callbacks if isinstance(callback, StepSeed))
    size = trainer.accumulate_grad_batches
    first = trainer.fit_loop.epoch_loop.batch_progress.total.processed - batch_idx % size
    return [own.seed_at(number, trainer) for number in range(first, first + size)]


class DataConnection(pl.Callback):
    """Connects a UnifiedDataModule with the module that it feeds, and logs what it could not use.

    Other data is left alone.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before any loader is made; the base model, which has the processor, is built after this."""
        if isinstance(trainer.datamodule, UnifiedDataModule):
            negatives = {branch: pl_module.hard_negatives(branch) for branch in BRANCHES}
            trainer.datamodule.connect(lambda: pl_module.base.processor, negatives, lambda: encoding_of(pl_module.base))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many broken samples training has skipped so far, once there are any."""
        if not isinstance(trainer.datamodule, UnifiedDataModule) or not logs_now(trainer):
            return
        if trainer.datamodule.broken_samples:
            pl_module.log("data/broken_samples", float(trainer.datamodule.broken_samples))
