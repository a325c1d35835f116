"""What is measured once: at the last step, or in `validate`, and at no other time."""

import lightning.pytorch as pl
import pytest
from fit_with import fit
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from infotok_lit.callbacks.last_validation import LastValidation


class Counts(LastValidation):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(trainer.global_step)


def steps_of(folder, steps: int) -> list[int]:
    counts = Counts()
    fit(folder, [counts], BoringModel(), steps, data=BoringDataModule(), limit_train_batches=4)
    return counts.steps


@pytest.mark.filterwarnings("error:Counts")
def test_the_validation_at_the_last_step_measures(tmp_path) -> None:
    assert steps_of(tmp_path, 4) == [4]


@pytest.mark.parametrize("steps", [10, -1])
def test_a_run_that_ends_before_its_last_step_or_has_none_says_so(tmp_path, steps) -> None:
    with pytest.warns(UserWarning, match="Counts: nothing was measured, because no validation came at the last step"):
        assert steps_of(tmp_path, steps) == []


def test_validate_measures() -> None:
    counts = Counts()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[counts])
    trainer.validate(BoringModel(), BoringDataModule(), verbose=False)
    assert counts.steps == [0]
