"""Which parameters the optimiser moves, and how fast."""

import pytest
import torch
from tiny import FAMILIES, TinyModule

from infotok_lit.errors import SettingsError
from infotok_lit.modules.optimiser import OptimiserConfig, build_optimiser, warmup_cosine

TERMS = ("compactness", "sufficiency", "alignment")
LANGUAGE_MODELS = {"harmon": "llm.", "showo2": "llm.", "openuni": "vlm.model.language_model."}


@pytest.mark.parametrize("family", FAMILIES)
def test_optimiser_groups_partition_the_trainable_parameters(family) -> None:
    frozen = LANGUAGE_MODELS[family]
    module = TinyModule(TERMS, freeze=(frozen,), family=family)
    module.configure_model()
    config = OptimiserConfig(lr=1e-4, heads_lr=1e-2)
    optimiser = build_optimiser(config, module.base, module.infotok, module.base.decays)
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    trainable = [id(p) for m in (module.base, module.infotok) for p in m.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert not any(p.requires_grad for name, p in module.base.named_parameters() if name.startswith(frozen))
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    assert {rates[id(p)] for p in module.infotok.parameters()} == {1e-2}
    assert {rates[id(p)] for p in module.base.parameters() if p.requires_grad} == {1e-4}


def test_a_schedule_without_an_end_is_refused() -> None:
    """As of a Trainer with max_epochs alone, on data loaders of one's own: the learning rate would be 0 soon."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(SettingsError, match=r"ends at trainer\.max_steps: set it"):
        warmup_cosine(optimiser, OptimiserConfig(warmup_steps=10), max_steps=-1)
    factor = warmup_cosine(optimiser, OptimiserConfig(warmup_steps=10), max_steps=30).lr_lambdas[0]
    assert [factor(step) for step in (9, 20, 30)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_no_two_groups_of_the_optimiser_have_one_name(decay) -> None:
    """Or Lightning's monitor of learning rates stops the run."""
    module = TinyModule(TERMS)
    module.configure_model()
    config = OptimiserConfig(lr=1e-4, heads_lr=1e-2, weight_decay=decay)
    optimiser = build_optimiser(config, module.base, module.infotok, module.base.decays)
    names = [group["name"] for group in optimiser.param_groups]
    assert len(set(names)) == len(names)
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.0, decay}
    heads = {id(one): one.ndim > 1 for one in module.infotok.parameters()}
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert all(decays[one] == (decay if is_matrix else 0.0) for one, is_matrix in heads.items())


def test_parts_may_have_a_learning_rate_of_their_own() -> None:
    module = TinyModule(())
    module.configure_model()
    config = OptimiserConfig(lr=1e-4, group_lr={"llm.": 1e-6, "llm.model.norm": 1.0})
    optimiser = build_optimiser(config, module.base, module.infotok, module.base.decays)
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    named = {name: rates[id(p)] for name, p in module.base.named_parameters() if p.requires_grad}
    for name, rate in named.items():
        in_llm = 1.0 if name.startswith("llm.model.norm") else 1e-6
        assert rate == (in_llm if name.startswith("llm.") else 1e-4)


def test_a_learning_rate_for_nothing_is_refused() -> None:
    module = TinyModule((), freeze=("llm.",))
    module.configure_model()
    with pytest.raises(ValueError, match=r"group_lr: no trainable parameter starts with 'llm\.'"):
        build_optimiser(OptimiserConfig(group_lr={"llm.": 1e-6}), module.base, module.infotok, module.base.decays)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.95), (0.9,)])
def test_betas_that_adam_cannot_have_are_refused(betas) -> None:
    with pytest.raises(SettingsError, match=r"optimiser.betas must be two numbers from 0 to below 1, got \["):
        OptimiserConfig(betas=betas)


def test_a_freeze_that_matches_nothing_is_refused() -> None:
    module = TinyModule(freeze=("lm.",))
    with pytest.raises(ValueError, match="no parameter starts with 'lm.'.*llm"):
        module.configure_model()
