"""A signal ends, or requeues, a run between two steps, in all of its processes."""

import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from forked import join
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tiny import TinyModule, scenes_data

LIMIT = 300
"""Seconds."""


class Send(pl.Callback):
    """Sends a signal to one process in the midst of its first step, and keeps in a folder where each run ends."""

    def __init__(self, folder: Path, number: signal.Signals, rank: int) -> None:
        self.folder, self.number, self.rank = folder, number, rank

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if trainer.global_rank == self.rank and not trainer.global_step:
            os.kill(os.getpid(), self.number)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        (self.folder / f"{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.global_step}")


def trainer(folder: Path, number: signal.Signals, rank: int = 0, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=3,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[Send(folder, number, rank)],
        **options,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )


def one_of_two(folder: Path, rank: int, sent_to: int) -> None:
    join(rank, 2)
    run = trainer(folder, signal.SIGTERM, sent_to, devices=2, strategy="ddp", accumulate_grad_batches=2)
    run.fit(TinyModule(()), scenes_data())


@pytest.mark.parametrize("sent_to", [0, 1])
def test_sigterm_in_one_process_ends_both_after_the_same_step(tmp_path, sent_to) -> None:
    forking = multiprocessing.get_context("fork")
    processes = [forking.Process(target=one_of_two, args=(tmp_path, rank, sent_to)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["SIGTERMException 1"] * 2


def test_the_checkpoint_of_a_job_that_is_requeued_is_of_a_whole_step(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    slurm = {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "7", "JOB_NAME": "train"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    saved = []
    run = trainer(tmp_path, signal.SIGUSR1, devices=1, plugins=[SLURMEnvironment(requeue_signal=signal.SIGUSR1)])
    monkeypatch.setattr(run, "save_checkpoint", lambda path: saved.append((Path(path).name, run.global_step)))
    run.fit(TinyModule(()), scenes_data())
    assert saved == [("hpc_ckpt_1.ckpt", 1)] and run.global_step == 3


def test_a_checkpoint_that_is_due_by_time_waits_for_the_end_of_the_step(tmp_path, monkeypatch) -> None:
    """Each batch takes a second here, three make a step, and four seconds lie between two checkpoints."""
    saved = []
    run = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=4,
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=3,
        callbacks=[ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=4), save_top_k=-1)],
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
    )
    batches = run.fit_loop.epoch_loop.batch_progress.total
    clock = SimpleNamespace(monotonic=lambda: float(batches.processed))
    monkeypatch.setattr("lightning.pytorch.callbacks.model_checkpoint.time", clock)
    monkeypatch.setattr(run, "save_checkpoint", lambda path, _: saved.append((run.global_step, batches.processed)))
    run.fit(TinyModule(()), scenes_data())
    assert saved == [(2, 6), (4, 12)]


def test_the_last_step_of_an_epoch_is_whole_with_fewer_batches_too(tmp_path) -> None:
    """Three batches an epoch, two a step: steps 2 and 4 have one."""
    run = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        limit_train_batches=3,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)],
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
    )
    run.fit(TinyModule(()), scenes_data())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]
