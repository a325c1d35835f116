"""Training: it learns, resumes to the bit, keeps its moving average, and leaves a folder that `compress` takes."""

import contextlib
import math
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_video import TINY

from infotok_lit.callbacks import WeightAverage
from infotok_lit.checkpoints import CheckpointError, read_run
from infotok_lit.cli import main as command_line
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.errors import SettingsError
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.modules.video_tokenizer import ExportTokenizer, VideoTokenizerModule, rebuild_tokenizer
from infotok_lit.video.datamodule import ClipDataModule
from infotok_lit.video.moving_scenes import MovingScenes
from infotok_lit.video.official import load_tokenizer
from infotok_lit.video.rates import RateConfig
from infotok_lit.video.tokenizer import SIZES
from infotok_lit.video.video_file import write_video

ROOT = Path(__file__).parents[2]


class Crash(Exception):
    """What a run dies of."""


class Watch(pl.Callback):
    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.rows: list[tuple[int, list[str], float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        if trainer.global_step == self.crash_at:
            raise Crash

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.callback_metrics
        self.rows.append((trainer.global_step, batch.names, float(logged["train/loss"]), float(logged["train/rate"])))


def fit(
    folder: Path,
    steps: int = 6,
    checkpoint: Path | None = None,
    crash_at: int | None = None,
    rates: RateConfig = RateConfig(),  # noqa: B008 - frozen
    init_from: str | None = None,
    lr: float = 1e-3,
    precision: str = "32-true",
) -> tuple[pl.Trainer, Watch]:
    pl.seed_everything(0, verbose=False)
    watch = Watch(crash_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=1,
        precision=precision,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, "log"),
        callbacks=[
            ModelCheckpoint(every_n_train_steps=2, save_top_k=-1),
            WeightAverage(0.5),
            ExportTokenizer(),
            watch,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = VideoTokenizerModule(
        init_from=init_from,
        settings={name: value for name, value in asdict(TINY).items()},
        rates=rates,
        optimiser=OptimiserConfig(lr=lr, warmup_steps=2),
        val_rates=(1.0, 0.5),
    )
    data = ClipDataModule(
        MovingScenes(side=32), MovingScenes("val", side=32), frames=5, side=32, batch_size=3, val_clips=4
    )
    with contextlib.suppress(Crash):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, pl.Trainer, Watch]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit(folder)


@pytest.mark.parametrize("rates", [(0.01,), (2.0,), (float("nan"),), (0.5, 0.5)])
def test_rates_of_validation_that_are_none_are_refused(rates) -> None:
    with pytest.raises(SettingsError, match="val_rates must be between 1/16 and 1, each once, got"):
        VideoTokenizerModule(val_rates=rates)


def state_of(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return trainer.lightning_module.state_dict()


def test_a_run_that_was_killed_goes_on_to_the_bit(whole, tmp_path) -> None:
    _, trainer, watch = whole
    broken, before = fit(tmp_path / "broken", crash_at=3)
    checkpoint = Path(broken.log_dir, "checkpoints", "epoch=0-step=2.ckpt")
    again, after = fit(tmp_path / "again", checkpoint=checkpoint)
    assert before.rows[:2] + after.rows == watch.rows
    wanted = state_of(trainer)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state_of(again).items())


def test_clips_of_a_batch_get_rates_of_their_own(whole) -> None:
    _, _, watch = whole
    assert all(len(names) == 3 and len(set(names)) == 3 for _, names, _, _ in watch.rows)
    assert len({rate for *_, rate in watch.rows}) > 2


def test_the_running_mean_is_the_mean_error(whole) -> None:
    _, trainer, _ = whole
    complexity = trainer.lightning_module.tokenizer.complexity
    seen = complexity.history[:6].flip(0)
    weights = 0.99 ** torch.arange(5, -1, -1)
    assert complexity.history[6:].sum() == 0
    assert complexity.mean.item() == pytest.approx(((weights * seen).sum() / weights.sum()).item(), rel=1e-5)


def test_validation_reports_quality_at_each_rate(whole) -> None:
    _, trainer, _ = whole
    metrics = trainer.callback_metrics
    # Of 2 x 4 x 4 tokens, one less is kept than the rate says; the floor takes up to another.
    assert 0.5 - 2 / 32 < metrics["val/kept_0.5"] < 0.53
    assert metrics["val/kept_1"] == pytest.approx(31 / 32)
    assert all(math.isfinite(metrics[f"val/psnr_{rate}"]) for rate in ("1", "0.5"))


def test_mixed_precision_trains_and_validates_to_about_the_same(whole, tmp_path) -> None:
    _, trainer, _ = whole
    mixed, _ = fit(tmp_path, precision="bf16-mixed")
    for name in ("val/psnr_1", "val/psnr_0.5"):
        assert float(mixed.callback_metrics[name]) == pytest.approx(float(trainer.callback_metrics[name]), abs=0.3)


def test_random_masks_of_validation_are_always_the_same_and_none_of_trainings(tmp_path) -> None:
    trainer, _ = fit(tmp_path, steps=2, rates=RateConfig(mask="random"))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found += trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_the_run_leaves_its_moving_average(whole) -> None:
    _, trainer, _ = whole
    exported = load_tokenizer(Path(trainer.log_dir, "export"))
    checkpoint = read_run(Path(trainer.log_dir, "checkpoints", "epoch=0-step=6.ckpt"))
    rebuilt = rebuild_tokenizer(checkpoint, "the run")
    current = checkpoint["state_dict"]
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor, rebuilt.get_parameter(name))
    assert exported.complexity.mean.item() == pytest.approx(rebuilt.complexity.mean.item())
    name = "encoder.conv_in.conv_s.weight"
    assert not torch.equal(exported.state_dict()[name], current[f"tokenizer.{name}"])


def test_a_checkpoint_is_exported_from_the_command_line(whole, tmp_path, capsys) -> None:
    _, trainer, _ = whole
    checkpoint = str(Path(trainer.log_dir, "checkpoints", "epoch=0-step=6.ckpt"))
    assert command_line(["export", "--ckpt", checkpoint, "--out", str(tmp_path / "out")]) == 0
    own = dict(load_tokenizer(tmp_path / "out").named_parameters())
    left = load_tokenizer(Path(trainer.log_dir, "export"))
    assert all(torch.equal(own[name], parameter) for name, parameter in left.named_parameters())
    assert "wrote" in capsys.readouterr().out


def test_training_starts_from_an_export_or_a_run(whole, tmp_path) -> None:
    _, trainer, _ = whole
    left = load_tokenizer(Path(trainer.log_dir, "export"))
    wanted = dict(left.named_parameters())
    for source in (Path(trainer.log_dir, "export"), Path(trainer.log_dir)):
        rates = RateConfig(mean_factor=0.5)
        module = VideoTokenizerModule(init_from=str(source), settings=asdict(TINY), rates=rates)
        module.configure_model()
        torch.testing.assert_close(module.tokenizer.complexity.mean, left.complexity.mean)
        own = dict(module.tokenizer.named_parameters())
        assert all(torch.equal(own[name], tensor) for name, tensor in wanted.items())
    other = VideoTokenizerModule(init_from=str(Path(trainer.log_dir, "export")), settings=asdict(TINY) | {"width": 24})
    with pytest.raises(CheckpointError):
        other.configure_model()


def test_it_learns(tmp_path) -> None:
    _, watch = fit(tmp_path, steps=16, rates=RateConfig("static"), lr=1e-2)
    losses = [loss for _, _, loss, _ in watch.rows]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


class Keep(pl.Callback):
    """Leaves the gradients and the running mean of the first step in a folder, per process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        kept = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        kept["complexity"] = pl_module.tokenizer.complexity.mean
        torch.save(kept, self.folder / f"{trainer.global_rank}_of_{trainer.world_size}.pt")


def fit_one_step(folder: Path, processes: int) -> None:
    """One step on four clips, shared out over so many processes."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_steps=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        callbacks=[Keep(folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # One base rate, so that a clip's rate depends on nothing but its error and the global mean.
    module = VideoTokenizerModule(settings=asdict(TINY), rates=RateConfig(bases=(0.5,)))
    trainer.fit(module, ClipDataModule(MovingScenes(side=32), frames=5, side=32, batch_size=4 // processes))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_one_with_the_whole_batch(tmp_path) -> None:
    fit_one_step(tmp_path, 1)
    fit_one_step(tmp_path, 2)
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    for name, gradient in whole.items():
        assert torch.allclose(first[name], gradient, atol=1e-5, rtol=1e-3), name
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": "9x9x9"}, "no video tokenizer '9x9x9'"),
        ({"settings": {"colour": 1}}, "colour"),
        ({"settings": {"levels": [2, 2]}}, "levels"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises((SettingsError, CheckpointError), match=said):
        VideoTokenizerModule(**arguments)


def test_the_configuration_that_ships_takes_a_step(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.init_args.val_clips=2"]
    cli = InfoTokCLI(["fit", "--config=video_tokenizer/scenes", "--trainer.accelerator=cpu", *few])
    assert isinstance(cli.model, VideoTokenizerModule) and isinstance(cli.datamodule, ClipDataModule)
    assert cli.model.rates == RateConfig() and cli.trainer.global_step == 1
    exported = load_tokenizer(Path(cli.trainer.log_dir, "export"))
    assert exported.config == SIZES["scenes"]


def test_the_study_that_ships_varies_nothing_but_rates_and_masks() -> None:
    content = yaml.safe_load((ROOT / "configs/video_tokenizer/masks.yaml").read_text())
    for row in content["rows"].values():
        rates = {name.split(".")[-1]: value for name, value in row.get("overrides", {}).items()}
        assert all(name.startswith("model.init_args.rates.") for name in row.get("overrides", {}))
        RateConfig(**rates)
    assert {"adaptive", "static", "uniform", "R2L", "Jump"} <= content["rows"].keys()
    assert len(content["seeds"]) >= 3 and all(Path(ROOT, name).exists() for name in content["configs"])


def test_compress_and_decompress_from_the_command_line(whole, tmp_path, capsys) -> None:
    _, trainer, _ = whole
    model, out = str(Path(trainer.log_dir, "export")), tmp_path / "x.itk"
    _, frames = MovingScenes(side=40).draw(0, 11)
    write_video(tmp_path / "frames", frames, Fraction(25))
    common = ["--model", model, "--device", "cpu"]
    assert command_line(["compress", *common, "--video", str(tmp_path / "frames"), "--out", str(out)]) == 0
    assert f"11 frames in {out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert command_line(["decompress", *common, "--stream", str(out), "--out", str(tmp_path / "back")]) == 0
    assert "11 frames of 40 x 40 pixels" in capsys.readouterr().out
    assert len(list((tmp_path / "back").glob("*.png"))) == 11
    (tmp_path / "back" / "000000.png").write_bytes((tmp_path / "back" / "000001.png").read_bytes())
    repeated = ["decompress", *common, "--stream", str(out), "--out", str(tmp_path / "back"), "--force"]
    assert command_line(repeated) == 0, "what was written before is replaced"
    assert (tmp_path / "back" / "000000.png").read_bytes() != (tmp_path / "back" / "000001.png").read_bytes()
    before = out.read_bytes()
    out.write_bytes(before[:-3])
    for arguments, said in (
        (["decompress", *common, "--stream", str(out), "--out", str(tmp_path / "no")], "cut off"),
        (["decompress", *common, "--stream", str(tmp_path / "nowhere"), "--out", str(tmp_path / "no")], "no stream at"),
        (["decompress", *common, "--stream", str(out), "--out", str(tmp_path / "back")], "exists"),
        (["compress", *common, "--video", str(tmp_path / "frames"), "--out", str(out)], "exists"),
        (["compress", *common, "--video", str(tmp_path / "nowhere"), "--out", str(tmp_path / "z.itk")], "no video at"),
        (["compress", *common, "--video", "x", "--out", str(tmp_path / "z.itk"), "--fps", "0.0004"], "0.001 or more"),
        (["compress", "--model", str(tmp_path), "--video", "x", "--out", str(tmp_path / "z.itk")], "not an exported"),
    ):
        assert command_line(arguments) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "frames", "x.itk"]


def test_every_process_asks_for_the_run_folder(whole) -> None:
    """Lightning settles it between all processes, so one that asked alone would wait for the others."""
    _, trainer, _ = whole
    asked = []

    class Another:
        is_global_zero, fast_dev_run, loggers = False, False, trainer.loggers
        strategy = SimpleNamespace(broadcast=asked.append)

    ExportTokenizer().on_fit_end(Another(), trainer.lightning_module)
    assert asked == [trainer.log_dir]


def test_without_a_logger_no_export_is_replaced(tmp_path) -> None:
    (tmp_path / "export").mkdir()
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    with pytest.raises(SettingsError, match=r"export exists; .*force: true"):
        ExportTokenizer().setup(trainer, None, "fit")
    ExportTokenizer(force=True).setup(trainer, None, "fit")
