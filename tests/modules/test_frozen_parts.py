"""What is frozen, what is not, and how far the objective reaches."""

import re
import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from test_fair_comparison import BALANCED
from tiny import FAMILIES, TinyModule, scenes_data

from infotok_lit.batch import BRANCHES
from infotok_lit.errors import SettingsError
from infotok_lit.modules import losses
from infotok_lit.modules.lora import LoraConfig
from infotok_lit.modules.losses import TaskWeights, idle_message, trained_branches

TERMS = ("compactness", "sufficiency", "alignment")
OURS = re.compile("require no gradient|skips the understanding branch")
TOWER, TOWER_PROJECTOR = "vlm.model.vision_tower.", "vlm.model.multi_modal_projector."
ENCODERS = {"harmon": ("encoder.",), "showo2": ("encoder.",), "openuni": (TOWER, TOWER_PROJECTOR)}


def fit(module: TinyModule, tmp_path, steps: int = 1) -> tuple[pl.Trainer, list[str]]:
    """The trainer after some steps, and what it warned of."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=pl.loggers.CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, scenes_data())
    return trainer, [str(warning.message) for warning in caught if OURS.search(str(warning.message))]


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_tokens_are_warned_of_once_with_the_ways_out(family, tmp_path) -> None:
    _, warned = fit(TinyModule(TERMS, freeze=ENCODERS[family], family=family), tmp_path, steps=2)
    # Harmon and Show-o2 make both kinds of tokens with one encoder.
    assert len(warned) == (1 if family == "openuni" else 2)
    for words in ("understanding branch", *ENCODERS[family], "model.unfreeze", "model.lora", "objective.branches"):
        assert words in warned[0]


def test_frozen_tokens_leave_balanced_terms_without_a_weight_and_that_is_said(tmp_path) -> None:
    module = TinyModule(TERMS, freeze=ENCODERS["harmon"])
    module.objective_config = replace(module.objective_config, balance=BALANCED)
    trainer, warned = fit(module, tmp_path, steps=3)
    assert "balance weighs: it finds no pull to measure, so their weights stay 0" in warned[0]
    assert trainer.logged_metrics["train/understanding/weighted_alignment"] == 0


def test_a_task_without_weight_is_not_what_terms_are_measured_by(tmp_path, monkeypatch) -> None:
    """A ratio to nothing would be logged as infinite."""
    monkeypatch.setattr("infotok_lit.modules.infotok_module.ENCODER_EVERY", 1)
    trainer, _ = fit(TinyModule(TERMS, task_weights=TaskWeights(understanding=0.0)), tmp_path)
    found = [name for name in trainer.logged_metrics if "/encoder_" in name]
    assert found and all(name.startswith("train/generation/") for name in found)


@pytest.mark.parametrize(
    "options",
    [
        {"terms": ()},
        {"unfreeze": (TOWER_PROJECTOR,)},
        {"unfreeze": (TOWER,)},
        {"lora": LoraConfig((TOWER_PROJECTOR + "*",))},
    ],
)
def test_no_warning_where_the_terms_reach_the_model_or_are_off(options, tmp_path) -> None:
    _, warned = fit(TinyModule(**{"terms": TERMS, "freeze": ("vlm.",), "family": "openuni"} | options), tmp_path)
    # Without terms nothing of understanding trains, which is another message.
    assert [text for text in warned if "skips the understanding branch" not in text] == []
    assert len(warned) == (1 if options == {"terms": ()} else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_part_gradients_are_those_of_the_objective_alone(family, tmp_path) -> None:
    module = TinyModule(TERMS, family=family)
    expected = {}
    original = module.run_branch

    def watched(branch, batch):
        result = original(branch, batch)
        # Into .grad, which the step has just cleared, and out of it again.
        result.objective.loss.backward(retain_graph=True)
        for part, prefixes in module.base.parts.items():
            found = [p.grad for n, p in module.base.named_parameters() if n.startswith(prefixes) and p.grad is not None]
            if found:
                total = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
                expected[f"train/{branch}/part_gradient/{part}"] = total
        module.zero_grad()
        return result

    module.run_branch = watched
    trainer, _ = fit(module, tmp_path)
    assert {name for name in trainer.logged_metrics if "/part_gradient/" in name} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trainer.logged_metrics[name], value, rtol=1e-4, atol=1e-7)
    for branch in BRANCHES:
        assert any(
            trainer.logged_metrics.get(f"train/{branch}/part_gradient/{p}", 0) > 0
            for p in module.base.token_parts[branch]
        )


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, set()),
        ({"unfreeze": (TOWER_PROJECTOR,)}, {"vision_projector"}),
        ({"unfreeze": (TOWER, TOWER_PROJECTOR)}, {"vision_tower", "vision_projector"}),
        ({"lora": LoraConfig((TOWER_PROJECTOR + "*",))}, {"vision_projector"}),
        ({"lora": LoraConfig(("vlm.model.language_model.*",))}, {"language_model"}),
    ],
)
def test_part_gradients_show_what_the_terms_reach_past_a_frozen_backbone(options, reached, tmp_path) -> None:
    """Understanding's tokens lie before the language model, generation's behind it."""
    trainer, _ = fit(TinyModule(TERMS, freeze=("vlm.",), family="openuni", **options), tmp_path)

    def found(branch: str) -> set[str]:
        prefix = f"train/{branch}/part_gradient/"
        return {name.removeprefix(prefix) for name, value in trainer.logged_metrics.items() if prefix in name and value}

    assert found("understanding") == reached - {"language_model"}
    assert found("generation") == {"meta_queries", "connector"} | (reached & {"language_model"})


def test_no_part_gradients_without_an_objective(tmp_path) -> None:
    trainer, _ = fit(TinyModule((), family="openuni"), tmp_path)
    assert not [name for name in trainer.logged_metrics if "/part_gradient/" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_cover_the_model_and_name_what_makes_the_tokens(family) -> None:
    module = TinyModule((), family=family)
    module.configure_model()
    named = [name for name, parameter in module.base.named_parameters() if parameter.requires_grad]
    for name in named:
        assert sum(name.startswith(prefixes) for prefixes in module.base.parts.values()) == 1, name
    for branch in BRANCHES:
        assert set(module.base.token_parts[branch]) <= set(module.base.parts)


def trained(module: TinyModule) -> set[str]:
    module.configure_model()
    return {name for name, parameter in module.base.named_parameters() if parameter.requires_grad}


def test_an_exception_from_freezing_is_trained() -> None:
    everything = trained(TinyModule(family="openuni"))
    frozen = trained(TinyModule(family="openuni", freeze=("vlm.", "transformer.")))
    assert frozen == {name for name in everything if name.startswith(("meta_queries", "connector.", "projector."))}
    excepted = trained(TinyModule(family="openuni", freeze=("vlm.", "transformer."), unfreeze=(TOWER_PROJECTOR,)))
    assert excepted == frozen | {name for name in everything if name.startswith(TOWER_PROJECTOR)}


@pytest.mark.parametrize("prefix", ["vln.", "connector."])
def test_an_exception_that_excepts_nothing_is_refused(prefix) -> None:
    module = TinyModule(family="openuni", freeze=("vlm.",), unfreeze=(prefix,))
    with pytest.raises(ValueError, match=f"unfreeze: no parameter that `freeze` names starts with '{prefix}'"):
        module.configure_model()


def test_understanding_that_trains_nothing_is_skipped_with_a_message(tmp_path, monkeypatch) -> None:
    """And what is trained is trained as if it had been computed."""
    frozen = {"family": "openuni", "terms": (), "freeze": ("vlm.",)}
    pl.seed_everything(0)
    module = TinyModule(**frozen)
    trainer, said = fit(module, tmp_path, steps=2)
    assert len(said) == 1 and "skips the understanding branch" in said[0]
    assert "train/understanding/loss" not in trainer.callback_metrics
    pl.seed_everything(0)
    computed = TinyModule(**frozen)
    monkeypatch.setattr(losses, "idle_branches", lambda base: ())
    trainer, said = fit(computed, tmp_path, steps=2)
    assert "train/understanding/loss" in trainer.callback_metrics
    assert not said
    weights, others = module.base.state_dict(), computed.base.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "openuni", "terms": ()},
        {"family": "openuni", "freeze": ("vlm.",)},
        {"family": "openuni", "terms": (), "freeze": ("vlm.",), "unfreeze": ("vlm.model.multi_modal_projector.",)},
        {"family": "openuni", "terms": (), "freeze": ("vlm.",), "lora": LoraConfig(targets=("vlm.model.*",))},
        {"family": "harmon", "terms": (), "freeze": ("llm.",)},
    ],
)
def test_understanding_that_trains_something_is_not_skipped(options) -> None:
    module = TinyModule(**options)
    module.configure_model()
    assert trained_branches(module.base, module.infotok.heads, module.task_weights) == BRANCHES


def test_a_run_that_would_train_nothing_is_refused() -> None:
    module = TinyModule(family="openuni", terms=(), freeze=("vlm.",), task_weights=TaskWeights(generation=0.0))
    module.configure_model()
    with pytest.raises(SettingsError, match="nothing to train"):
        idle_message(
            module.base, module.task_weights, trained_branches(module.base, module.infotok.heads, module.task_weights)
        )
