"""`result.json` says what TensorBoard's files say, how far a run is, and how it ended."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fit_with import events, fit, pictures
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import TinyModule, scenes_data

from infotok_lit.callbacks import (
    ActiveUnits,
    Constraints,
    FinalReport,
    InformationPlane,
    Progress,
    StartingValues,
    Throughput,
    TradeOff,
)
from infotok_lit.callbacks.history import MetricHistory, RunResult


def result(trainer: pl.Trainer) -> dict:
    return json.loads(Path(trainer.log_dir, "result.json").read_text())


def test_it_holds_what_tensorboard_holds(tmp_path) -> None:
    trainer = fit(tmp_path, [RunResult()])
    found, logged = result(trainer), events(trainer)
    assert (found["state"], found["reason"], found["step"]) == ("finished", "", 4)
    assert found["versions"]["torch"] == torch.__version__ and found["seconds"] > 0
    assert [row["step"] for row in found["validation"]] == [0, 2, 4]
    assert [row["step"] for row in found["training"]] == [2, 4]
    compared = 0
    for rows in (found["validation"][1:], found["training"]):
        for row in rows:
            for tag in set(row) - {"step"}:
                # TensorBoard counts steps from 0.
                values = {event.step: event.value for event in logged.Scalars(tag)}
                expected = values[row["step"] - 1]
                assert row[tag] is None and math.isnan(expected) or row[tag] == pytest.approx(expected)
                compared += 1
    assert {"val/understanding/loss", "val/generation/loss"} <= set(found["validation"][-1]) and compared > 40


def test_a_number_that_is_logged_now_and_then_stands_where_it_was_logged(tmp_path) -> None:
    """Lightning's metrics hold it from then on; a constant that is logged each time is no leftover."""

    class Sometimes(TinyModule):
        def training_step(self, batch, batch_idx):
            self.log_dict({"train/always": 1.0} | ({"train/once": 1.0} if self.global_step == 1 else {}))
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log_dict({"val/always": 1.0} | ({"val/once": 1.0} if self.global_step == 2 else {}))

    trainer = fit(tmp_path, [StartingValues(), RunResult(), FinalReport()], Sometimes(), steps=6)
    found, logged = result(trainer), events(trainer)
    assert [event.step for event in logged.Scalars("train/always")] == [1, 3, 5]
    assert [event.step for event in logged.Scalars("train/once")] == [1], "TensorBoard counts steps from 0"
    for kind, steps in (("train", [2, 4, 6]), ("val", [0, 2, 4, 6])):
        rows = found["training" if kind == "train" else "validation"]
        assert [row["step"] for row in rows if f"{kind}/always" in row] == steps
        assert [row["step"] for row in rows if f"{kind}/once" in row] == [2]


def test_nothing_is_logged_where_no_step_logs(tmp_path) -> None:
    watching = [Throughput(), InformationPlane(), Constraints(), Progress(), RunResult()]
    trainer = fit(tmp_path, watching, steps=2, log_every_n_steps=0, enable_progress_bar=True)
    assert result(trainer)["training"] == [] and [row["step"] for row in result(trainer)["validation"]] == [0, 2]


class StopsAt(pl.Callback):
    def __init__(self, what) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        if trainer.global_step == 3:
            self.what()


def fail() -> None:
    raise RuntimeError("the disk is full")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_its_rows(tmp_path) -> None:
    """Also with the validation at the step of its checkpoint, which was saved before it."""
    whole = result(fit(tmp_path / "whole", [RunResult()]))
    logger = pl.loggers.TensorBoardLogger(tmp_path, "killed", "")
    with pytest.raises(RuntimeError):
        fit(tmp_path, [RunResult(), StopsAt(fail)], logger=logger)
    (checkpoint,) = Path(logger.log_dir, "checkpoints").glob("*step=2.ckpt")
    logger = pl.loggers.TensorBoardLogger(tmp_path, "killed", "")
    resumed = result(fit(tmp_path, [RunResult()], checkpoint=checkpoint, logger=logger))
    assert resumed["validation"] == whole["validation"] and resumed["training"] == whole["training"]
    assert resumed["state"] == "finished"


@pytest.mark.parametrize(
    ("what", "ends", "state", "reason"),
    [
        (fail, RuntimeError, "failed", "RuntimeError: the disk is full"),
        (interrupt, SystemExit, "interrupted", "KeyboardInterrupt: "),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), BaseException, "interrupted", "SIGTERMException: "),
    ],
)
def test_it_says_how_a_run_ended(tmp_path, what, ends, state, reason) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ends):
        fit(tmp_path, [RunResult(), StopsAt(what)])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (path,) = tmp_path.rglob("result.json")
    found = json.loads(path.read_text())
    assert (found["state"], found["reason"], found["step"]) == (state, reason, 3)
    assert [row["step"] for row in found["validation"]] == [0, 2]


def test_while_it_runs_it_says_so(tmp_path) -> None:
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_) -> None:
            seen.append((result(trainer)["state"], len(result(trainer)["validation"])))

    fit(tmp_path, [RunResult(), Looks()], num_sanity_val_steps=0)
    assert seen == [("running", 0), ("running", 0), ("running", 1), ("running", 1)]


def test_validate_leaves_one_row(tmp_path) -> None:
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        logger=pl.loggers.TensorBoardLogger(tmp_path, "log"),
        callbacks=[RunResult()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(TinyModule(), scenes_data(), verbose=False)
    found = result(trainer)
    assert found["state"] == "finished" and [row["step"] for row in found["validation"]] == [0]
    assert found["training"] == [] and found["validation"][0]["val/generation/loss"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_goes_on_adds_to_its_result(tmp_path) -> None:
    trainer = fit(tmp_path, [RunResult()], steps=2)
    fitted = result(trainer)
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    both = result(trainer)
    assert both["seconds"] > fitted["seconds"] and both["training"] == fitted["training"]
    with pytest.raises(MisconfigurationException):
        trainer.predict(trainer.lightning_module, trainer.datamodule)
    assert result(trainer)["state"] == "finished", "the run did not fail"


def test_validate_repeats_what_the_run_measured_at_a_checkpoint(tmp_path) -> None:
    """Its step, too: a term that is still rising then has the weight that it had, not that of step 0."""

    def module() -> TinyModule:
        made = TinyModule()
        made.objective_config = replace(made.objective_config, warmup_steps=8)
        return made

    fitted = fit(tmp_path, [RunResult(), ActiveUnits()], module())
    (checkpoint,) = Path(fitted.log_dir, "checkpoints").glob("*step=2.ckpt")
    trainer = pl.Trainer(
        logger=pl.loggers.TensorBoardLogger(tmp_path, "validate"),
        callbacks=[RunResult(), ActiveUnits()],
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.validate(module(), scenes_data(val_samples=8), ckpt_path=checkpoint, verbose=False)
    (row,), then = result(trainer)["validation"], result(fitted)["validation"][1]
    assert row == then and row["step"] == result(trainer)["step"] == 2 and row["val/understanding/weighted_alignment"]
    assert pictures(trainer) == ["val_active_units_0000002.png"]
    assert {event.step for event in events(trainer).Scalars("val/understanding/loss")} == {2}
    assert trainer.global_step == 0, "from where this trainer may train"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_is_chosen_by_the_validation_at_its_own_step(tmp_path, accumulate) -> None:
    """The loss of step s is |s - 4| here; by the validation before it would be step 6, or half of a step later."""

    class Falls(TinyModule):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("val/distance", float(abs(self.global_step - 4)))

    best = ModelCheckpoint(tmp_path, "{step}", "val/distance", save_top_k=1, every_n_train_steps=2)
    fit(tmp_path, [best], Falls(), 6, val_check_interval=2 * accumulate, accumulate_grad_batches=accumulate)
    (path,) = tmp_path.glob("*.ckpt")
    assert path.name == Path(best.best_model_path).name == "step=4.ckpt" and best.best_model_score == 0
    loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    assert loop["epoch_loop.batch_progress"]["total"]["processed"] == 4 * accumulate


def test_a_check_of_a_few_batches_is_no_validation_and_a_run_without_a_logger_leaves_nothing(tmp_path, capsys) -> None:
    trainer = fit(tmp_path, [RunResult()], num_sanity_val_steps=1, steps=2)
    assert [row["step"] for row in result(trainer)["validation"]] == [2]
    callbacks = [RunResult(), ActiveUnits(), FinalReport(), TradeOff(limit=2)]
    capsys.readouterr()
    fit(tmp_path / "none", callbacks, steps=2, logger=False, default_root_dir=tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["checkpoints"]
    shown = capsys.readouterr().out
    assert "at step 2" in shown and "Run:" not in shown


def test_a_number_that_is_not_finite_is_null(tmp_path) -> None:
    class LogsNan(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/odd", float("nan"))

    found = result(fit(tmp_path, [RunResult(), LogsNan()], steps=2))
    assert all(row["val/odd"] is None for row in found["validation"])


def test_a_long_history_is_thinned_and_keeps_its_ends() -> None:
    history = MetricHistory(most_rows=10)
    for step in range(1000):
        history.record(step, {"a": torch.tensor(float(step))})
        history.record(step, {"a": torch.tensor(-1.0)})
    steps, values = history.series("a")
    assert len(steps) <= 10 and steps == values and steps[0] == 0 and steps[-1] == 999
