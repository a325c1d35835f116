"""What the configurations train is what the official stages train, group by group."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import Golden
from showo2_replay import build
from torch import nn

from infotok_lit.assets import config_chain
from infotok_lit.models.showo2.model import Showo2
from infotok_lit.modules.optimiser import OptimiserConfig, build_optimiser, freeze

CONFIGS = Path(__file__).parents[2] / "configs" / "showo2"
TENTH = 0.1
OFFICIAL_RATES = {"group_ve": 2e-6, "group_proj": 1e-5, "group_showo": 1e-5}
"""Learning rates of the official stages 2b and 2c."""


def settings(*files: str) -> dict[str, Any]:
    """model.init_args of configurations that are laid over each other."""
    merged: dict[str, Any] = {"freeze": [], "optimiser": {}}
    for path in config_chain(CONFIGS / file for file in files):
        given = yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {})
        merged["freeze"] = given.get("freeze", merged["freeze"])
        merged["optimiser"] |= given.get("optimiser", {})
    return merged


def rates(model: Showo2, *files: str) -> dict[str, float]:
    """Official name -> learning rate of everything that configurations train."""
    chosen = settings(*files)
    freeze(model, chosen["freeze"])
    optimiser = build_optimiser(OptimiserConfig(**chosen["optimiser"]), model, nn.Identity(), model.decays)
    found = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    assert all(group["weight_decay"] == 0 for group in optimiser.param_groups)
    keys = model.official_parts["showo2"].keys
    names = {id(p): keys.official_name(name) for name, p in model.named_parameters() if p.requires_grad}
    return {names[key]: rate for key, rate in found.items()}


@pytest.fixture
def model(showo2_golden: Golden) -> Showo2:
    return build(showo2_golden)


def official(golden: Golden, stage: str) -> dict[str, list[str]]:
    return golden.info["meta"][f"param_groups/{stage}"]


def test_stage_1(showo2_golden: Golden, model: Showo2) -> None:
    found = rates(model, "1.5b.yaml", "stage1.yaml")
    assert set(found) == set(official(showo2_golden, "stage_1")["trainable"])
    assert set(found.values()) == {1e-4 * TENTH}


def test_stage_2a(showo2_golden: Golden, model: Showo2) -> None:
    """The official stage leaves the time embedding without an optimiser group: it stays as it is."""
    found = rates(model, "1.5b.yaml", "stage2a.yaml")
    assert set(found) == set(official(showo2_golden, "stage_2_a")["group_proj"])
    assert set(found.values()) == {5e-5 * TENTH}


@pytest.mark.parametrize("stage", ["stage_2_b", "stage_2_c"])
def test_stages_2b_and_2c(showo2_golden: Golden, model: Showo2, stage: str) -> None:
    """All groups at a tenth of their rates, and the time embedding, which the official stage forgets, with them."""
    groups = official(showo2_golden, stage)
    expected = {name: TENTH * rate for group, rate in OFFICIAL_RATES.items() for name in groups[group]}
    forgotten = dict.fromkeys(groups["trainable_but_in_no_optimizer_group"], 1e-6)
    assert rates(model, "1.5b.yaml") == pytest.approx(expected | forgotten)
