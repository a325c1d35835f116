"""Under a moving average the export says which weights it holds, and offers both."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors import safe_open
from tiny import TinyModule, scenes_data

from infotok_lit.callbacks import ExportInference, WeightAverage
from infotok_lit.commands.export import export
from infotok_lit.commands.parsing import run
from infotok_lit.errors import SettingsError
from infotok_lit.models.family import load_folder

DECAY = 0.5


class Remember(pl.Callback):
    """The weights of the base model before and after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(copy.deepcopy(pl_module.base.state_dict()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.weights.append(copy.deepcopy(pl_module.base.state_dict()))


def fit(folder: Path, *callbacks: pl.Callback, weights_only: bool = False) -> Remember:
    remember = Remember()
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_weights_only=weights_only)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[remember, *callbacks, saving],
    )
    trainer.fit(TinyModule((), lr=0.01), scenes_data())
    return remember


def moving_average(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By its definition, from the initial weights on."""
    average = weights[0]
    for step in weights[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * step[name] for name in average}
    return average


def holds(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    found = load_folder(folder).state_dict()
    return all(torch.allclose(found[name], value, atol=1e-6) for name, value in weights.items())


def card_and_metadata(folder: Path) -> tuple[str, str]:
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith("- weights: "))
    with safe_open(folder / "harmon.safetensors", "pt") as file:
        return line.removeprefix("- weights: "), file.metadata()["weights"]


def test_both_weights_are_exported_under_their_names(tmp_path) -> None:
    folders = {name: tmp_path / name for name in ("averaged", "raw")}
    exports = [ExportInference(str(folder), weights=name) for name, folder in folders.items()]
    remember = fit(tmp_path / "run", exports[0], WeightAverage(DECAY, warmup=1), exports[1])
    truth = {"averaged": moving_average(remember.weights), "raw": remember.weights[-1]}
    words = {"averaged": "moving average (3 updates)", "raw": "raw (not the run's moving average)"}
    for name in folders:
        out = tmp_path / f"by command, {name}"
        run(export, ["export", "--ckpt", str(tmp_path / "run"), "--out", str(out), "--weights", name])
        other = "raw" if name == "averaged" else "averaged"
        for folder in (folders[name], out):
            assert holds(folder, truth[name]) and not holds(folder, truth[other])
            assert card_and_metadata(folder) == (words[name], name)


def test_a_checkpoint_of_weights_alone_knows_its_average(tmp_path) -> None:
    remember = fit(tmp_path / "run", WeightAverage(DECAY, warmup=1), weights_only=True)
    run(export, ["export", "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert holds(tmp_path / "out", moving_average(remember.weights))
    assert card_and_metadata(tmp_path / "out") == ("moving average (3 updates)", "averaged")


def test_without_an_average_the_weights_are_raw_whatever_is_asked(tmp_path) -> None:
    remember = fit(tmp_path / "run", ExportInference(str(tmp_path / "out")))
    assert holds(tmp_path / "out", remember.weights[-1])
    assert card_and_metadata(tmp_path / "out") == ("raw (no moving average)", "raw")


def test_an_average_of_lightning_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(SettingsError, match="use infotok_lit.callbacks.WeightAverage in its place"):
        fit(tmp_path / "run", EMAWeightAveraging(), ExportInference())


def test_checkpoints_that_lightning_averaged_are_still_exported(tmp_path) -> None:
    remember = fit(tmp_path / "run", EMAWeightAveraging(decay=DECAY, use_buffers=False))
    # Its first update takes the weights as they are.
    truth = {"averaged": moving_average(remember.weights[1:]), "raw": remember.weights[-1]}
    for name, weights in truth.items():
        run(export, ["export", "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / name), "--weights", name])
        assert holds(tmp_path / name, weights)
        assert card_and_metadata(tmp_path / name)[1] == name


def test_an_average_that_never_began_is_not_passed_off_as_one(tmp_path) -> None:
    with pytest.warns(UserWarning, match="the average was never updated"):
        fit(tmp_path / "run", WeightAverage(every_n_steps=100), ExportInference(str(tmp_path / "out")))
    assert card_and_metadata(tmp_path / "out")[0] == "moving average (0 updates)"
    command = ["export", "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "late")]
    with pytest.raises(SettingsError, match="use --weights raw"):
        run(export, command)
    assert run(export, [*command, "--weights", "raw"]) == 0
