"""The plane's numbers against hand computation, and its history over a resumed run."""

import math
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_with import events, fit, pictures
from tiny import TinyModule, scenes_data

from infotok_lit.batch import BRANCHES
from infotok_lit.callbacks import InformationPlane
from infotok_lit.callbacks.history import MOST_ROWS, MetricHistory
from infotok_lit.callbacks.information_plane import ALIGNMENT, OWN_LOSS, SUFFICIENCY
from infotok_lit.data import Mixture
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.prior import answer_bits
from infotok_lit.scenes.spec import SPECS


def plane_of(rows: list[dict[str, float]]) -> InformationPlane:
    plane = InformationPlane()
    plane.validation.rows = rows
    return plane


def test_points_are_nats_turned_into_bits():
    row = {
        "step": 7,
        "val/generation/rate_bits_per_token": 3.0,
        "val/generation/alignment_bound_nats": math.log(8),
        "val/generation/sufficiency_nats_per_image": 100 * math.log(2),
        "val/understanding/rate_bits_per_token": 1.5,
        "val/understanding/sufficiency_nats_per_image": math.log(2),
        "answer_entropy_bits": 4.0,
    }
    plane = plane_of([row])

    def point(branch, measure):
        return plane.points(plane.validation, "val", branch, measure)[:, 0].tolist()

    assert point("generation", ALIGNMENT) == pytest.approx([7, 3.0, 3.0])
    assert point("generation", SUFFICIENCY) == pytest.approx([7, 3.0, -100.0])
    assert point("understanding", SUFFICIENCY) == pytest.approx([7, 1.5, 4.0 - 1.0])
    del row["answer_entropy_bits"]
    assert point("understanding", SUFFICIENCY) == pytest.approx([7, 1.5, -1.0])


def test_where_nothing_else_is_measured_the_models_own_loss_is():
    row = {"step": 0, "val/understanding/rate_bits_per_token": 2.0, "val/understanding/loss": 3 * math.log(2)}
    plane = plane_of([row])
    assert plane._measures("understanding") == [OWN_LOSS] and plane._measures("generation") == []
    assert plane.points(plane.validation, "val", "understanding", OWN_LOSS)[2, 0] == pytest.approx(-3.0)
    assert plane.draw().size[0] > 300
    assert not plane_of([{"step": 0, "val/understanding/loss": 1.0}])._shown(), "nothing has a rate"


def test_a_history_keeps_one_row_per_step_and_forgets_every_second_when_long():
    history = MetricHistory()
    for step in range(MOST_ROWS + 1):
        for value in (0.0, 1.0):
            history.record(step, {"a": torch.tensor(step + value)})
    assert len(history.rows) == MOST_ROWS // 2 + 1
    steps, values = history.series("a")
    assert steps == values and steps[:3] == [0, 2, 4] and steps[-1] == MOST_ROWS
    assert history.series("a", "b") == [[], [], []]


class Metrics(pl.Callback):
    """What was logged by each validation."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_run_draws_what_it_logged_and_a_resumed_one_goes_on(tmp_path):
    whole, metrics = InformationPlane(scenes="scenes32"), Metrics()
    trainer = fit(tmp_path / "whole", [whole, metrics])
    assert pictures(trainer) == [f"val_information_plane_{step:07d}.png" for step in (0, 2, 4)]
    assert len(events(trainer).Images("val/information_plane")) == 3
    source, spec = scenes_data()._val["understanding"], SPECS["scenes32"]
    samples = [source.sample("understanding", index, None) for index in range(8)]
    entropy = np.mean([answer_bits(sample.question, sample.answer, spec) for sample in samples])
    for branch in BRANCHES:
        for measure in (ALIGNMENT, SUFFICIENCY):
            points = whole.points(whole.validation, "val", branch, measure)
            nats = np.array([row[f"val/{branch}/{measure.report}"] for row in metrics.rows])
            known = entropy if (branch, measure) == ("understanding", SUFFICIENCY) else 0.0
            expected = (1 if measure is ALIGNMENT else -1) * nats / math.log(2) + known
            np.testing.assert_allclose(points[2], expected, rtol=1e-5)
            np.testing.assert_allclose(points[1], [row[f"val/{branch}/rate_bits_per_token"] for row in metrics.rows])
            assert points[0].tolist() == [0, 2, 4]
    assert [row["step"] for row in whole.training.rows] == [2, 4]

    resumed = InformationPlane(scenes="scenes32")
    (checkpoint,) = (tmp_path / "whole").rglob("*step=2.ckpt")
    fit(tmp_path / "resumed", [resumed, Metrics()], checkpoint=checkpoint)
    assert resumed.training.rows == whole.training.rows
    # The checkpoint of step 2 is older than its validation, and Lightning does not repeat that.
    assert resumed.validation.rows == [row for row in whole.validation.rows if row["step"] != 2]
    assert resumed.draw().size == whole.draw().size


def test_training_has_the_entropy_of_the_questions_that_it_asks(tmp_path):
    """Of descriptions alone, 16.4 bits, where all kinds have 3.5; of other data none is known, so nothing is added."""
    val, few = Scenes(split="val"), {"val_samples": 4, "val_batch_size": 4}
    known = UnifiedDataModule(train=Scenes(num_samples=99, question_kinds=("description",)), val=val, **few)
    unknown = UnifiedDataModule(train=Mixture([Scenes(num_samples=99), Scenes("garments32")]), val=val, **few)
    for name, data, bits in (("known", known, 16.444676), ("unknown", unknown, None)):
        plane = InformationPlane()
        fit(tmp_path / name, [plane], steps=2, data=data)
        (row,) = plane.training.rows
        assert row.get("answer_entropy_bits") == (None if bits is None else pytest.approx(bits, abs=1e-5))
        drawn = plane.points(plane.training, "train", "understanding", SUFFICIENCY)
        nats = row["train/understanding/sufficiency_nats_per_image"]
        assert drawn[2].tolist() == ([] if bits is None else pytest.approx([bits - nats / math.log(2)]))


def test_gradient_accumulation_adds_no_rows(tmp_path):
    plane = InformationPlane(unit="image")
    fit(tmp_path, [plane], accumulate_grad_batches=2, val_check_interval=4)
    assert [row["step"] for row in plane.training.rows] == [2, 4]
    assert plane.points(plane.training, "train", "generation", ALIGNMENT).shape == (3, 2)


def test_a_check_of_a_few_batches_is_no_point(tmp_path):
    plane = InformationPlane()
    fit(tmp_path, [plane], num_sanity_val_steps=1, steps=2)
    assert [row["step"] for row in plane.validation.rows] == [2]


def test_an_objective_without_posterior_draws_nothing(tmp_path):
    module = TinyModule()
    module.objective_config = replace(module.objective_config, terms=())
    trainer = fit(tmp_path, [InformationPlane()], module, steps=2)
    assert pictures(trainer) == []


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="unit must be token or image, not 'pixel'"):
        InformationPlane(unit="pixel")
    with pytest.raises(ValueError, match="scenes must be one of"):
        InformationPlane(scenes="scenes16")
