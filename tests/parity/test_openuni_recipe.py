"""What the configurations train, and at which rates, is what the official recipes do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden import Golden
from openuni_replay import build
from torch import nn

from infotok_lit.assets import config_chain
from infotok_lit.models.openuni.model import OpenUni
from infotok_lit.modules.optimiser import OptimiserConfig, build_optimiser, freeze, warmup_cosine

CONFIGS = Path(__file__).parents[2] / "configs" / "openuni"
TENTH = 0.1
SIZES = ("b-512", "l-512", "l-1024")


def settings(*files: str) -> dict[str, Any]:
    """model.init_args of configurations that are laid over each other."""
    merged: dict[str, Any] = {"optimiser": {}}
    for path in config_chain(CONFIGS / file for file in files):
        given = yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {})
        merged |= {"freeze": given.get("freeze", merged.get("freeze"))}
        merged["optimiser"] |= given.get("optimiser", {})
    return merged


def groups(model: OpenUni, *files: str) -> dict[str, tuple[float, float]]:
    """Official name -> learning rate and weight decay of everything that configurations train."""
    chosen = settings(*files)
    freeze(model, chosen["freeze"])
    optimiser = build_optimiser(OptimiserConfig(**chosen["optimiser"]), model, nn.Identity(), model.decays)
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimiser.param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }


@pytest.fixture
def model(openuni_golden: Golden) -> OpenUni:
    return build(openuni_golden)


@pytest.mark.parametrize("size", SIZES)
def test_fine_tuning(openuni_golden: Golden, model: OpenUni, size: str) -> None:
    recorded, found = openuni_golden.info["params"], groups(model, f"{size}.yaml")
    assert set(found) == set(recorded["trainable_finetune"])
    decayed = {name for name, (_, decay) in found.items() if decay == 0.05}
    assert decayed == set(recorded["weight_decayed_finetune"])
    assert {name for name, (_, decay) in found.items() if decay == 0} == set(recorded["not_decayed_finetune"])
    official = openuni_golden.info["lr_schedule"]["finetune"]["base_lr"]
    assert [lr for lr, _ in found.values()] == pytest.approx([TENTH * official] * len(found))


def test_pretraining(openuni_golden: Golden, model: OpenUni) -> None:
    found = groups(model, "b-512.yaml", "pretrain.yaml")
    assert set(found) == set(openuni_golden.info["params"]["trainable_pretrain"])
    official = openuni_golden.info["lr_schedule"]["pretrain"]["base_lr"]
    assert [lr for lr, _ in found.values()] == pytest.approx([TENTH * official] * len(found))


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "toy"])
def test_schedule(openuni_golden: Golden, recipe: str) -> None:
    recorded = openuni_golden.info["lr_schedule"][recipe]
    config = OptimiserConfig(lr=recorded["base_lr"], warmup_steps=recorded["warmup_iters"])
    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.lr)
    factor = warmup_cosine(optimiser, config, recorded["max_iters"]).lr_lambdas[0]
    for step, rate in recorded["values"].items():
        assert config.lr * factor(int(step)) == pytest.approx(rate, rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("files", [("b-512.yaml",), ("b-512.yaml", "pretrain.yaml")])
def test_the_configurations_warm_up_as_long_as_the_official_ones(openuni_golden: Golden, files) -> None:
    contents = [yaml.safe_load(path.read_text()) for path in config_chain(CONFIGS / file for file in files)]
    recorded = openuni_golden.info["lr_schedule"]["pretrain" if len(files) > 1 else "finetune"]
    assert settings(*files)["optimiser"]["warmup_steps"] == recorded["warmup_iters"]
    lengths = [content["trainer"]["max_steps"] for content in contents if "max_steps" in content.get("trainer", {})]
    assert lengths[-1] == recorded["max_iters"]
