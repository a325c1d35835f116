"""The whole path as a user runs it: `fit` from the command line to stripped weights."""

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from forked import run_forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infotok_lit.assets import QUICKSTART_CONFIG
from infotok_lit.callbacks import Progress
from infotok_lit.commands.fit import main, run
from infotok_lit.models.family import load_folder

PHOTOS = Path(__file__).parent / "fixtures" / "photos"
FRESH = ["--model.init_args.init_from", "null"]
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--data.init_args.understanding_batch_size=4",
    "--data.init_args.generation_batch_size=4",
    "--data.init_args.val_batch_size=4",
    "--data.init_args.val_samples=4",
]
SMALL = ["--model.init_args.settings={llm: {num_hidden_layers: 1}, sampling: {iterations: 4}}"]
"""For any family: a language model of one layer, and few steps of drawing."""
WHOLE_OBJECTIVE = ["--config=harmon/scenes32", "--config=objective/csa"]
MODULES = {"harmon": "HarmonModule", "showo2": "Showo2Module", "openuni": "OpenUniModule"}


def config_with(folder: Path, train: dict, callbacks: list | None = None, family: str = "harmon", **data) -> str:
    """The quickstart's configuration, callbacks and all, on other data."""
    config = yaml.safe_load(QUICKSTART_CONFIG.read_text())
    config["model"]["class_path"] = f"infotok_lit.modules.{MODULES[family]}"
    config["data"]["init_args"] |= {"train": train, "val": None, **data}
    if callbacks is not None:
        config["trainer"]["callbacks"] = callbacks
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def broken_folder(folder: Path, good: int, broken: int) -> dict:
    """The photographs with some files that are no images, as an ImageTextFolder."""
    rows = json.loads((PHOTOS / "annotations.json").read_text())[:good]
    for row in rows:
        os.link(PHOTOS / row["image"], folder / row["image"])
    for i in range(broken):
        (folder / f"broken{i}.jpg").write_bytes(b"no image")
        rows.append({"image": f"broken{i}.jpg", "caption": "nothing", "question": "what?", "answer": "nothing"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"class_path": "infotok_lit.data.ImageTextFolder", "init_args": {"annotations": str(folder / "rows.json")}}


def shards(folder: Path) -> dict:
    """The photographs in two shards, one broken member among them, as an ImageTextShards."""
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    for number in range(2):
        with tarfile.open(folder / f"photos-{number}.tar", "w") as tar:
            for row in rows[number::2]:
                add(tar, row["image"], (PHOTOS / row["image"]).read_bytes())
                add(tar, Path(row["image"]).stem + ".json", json.dumps(row).encode())
            add(tar, f"bad{number}.jpg", b"no image")
            add(tar, f"bad{number}.txt", b"a caption")
    init_args = {"shards": str(folder / "photos-{0..1}.tar"), "cache": str(folder / "cache")}
    return {"class_path": "infotok_lit.data.ImageTextShards", "init_args": init_args}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def scalars(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(
    ("objective", "pictures", "report", "row"),
    [
        ([], ["answers", "drawings"], "alignment_nats", "alignment bound (nats)"),
        (
            WHOLE_OBJECTIVE,
            ["active_units", "answers", "drawings", "information_plane", "token_rates"],
            "rate_bits_per_token",
            "rate C (bits/token)",
        ),
    ],
    ids=["alignment, the default", "C&S&A"],
)
def test_the_quickstart_ends_with_pictures_a_table_and_stripped_weights(
    tmp_path, monkeypatch, capsys, objective, pictures, report, row
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *objective, *FRESH, *SMALL, *SHORT]) == 0
    run = tmp_path / "runs" / "quickstart" / "version_0"
    events = scalars(run)
    assert sorted(events.Tags()["images"]) == [f"val/{name}" for name in pictures]
    for name in pictures:
        assert len(events.Images(f"val/{name}")) == 2, f"{name} before and after training"
    logged = events.Tags()["scalars"]
    for branch in ("understanding", "generation"):
        assert f"train/{branch}/{report}" in logged
    # A fresh denoiser's last layer is zero: in these two steps the task pulls on no token, and there is no share.
    once = ("val/cka", "val/generation/rho_")
    for tag in (tag for tag in logged if tag.startswith("val/") and not tag.startswith(once)):
        assert [event.step for event in events.Scalars(tag)] == [0, 1], f"{tag} before and after training"
    rates = {tag.partition("/")[2] for tag in logged if tag.startswith("lr-")}
    assert rates == {"base", "base, no decay", "heads", "heads, no decay"}
    constant = {tag for tag in logged if tag.startswith("train/") and not any(e.value for e in events.Scalars(tag))}
    # A fresh diffusion head ends in zeros, so no gradient of its task has reached the tokens after two steps.
    silent = {tag for tag in constant if tag.startswith(("train/generation/pull_task", "train/generation/rho_"))}
    assert constant == silent, "what is always 0 is not logged"
    # Four images of which drawing sees nothing, as here, are all alike to it: then there is no CKA to log.
    assert "val/cka_drift/understanding/biased" in events.Tags()["scalars"]
    files = sorted((run / "pictures").glob("*_0000002.png"))
    assert [path.name for path in files] == [f"val_{name}_0000002.png" for name in pictures]
    printed = capsys.readouterr().out
    for words in ("before", "after", "chance", row, "Stripped", "infotok_lit generate"):
        assert words in printed
    model = load_folder(run / "export")
    checkpoint = torch.load(next((run / "checkpoints").glob("last.ckpt")), weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"base.{name}"]), name


def test_two_processes_run_the_whole_quickstart(tmp_path, monkeypatch) -> None:
    """Also a guard against callbacks that enter a collective on one process only: those hang."""
    monkeypatch.chdir(tmp_path)
    run_forked(fit_as_one_of_two, 2, [*WHOLE_OBJECTIVE, *FRESH, *SMALL, *SHORT])
    run = tmp_path / "runs" / "quickstart" / "version_0"
    assert (run / "export" / "config.json").exists()
    assert len(list((run / "pictures").glob("val_drawings_*.png"))) == 2


def fit_as_one_of_two(rank: int, arguments: list[str]) -> None:
    assert main(["fit", *arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 0


@pytest.mark.parametrize(("layout", "family"), [("shards", "harmon"), ("folder", "showo2"), ("folder", "openuni")])
def test_own_images_with_broken_files_among_them(tmp_path, monkeypatch, layout, family) -> None:
    monkeypatch.chdir(tmp_path)
    train = broken_folder(tmp_path, good=13, broken=1) if layout == "folder" else shards(tmp_path)
    config = config_with(tmp_path, train, family=family, max_broken_share=0.5)
    assert main(["fit", "--config", config, *FRESH, *SMALL, *SHORT, "--trainer.max_steps=4"]) == 0
    run = tmp_path / "runs" / "quickstart" / "version_0"
    assert (run / "export" / "config.json").exists()
    tags = scalars(run).Tags()["scalars"]
    assert "data/broken_samples" in tags
    assert not [tag for tag in tags if "generation/score" in tag], "photographs have no parser, so no score"


def test_validate_prints_scores_and_nothing_of_heads_that_were_never_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    class LogsMore(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            module.log("val/understanding/probe/structure_bits", 1.25)

    monkeypatch.setattr("infotok_lit.callbacks.ActiveUnits", LogsMore, raising=True)
    with warnings.catch_warnings(record=True) as warned:
        cli = run(["validate", *WHOLE_OBJECTIVE, *FRESH, *SMALL, *SHORT, "--trainer.enable_progress_bar=false"])
    shown = capsys.readouterr().out
    assert "answers: exact match" in shown and "val/generation/score/overall" not in shown, "each number once"
    assert "val/understanding/probe/structure_bits" in shown and "1.250" in shown
    loss = f"{float(cli.trainer.callback_metrics['val/generation/loss']):.3f}"
    assert [line for line in shown.splitlines() if "generation loss" in line and loss in line]
    found = json.loads(Path(cli.trainer.log_dir, "result.json").read_text())["validation"][0]
    for name in ("rho_alignment", "weighted_alignment", "alignment_nats", "rate_bits_per_token", "active_units"):
        assert name not in shown and f"val/understanding/{name}" in found
    assert "Validate metric" not in shown and "Information" not in shown and "All numbers: runs/" in shown
    assert not [one for one in warned if "no drift is logged" in str(one.message)]


def test_the_bar_counts_steps_and_shows_each_task(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [*SHORT, "--trainer.accumulate_grad_batches=3", "--trainer.limit_val_batches=0", "--config=harmon/scenes32"]
    progress = "--trainer.callbacks=[{class_path: infotok_lit.callbacks.Progress}]"
    cli = run(["fit", *quick, *FRESH, progress])
    (bar,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Progress))
    assert bar.train_progress_bar.total == bar.train_progress_bar.completed == 6
    assert bar.train_progress_bar.time_remaining == 0
    shown = bar.get_metrics(cli.trainer, cli.model)
    assert list(shown) == ["understanding", "generation", "total loss"]
    assert shown["understanding"] == float(cli.trainer.callback_metrics["train/understanding/loss"])


def test_lightnings_products_are_not_advertised(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    run(
        [
            "fit",
            *FRESH,
            *SMALL,
            *SHORT,
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks=[]",
            "--config=harmon/scenes32",
        ]
    )
    written = capfd.readouterr()
    assert "Tip" not in written.out + written.err


def too_many_broken(folder: Path) -> list[str]:
    config = config_with(folder, broken_folder(folder, good=4, broken=9), callbacks=[])
    return [
        "fit",
        "--config",
        config,
        *FRESH,
        *SMALL,
        *SHORT,
        "--trainer.max_steps=20",
        "--trainer.limit_val_batches=0",
    ]


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--help", "the quickstart: a small embedded model"),
        ("--model.help=infotok_lit.modules.OpenUniModule", "Fine-tunes OpenUni"),
        ("--data.init_args.train.help=infotok_lit.data.ImageTextFolder", "A JSON list, a JSONL file"),
    ],
)
def test_help_is_about_the_command_or_a_class(option, shown, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", option])
    assert ended.value.code == 0 and shown in capsys.readouterr().out


def test_too_many_broken_files_stop_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"samples drawn so far are broken.*broken\d.jpg.*max_broken_share"):
        main(too_many_broken(tmp_path))


def test_too_many_broken_files_are_no_traceback_on_any_process(tmp_path) -> None:
    """Started as a user starts them: the first process starts the other one."""
    command = [sys.executable, "-m", "infotok_lit", *too_many_broken(tmp_path)]
    ended = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 2
    assert "max_broken_share" in ended.stderr
    assert "Traceback" not in ended.stderr
