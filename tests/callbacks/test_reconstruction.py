"""Reconstruction: what comes back is what the tokens hold; nothing else changes; two processes as one."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_with import fit, validate_in_one_and_two_processes
from tiny import TinyModule, scenes_data

from infotok_lit.callbacks import Reconstruction
from infotok_lit.errors import SettingsError
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.features import GarmentFeatures, SceneFeatures

NAMES = {f"val/probe/{name}" for name in ("frechet_distance", "psnr", "ssim", "loss", "images")}


def probe(steps: int = 3, **options) -> Reconstruction:
    return Reconstruction(
        steps=steps,
        batch_size=16,
        samples=20,
        width=32,
        depth=1,
        heads=2,
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=2),
        feature_network=SceneFeatures(),
        **options,
    )


def probed(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name in NAMES}


def validated(folder: Path, callback: Reconstruction, blind: bool = False) -> dict[str, float]:
    module = TinyModule(())
    module.configure_model()
    if blind:
        real = module.base.understood_tokens
        module.base.understood_tokens = lambda pixels, encoded=None: torch.zeros_like(real(pixels, encoded))
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False
    )
    return probed(trainer.validate(module, scenes_data(), verbose=False)[0])


def test_what_the_tokens_do_not_hold_does_not_come_back(tmp_path):
    seen, blind = validated(tmp_path, probe(120)), validated(tmp_path, probe(120), blind=True)
    images = np.stack([np.asarray(Scenes(split="val").sample("understanding", number).image) for number in range(20)])
    error = np.square(images - images.mean(0)).mean()
    # Without the image no decoder knows more of it than what all have in common.
    assert blind["val/probe/psnr"] < 10 * np.log10(255**2 / error) + 0.1
    assert seen["val/probe/psnr"] > blind["val/probe/psnr"] + 0.5 and seen["val/probe/loss"] < blind["val/probe/loss"]
    assert seen["val/probe/images"] == 20 and set(seen) == NAMES


def test_the_images_may_be_others_than_those_of_the_run(tmp_path):
    garments = Scenes("garments32", split="val", num_samples=7)
    options = {"train": Scenes("garments32"), "val": garments}
    callback = Reconstruction(steps=1, width=8, depth=1, heads=1, feature_network=GarmentFeatures(), **options)
    assert validated(tmp_path, callback)["val/probe/images"] == 7


def test_only_the_last_validation_measures_and_training_goes_on_as_if_it_had_not(tmp_path):
    plain, measured = TinyModule(dropout=0.1), TinyModule(dropout=0.1)
    fit(tmp_path / "plain", [], plain)
    calls = []

    class Early(Reconstruction):
        def on_validation_epoch_end(self, trainer, pl_module):
            super().on_validation_epoch_end(trainer, pl_module)
            if not self._measured and trainer.global_step == 2:
                before = torch.get_rng_state(), pl_module.training
                calls.append(self._measure(trainer, pl_module))
                assert torch.equal(before[0], torch.get_rng_state()) and before[1] == pl_module.training

    callback = Early(steps=2, samples=4, width=8, depth=1, heads=1, feature_network=SceneFeatures())
    trainer = fit(tmp_path / "measured", [callback], measured)
    assert len(calls) == 1 and set(probed(trainer.callback_metrics)) == NAMES
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in measured.base.llm.parameters())


def test_a_run_whose_last_step_has_no_validation_is_told(tmp_path):
    with pytest.warns(UserWarning, match="nothing was measured, because no validation came at the last step"):
        trainer = fit(tmp_path, [probe()], steps=3)
    assert not probed(trainer.callback_metrics)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="steps and batch_size must be 1 or more"):
        probe(0)
    with pytest.raises(SettingsError, match="width 64, depth 2 and heads 3 must be 1 or more, and heads divide width"):
        Reconstruction(heads=3, feature_network=SceneFeatures())
    with pytest.raises(SettingsError, match="pip install torch-fidelity"):
        Reconstruction()
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[probe()])
    loaders = scenes_data()
    with pytest.raises(SettingsError, match="train and val of its own"):
        trainer.validate(TinyModule(()), torch.utils.data.DataLoader(loaders.validation_sources["understanding"]))


def test_two_processes_log_what_one_does(tmp_path):
    whole, *halves = validate_in_one_and_two_processes(tmp_path, lambda: (probe(), TinyModule(())), "/probe/")
    assert set(whole) == NAMES and halves == [whole, whole]
