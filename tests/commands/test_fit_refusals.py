"""Settings that cannot be met, or cannot be meant: `fit` answers with one message, no traceback and no run folder."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy

from infotok_lit.cli import main
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.commands.fit_checks import warn_of_odd_settings
from infotok_lit.errors import SettingsError
from infotok_lit.modules.optimiser import refuse_trainer

FRESH = ["--model.init_args.init_from=null", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
TINY = [
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks=[]",
    "--data.init_args.understanding_batch_size=2",
    "--data.init_args.generation_batch_size=2",
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    return tmp_path


def said(capsys, *arguments: str) -> str:
    assert main(["fit", *FRESH, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("infotok_lit: ")]
    assert len(lines) == 1
    return lines[0]


BUILT = [
    (["--model.init_args.freeze=[nope.]"], "freeze: no parameter starts with 'nope.'"),
    (["--model.init_args.lora.targets=[nope]"], "lora.targets: no linear layer is called 'nope'"),
    (["--model.init_args.optimiser.group_lr.nope=0.1"], "group_lr: no trainable parameter starts with 'nope'"),
    (["--model.init_args.image_size=30"], "image size 30 x 30 is not a multiple of 8 pixels"),
    (["--model.init_args.tokenizer=/nowhere"], "no tokenizer at '/nowhere'"),
    (
        ["--model.init_args.settings={autoencoder: {kept: 99}}"],
        "autoencoder.kept must be in [1, 8], the block size; got 99",
    ),
    (["--trainer.max_steps=-1"], "say when to stop with trainer.max_steps"),
    (["--trainer.precision=bf16-true"], "set it to bf16-mixed"),
    (["--trainer.precision=64"], "set it to 32-true"),
    (["--trainer.logger.init_args.save_dir=a_file"], "Not a directory"),
    (
        ["--trainer.callbacks=[{class_path: infotok_lit.callbacks.ExportInference, init_args: {folder: a_folder}}]"],
        "a_folder",
    ),
    (["--trainer.logger.init_args.save_dir=/proc/nowhere"], "/proc/nowhere: No such file or directory"),
]
"""Refused by the built model, the opened data or the file system."""

PARSED = [
    (["--checkpoint.dirpath=memory://x"], "checkpoint.dirpath is memory://x, where last.ckpt cannot be a link"),
    (["--trainer.strategy=fsdp"], "add --config trainer/fsdp for FSDP2 (it needs GPUs, and there is none here)"),
    (["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"], "trainer.strategy FSDPStrategy shards"),
    (["--trainer.strategy=deepspeed_stage_2"], "add --config trainer/fsdp"),
    (["--trainer.accelerator=gpu"], "trainer.accelerator is gpu, but there is no GPU here"),
    (["--config=harmon/scenes32", "--config=trainer/multi_gpu", "--trainer.accelerator=gpu"], "there is no GPU here"),
    (["--trainer.devices=0"], "trainer.devices is 0; set it to 1 or more"),
    (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0; set it to 1 or more"),
    (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val is nan, which is not a number"),
    (
        ["--model.init_args.objective.balance.understanding.alignment=.nan"],
        "model.init_args.objective.balance.understanding.alignment is nan, which is not a number",
    ),
    (
        ["--trainer.callbacks=[{class_path: infotok_lit.callbacks.WeightAverage, init_args: {decay: .nan}}]"],
        "trainer.callbacks[0].init_args.decay is nan",
    ),
    (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val is -1; set it above 0, or to null"),
    (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0, so nothing would be trained"),
    (["--trainer.max_epochs=0"], "trainer.max_epochs is 0, so nothing would be trained"),
    (["--trainer.max_steps=0"], "trainer.max_steps is 0, so nothing would be trained"),
    (["--trainer.precision=fp7"], "trainer.precision: 'fp7' is not one of 64, 32, 16"),
    (["--seed_everything=99999999999"], "seed_everything: 99999999999 is not in bounds"),
    (["--model.init_args.answer_tokens=0"], "answer_tokens is 0; set it to 1 or more"),
    (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    (["--ckpt_path=a_folder"], "--ckpt_path a_folder is a folder"),
    (["--ckpt_path=damaged.ckpt"], "damaged.ckpt"),
    (["--ckpt_path=http://127.0.0.1:9/a.ckpt"], "is a URL, and checkpoints are read from files only"),
    (["--ckpt_path=file:///tmp/a.ckpt"], "is a URL, and checkpoints are read from files only"),
    (["--ckpt_path=simplecache::s3://a/b.ckpt"], "is a URL, and checkpoints are read from files only"),
    (["--config=objective/csa"], "names no model: it is an overlay"),
    (["--data.init_args.generation_batch_size=1"], "alignment has no other text to tell its own from"),
    (
        ["--config=harmon/scenes32", "--config=objective/hsic", "--data.init_args.understanding_batch_size=3"],
        "estimator hsic needs 4 images at a time; raise it",
    ),
    (
        [
            "--config=harmon/scenes32",
            "--config=objective/hsic",
            "--data.init_args.generation_batch_size=3",
            "--model.init_args.objective.hsic.unbiased=false",
        ],
        "estimator hsic needs 4 images at a time; raise it",
    ),
]
"""Refused before anything is built."""


@pytest.mark.parametrize(("arguments", "words"), [*BUILT, *PARSED])
def test_what_cannot_be_met_is_one_message_and_leaves_nothing(here, capsys, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in said(capsys, *arguments)
    assert not list(here.rglob("version_*"))


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_start_that_fails_leaves_a_folder_that_was_there_as_it_was(here, capsys, logger) -> None:
    """A logger without a folder of its own for each run: this is that of an earlier one."""
    (here / "config.yaml").write_text("an earlier run's")
    before = {path.name for path in here.iterdir()}
    settings = f'{{"class_path": "lightning.pytorch.loggers.{logger}", "init_args": {{"save_dir": ".", "name": ""'
    settings += ', "version": ""}}'
    assert "no checkpoint at" in said(capsys, f"--trainer.logger={settings}", "--model.init_args.init_from=nowhere")
    assert {path.name for path in here.iterdir()} == before
    assert (here / "config.yaml").read_text() == "an earlier run's"


def test_pictures_of_a_size_that_has_no_parser_are_refused_with_the_way_out(here, capsys) -> None:
    """Scenes are 32 pixels wide; a model of another size draws what the score cannot read."""
    drawn = "--trainer.callbacks=[{class_path: infotok_lit.callbacks.GeneratedImages, init_args: {num_images: 2}}]"
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--data.init_args.val_batch_size=2", drawn]
    message = said(capsys, "--model.init_args.image_size=40", *short)
    assert "are judged at 32 x 32 pixels" in message
    assert "set the model's image_size to 32, or the score of GeneratedImages to null" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.init_args.optimiser.lr=0"], "optimiser.lr is 0"),
        (["--model.init_args.optimiser.warmup_steps=1"], "the learning rate never reaches its value"),
        (
            [
                "--model.init_args.objective.generation.rate_budget_bits=4",
                "--model.init_args.objective.balance.generation.compactness=null",
            ],
            "objective.generation has a budget or target for compactness, which is off",
        ),
    ],
)
def test_what_is_hardly_meant_is_warned_of(here, arguments, words) -> None:
    with pytest.warns(UserWarning, match=words):
        InfoTokCLI(["fit", *FRESH, *TINY, *arguments])


def test_a_sharding_strategy_is_refused_by_name() -> None:
    """It would run, and its processes would diverge."""
    with pytest.raises(SettingsError, match="FSDPStrategy shards the model.*add --config trainer/fsdp"):
        refuse_trainer("32-true", FSDPStrategy())


def test_a_file_system_that_refuses_is_one_message(here, capsys, monkeypatch) -> None:
    """A full disk, and a folder that may not be written to: root may write anywhere, so the system's answer is made."""
    for error, words in (
        (OSError(28, os.strerror(28), "runs/last.ckpt"), "runs/last.ckpt: No space left on device"),
        (PermissionError(13, os.strerror(13), "runs"), "runs: Permission denied"),
    ):

        def refuse(*_: object, _error: OSError = error, **__: object) -> None:
            raise _error

        monkeypatch.setattr(Trainer, "_run", refuse)
        assert words in said(capsys)


@pytest.mark.parametrize(
    "switch", ["enable_progress_bar=false", "logger=false", "enable_checkpointing=false", "num_sanity_val_steps=0"]
)
def test_a_switch_of_the_trainer_works_with_the_default_callbacks(here, switch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = InfoTokCLI(["fit", "--config=harmon/scenes32", f"--trainer.{switch}"], run=False)
    assert cli.trainer.max_steps == 300


@pytest.mark.parametrize(
    "key",
    [
        "model.init_args.objective.balance.understanding.compactness",
        "model.init_args.objective.negatives.limit",
        "data.init_args.train.init_args.texture",
        "trainer.max_time",
    ],
)
def test_null_takes_back_what_a_configuration_sets(here, key) -> None:
    """Also deep inside: a message of ours asks for it."""
    value = "00:00:01:00" if key.endswith("max_time") else 1
    found = InfoTokCLI(["fit", f"--{key}={value}", f"--{key}", "null"], run=False).config
    for part in key.split("."):
        found = found[part]
    assert found is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [("objective.decodr.width", "objective.decoder"), ("objective.warmup_stps", "objective.warmup_steps")],
)
def test_a_misspelt_key_is_named_whole_whatever_its_value(here, capsys, key, meant) -> None:
    for value in ("null", "3"):
        message = said(capsys, f"--model.init_args.{key}={value}")
        assert f"there is no setting model.init_args.{key}; did you mean model.init_args.{meant}?" in message


def test_nulls_among_the_values_of_one_option_take_back_what_they_name(here) -> None:
    shares = "model.init_args.objective.balance.understanding"
    found = InfoTokCLI(["fit", f"--{shares}", "{compactness: null, alignment: 0.5}"], run=False).config
    for part in shares.split("."):
        found = found[part]
    assert found["compactness"] is None
    assert found["alignment"] == 0.5


def test_null_for_a_rate_is_refused_by_name(here, capsys) -> None:
    message = said(capsys, "--model.init_args.optimiser.heads_lr=null")
    assert message.endswith("optimiser.heads_lr is null; set it to a number, or leave it out")


def test_null_for_a_misspelt_key_is_said_as_any_value_is(here, capsys) -> None:
    message = said(capsys, "--model.init_args.objective.negatives.limits=null")
    assert "no setting" in message
    assert "negatives.limits" in message


@pytest.mark.parametrize(
    ("slurm", "devices", "message"),
    [
        ({"NTASKS": "1"}, 2, "ask for 2 process(es), and SLURM started 1: ask it for --nodes=1 --ntasks-per-node=2"),
        ({"NTASKS": "4"}, 1, "Use `--ntasks-per-node=4` instead"),
        ({"NTASKS": "4", "NTASKS_PER_NODE": "4"}, 1, "ask for 1 process(es), and SLURM started 4"),
    ],
)
def test_slurm_must_start_the_processes_that_the_trainer_needs(monkeypatch, slurm, devices, message) -> None:
    """Lightning would train with two devices on one."""
    for name, value in {**slurm, "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    arguments = ["fit", *FRESH, f"--trainer.devices={devices}"]
    with pytest.raises(SettingsError) as refused:
        InfoTokCLI(arguments, run=False)
    assert message in str(refused.value)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert InfoTokCLI(arguments, run=False).trainer.num_devices == devices


@pytest.mark.parametrize(("batches", "warned"), [(5, True), (6, False), (1.0, False), (None, False)])
def test_a_step_that_an_epoch_cuts_short_is_warned_of(batches, warned) -> None:
    """Lightning divides its gradient by accumulate_grad_batches all the same."""
    config = Namespace(trainer=Namespace(limit_train_batches=batches, accumulate_grad_batches=3, max_steps=9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_odd_settings(config)
    said = [str(warning.message) for warning in caught]
    assert any("the last step of each epoch has 2 of 3 batches" in text for text in said) == warned
