"""Active units, constraints and codes: what is drawn against what it should be."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_with import events, fit, pictures
from tiny import TINY_CONFIGS, TinyModule, scenes_data

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.callbacks import ActiveUnits, Codebook, Constraints
from infotok_lit.callbacks import active_units as active_units_file
from infotok_lit.callbacks import codebook as codebook_file
from infotok_lit.callbacks.codebook import CodedImages, draw_maps
from infotok_lit.models.family import family as family_called
from infotok_lit.models.showo2.family import QuantiserConfig
from infotok_lit.objective.config import BranchWeights


def test_active_units_are_mean_kl_per_dimension_and_add_up_to_the_rate(tmp_path, monkeypatch):
    drawn = []
    original = active_units_file.draw_active_units
    monkeypatch.setattr(active_units_file, "draw_active_units", lambda rates: drawn.append(rates) or original(rates))
    module = TinyModule(family="showo2")
    trainer = fit(tmp_path, [ActiveUnits()], module, steps=2)
    assert pictures(trainer) == ["val_active_units_0000000.png", "val_active_units_0000002.png"]
    for branch, rates in drawn[-1].items():
        assert float(rates.sum()) == pytest.approx(float(trainer.callback_metrics[f"val/{branch}/rate_bits_per_token"]))
    source = scenes_data()._val["understanding"]
    samples = [source.sample("understanding", index, None) for index in range(8)]
    with torch.no_grad():
        tokens = module.base.eval().understanding(module.base.processor.understanding(samples)).tokens
        posterior = module.infotok.posterior("understanding", tokens)
    normal = torch.distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(drawn[-1]["understanding"], kl.mean((0, 1)) / math.log(2), rtol=1e-3, atol=1e-6)


def test_a_constraint_is_drawn_from_what_training_logs_and_goes_on_after_resuming(tmp_path):
    def constrained() -> TinyModule:
        module = TinyModule()
        budget = BranchWeights(alpha=10.0, beta=10.0, rate_budget_bits=2.0)
        module.objective_config = replace(module.objective_config, understanding=budget)
        return module

    whole = Constraints()
    trainer = fit(tmp_path / "whole", [whole], constrained())
    assert pictures(trainer) == ["train_constraints_0000002.png", "train_constraints_0000004.png"]
    for name in ("constraint_gap", "constraint_multiplier"):
        logged = events(trainer).Scalars(f"train/understanding/{name}")
        steps, values = whole.history.series(f"train/understanding/{name}")
        assert steps == [2, 4]
        np.testing.assert_allclose(values, [entry.value for entry in logged], rtol=1e-6)
    resumed = Constraints()
    (checkpoint,) = (tmp_path / "whole").rglob("*step=2.ckpt")
    fit(tmp_path / "resumed", [resumed], constrained(), checkpoint=checkpoint)
    assert resumed.history.rows == whole.history.rows


class Discrete(TinyModule):
    """Tiny Show-o2 with 12 codes."""

    def __init__(self) -> None:
        super().__init__(family="showo2")

    def build_base(self):
        config = replace(TINY_CONFIGS["showo2"](0.0), quantiser=QuantiserConfig(kind="fsq", levels=(4, 3)))
        torch.manual_seed(0)
        return family_called("showo2").build(config, str(SCENES_TOKENIZER)).train()


def test_codes_are_counted_over_the_validation_set(tmp_path, monkeypatch):
    drawn = []
    original = codebook_file.draw_usage
    monkeypatch.setattr(codebook_file, "draw_usage", lambda counts: drawn.append(counts) or original(counts))
    module = Discrete()
    trainer = fit(tmp_path, [Codebook(shown=2)], module, steps=2)
    assert pictures(trainer) == [f"val_code_{what}_000000{step}.png" for what in ("maps", "usage") for step in (0, 2)]
    source = scenes_data()._val["understanding"]
    samples = [source.sample("understanding", index, None) for index in range(8)]
    with torch.no_grad():
        codes = module.base.eval().understanding(module.base.processor.understanding(samples)).codes.codes
    counts = [int((codes == code).sum()) for code in range(12)]
    assert drawn[-1]["understanding"].tolist() == counts
    assert int(drawn[-1]["generation"].sum()) == codes.numel()


def test_maps_are_dark_where_codes_are_common():
    codes = torch.tensor([[[5, 5], [5, 2]]])
    counts = torch.tensor([0, 0, 1, 0, 0, 90, 9])
    picture = np.asarray(draw_maps(CodedImages(torch.zeros(1, 3, 8, 8), codes), counts))
    tile = picture[6:166, 172:332].astype(int).sum(2)
    assert tile[40, 40] == tile[40, 120] == tile[120, 40] < tile[120, 120]


@pytest.mark.parametrize("callback", [ActiveUnits, Constraints, Codebook])
def test_where_there_is_nothing_to_draw_nothing_is_drawn(tmp_path, callback):
    trainer = fit(tmp_path, [callback()], TinyModule(()), steps=2)
    assert pictures(trainer) == []
