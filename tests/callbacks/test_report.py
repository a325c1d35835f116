"""What a run ends with: before and after, and commands to try that speak of the user's own data."""

import shlex

import lightning.pytorch as pl
import pytest
from fit_with import fit
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from tiny import TinyModule, scenes_data

from infotok_lit.callbacks import ExportInference, FinalReport, TokenSimilarity
from infotok_lit.data import UnifiedDataModule
from infotok_lit.scenes import Scenes


def test_the_commands_ask_and_draw_what_the_data_is_about(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "my runs"
    trainer = fit(folder, [FinalReport(), ExportInference()])
    shown = capsys.readouterr().out
    caption = Scenes(split="val").sample("generation", 0).caption
    asked = [Scenes(split="val").sample("understanding", i).question for i in range(4)]
    question = "is there a green square?"
    assert caption == "a yellow circle below a blue square" and question in asked[1:], "no other speaks of its words"
    assert f"--model '{trainer.log_dir}/export' --prompt" in shown and f"--logdir '{folder}/log'" in shown
    assert f"--prompt {shlex.quote(caption)} --out picture.png" in shown
    assert f"--image picture.png --prompt {shlex.quote(question)}" in shown
    loss = next(line for line in shown.splitlines() if "generation loss" in line)
    after = float(trainer.callback_metrics["val/generation/loss"])
    assert f"{after:.3f}" in loss and len([word for word in loss.split() if word.replace(".", "").isdigit()]) == 2
    assert "before training and at step 4" in shown and "parameters of heads" in shown


def test_what_reads_garments_and_draws_shapes_is_not_asked_about_garments_of_shapes(tmp_path, capsys) -> None:
    data = UnifiedDataModule(
        train=Scenes(num_samples=100),
        val=Scenes("garments32", "val"),
        generation_val=Scenes(split="val"),
        understanding_batch_size=2,
        generation_batch_size=2,
        val_samples=4,
    )
    fit(tmp_path, [FinalReport(), ExportInference()], steps=2, data=data)
    shown = capsys.readouterr().out
    assert "--prompt 'a yellow circle below a blue square'" in shown and "--prompt 'describe the image.'" in shown


@pytest.mark.parametrize("batches", [0, 1])
def test_a_run_that_did_not_begin_with_a_validation_does_not_say_so(tmp_path, capsys, batches) -> None:
    """The check of a few batches is none."""
    fit(tmp_path, [FinalReport()], num_sanity_val_steps=batches)
    shown = capsys.readouterr().out
    assert "Validation, at step 2 and at step 4" in shown and "before training" not in shown


def test_the_only_validation_is_shown_too(tmp_path, capsys) -> None:
    trainer = fit(tmp_path, [FinalReport()], steps=2, num_sanity_val_steps=0)
    shown = capsys.readouterr().out
    assert "Validation, at step 2 " in shown
    assert f"{float(trainer.callback_metrics['val/generation/loss']):.3f}" in shown


def test_a_run_that_is_shorter_than_the_interval_of_validation_says_why_it_shows_no_table(tmp_path, capsys) -> None:
    fit(tmp_path, [FinalReport()], steps=2, val_check_interval=3)
    assert "No table of both tasks: trainer.val_check_interval is 3, so" in capsys.readouterr().out
    fit(tmp_path, [FinalReport()], steps=2, limit_val_batches=0)
    shown = capsys.readouterr().out
    assert "Run:" in shown and "table" not in shown, "nobody asked for a validation"


def test_a_dry_run_leaves_nothing_and_can_be_repeated(tmp_path, capsys, recwarn) -> None:
    for _ in range(2):
        callbacks = [TokenSimilarity(drift=True), FinalReport(), ExportInference()]
        fit(tmp_path, callbacks, fast_dev_run=True, default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir()) and not [one for one in recwarn if "drift" in str(one.message)]
    shown = capsys.readouterr().out
    assert "Validation, at step 1" in shown and "generate --model" not in shown


@pytest.mark.filterwarnings("ignore")
def test_validate_cuts_no_name_in_a_narrow_terminal(tmp_path, capsys, monkeypatch) -> None:
    names = [f"val/cka_drift/understanding/top_channel_{when}" for when in ("before", "now")]

    class LogsMore(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log_dict(dict.fromkeys(names, 0.5))

    monkeypatch.setenv("COLUMNS", "80")
    callbacks = [LogsMore(), FinalReport()]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)
    trainer.validate(TinyModule(), scenes_data(val_samples=8), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = "".join(line.split("│")[1].strip() for line in lines)
    assert all(name in shown for name in names) and max(map(len, lines)) <= 80


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_another_kind_has_a_report_too(tmp_path, capsys) -> None:
    fit(tmp_path, [FinalReport()], module=BoringModel(), data=BoringDataModule(), steps=2)
    shown = capsys.readouterr().out
    assert "Run:" in shown and "heads" not in shown
