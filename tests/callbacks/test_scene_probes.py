"""SceneProbes: what `measure` finds, when it is measured, and that nothing else changes; two processes as one."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fit_with import events, fit, validate_in_one_and_two_processes
from tiny import FAMILIES, TinyModule

from infotok_lit.callbacks import SceneProbes
from infotok_lit.callbacks.scene_probes import probed_model
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.image_text import ImageTextFolder
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.probe import ProbeOptions, measure

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"
FEW = {"train": 50, "test": 10}


def probed(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if "/probe/" in name}


def textured(**options) -> UnifiedDataModule:
    return UnifiedDataModule(
        train=Scenes(num_samples=40),
        val=Scenes(**options),
        understanding_batch_size=4,
        generation_batch_size=4,
        val_batch_size=4,
        val_samples=4,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_validation_logs_what_the_trained_model_holds_of_scenes_like_those_of_validation(tmp_path, family):
    module = TinyModule(("compactness",), family=family)
    data = textured(split="held_out", texture=0.6, jitter=0.25)
    trainer = fit(tmp_path, [SceneProbes(**FEW)], module, data=data)
    logged = probed(trainer.callback_metrics)
    names = {"tokens": "", "posterior mean": "posterior_mean/", "posterior sample": "posterior_sample/"}
    expected = {}
    options = ProbeOptions(**FEW, batch_size=10, texture=0.6, jitter=0.25)
    probed_now = probed_model(module.base.eval(), module.infotok.eval())
    for row in measure(probed_now, options, kinds=tuple(names)):
        if row.features in names:
            prefix = f"val/{row.branch}/probe/{names[row.features]}"
            for what in ("structure", "texture"):
                bits = getattr(row.information, what)
                expected |= {f"{prefix}{what}_bits": bits.mean, f"{prefix}{what}_error": bits.error}
    assert len(expected) == 24
    assert logged == pytest.approx(expected, abs=1e-4)
    steps = [event.step for event in events(trainer).Scalars("val/understanding/probe/texture_bits")]
    assert steps == [3], "with the other numbers of the last of three validations"


def test_a_model_without_heads_is_measured_by_validate_and_gives_its_tokens(tmp_path):
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[SceneProbes(**FEW)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    (found,) = trainer.validate(TinyModule(()), textured(), verbose=False)[:1]
    kinds = ("structure_bits", "structure_error", "texture_bits", "texture_error")
    assert set(probed(found)) == {f"val/{b}/probe/{kind}" for b in ("understanding", "generation") for kind in kinds}


class Probing(SceneProbes):
    """Probes in the middle of training, so that it could disturb what follows."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != 2:
            return
        before = torch.get_rng_state(), pl_module.training
        self._measure(pl_module)
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == pl_module.training
        self._measured = True


def test_training_goes_on_as_if_nothing_had_been_probed(tmp_path):
    plain, disturbed = TinyModule(dropout=0.1), TinyModule(dropout=0.1)
    fit(tmp_path / "plain", [], plain)
    probes = Probing(**FEW)
    fit(tmp_path / "probed", [probes], disturbed)
    assert probes._measured
    for name, value in plain.state_dict().items():
        assert torch.equal(value, disturbed.state_dict()[name]), name


def test_a_run_whose_last_step_has_no_validation_is_told(tmp_path):
    with pytest.warns(UserWarning, match="nothing was probed, because no validation came at the last step"):
        trainer = fit(tmp_path, [SceneProbes(**FEW)], steps=3)
    assert not probed(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"val": ImageTextFolder(str(PHOTOS / "annotations.json"))}, "validated on ImageTextFolder"),
        ({"val": Scenes(), "generation_val": Scenes(texture=0.5)}, "differ in spec, texture or jitter"),
    ],
)
def test_other_data_than_scenes_of_one_kind_is_refused(tmp_path, validation, said):
    data = UnifiedDataModule(train=Scenes(num_samples=40), **validation)
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, [SceneProbes(**FEW)], data=data)


def test_too_few_scenes_are_refused_at_once():
    with pytest.raises(ValueError, match="not 20 and 10"):
        SceneProbes(train=20, test=10)


def test_two_processes_log_what_one_does(tmp_path):
    def make() -> tuple[SceneProbes, TinyModule]:
        return SceneProbes(**FEW), TinyModule(())

    whole, *halves = validate_in_one_and_two_processes(tmp_path, make, "/probe/")
    assert len(whole) == 8
    assert halves == [whole, whole]
