"""Rows of a study differ in their terms and in nothing else: the placebo, and clipping by part."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny import FAMILIES, TinyModule, scenes_data

from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.objective.balance import BalanceConfig, Shares

SHARES = Shares(0.03, 0.1, 0.3)
BALANCED = BalanceConfig(SHARES, SHARES)


class Keep(pl.Callback):
    """Leaves the first process's weights, and what it logged, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            logged = {name: value for name, value in trainer.callback_metrics.items() if "train/" in name}
            torch.save({"weights": pl_module.state_dict(), "logged": logged}, self.path)


def fit(folder: Path, terms=("compactness", "sufficiency", "alignment"), family="harmon", processes=1, **objective):
    """Four steps, every second of two accumulated batches' gradients clipped; the weights, and what was logged."""
    module = TinyModule(terms, family=family)
    module.objective_config = replace(module.objective_config, **objective)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_steps=4,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        limit_val_batches=0,
        log_every_n_steps=1,
        callbacks=[Keep(folder / "kept.pt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, scenes_data())
    kept = torch.load(folder / "kept.pt", weights_only=True)
    return kept["weights"], kept["logged"]


@pytest.fixture(scope="module")
def plain_of(tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """(family, processes) -> the weights of plain fine-tuning, which is run once."""

    @cache
    def weights(family: str, processes: int = 1) -> dict[str, torch.Tensor]:
        return fit(tmp_path_factory.mktemp("plain"), (), family, processes)[0]

    return weights


def base_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("base.")}


@pytest.mark.parametrize(
    ("family", "processes", "balance"),
    [*((family, 1, BALANCED) for family in FAMILIES), ("harmon", 2, BALANCED), ("harmon", 1, BalanceConfig())],
)
def test_a_placebo_ends_with_the_weights_of_plain_fine_tuning(tmp_path, plain_of, family, processes, balance) -> None:
    plain = plain_of(family, processes)
    placebo, logged = fit(tmp_path, family=family, processes=processes, placebo=True, balance=balance)
    terms, _ = fit(tmp_path, family=family, processes=processes, balance=balance)
    torch.testing.assert_close(base_of(placebo), base_of(plain), rtol=0, atol=0)
    # The comparison could fail: the terms do move the base, and the placebo's heads have trained.
    assert any(not torch.equal(value, plain[name]) for name, value in base_of(terms).items())
    fresh = TinyModule(family=family)
    fresh.objective_config = replace(fresh.objective_config, placebo=True, balance=balance)
    torch.manual_seed(0)
    fresh.configure_model()
    heads = {name: value for name, value in fresh.state_dict().items() if name.startswith("infotok.heads.")}
    moved = [name for name, value in heads.items() if not torch.equal(value, placebo[name])]
    assert len(moved) > 0.9 * len(heads)
    for branch in ("understanding", "generation"):
        for name in ("compactness", "sufficiency", "alignment"):
            assert logged[f"train/{branch}/token_gradient/{name}"] > 0, "measured, though it goes nowhere"
            assert f"train/{branch}/weighted_{name}" in logged


@pytest.mark.parametrize("family", ["harmon", "showo2"])
def test_captioning_trains_the_encoder_and_as_a_placebo_nothing(tmp_path, plain_of, family) -> None:
    plain = plain_of(family)
    balance = BalanceConfig(generation=Shares(captioning=0.3))
    placebo, logged = fit(tmp_path, ("captioning",), family, placebo=True, balance=balance)
    term, _ = fit(tmp_path, ("captioning",), family, balance=balance)
    torch.testing.assert_close(base_of(placebo), base_of(plain), rtol=0, atol=0)
    assert any(not torch.equal(term[name], plain[name]) for name in plain if name.startswith("base.encoder."))
    assert logged["train/generation/token_gradient/captioning"] > 0
    assert logged["train/generation/rho_captioning"] == pytest.approx(0.3, rel=0.3)
    assert logged["train/generation/captioning_nats_per_token"] == pytest.approx(math.log(448), rel=0.1)


def test_base_and_heads_are_clipped_by_their_own_norms(tmp_path) -> None:
    """However large the heads' gradients are, the base's are as without them."""
    seen = []
    for factor in (1.0, 1e4):
        module = TinyModule(lr=1e-2)
        module.objective_config = replace(module.objective_config, placebo=True)
        module.configure_model()
        for parameter in module.infotok.parameters():
            parameter.register_hook(lambda gradient, factor=factor: factor * gradient)
        kept = {}
        torch.manual_seed(0)
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=1,
            max_epochs=1,
            gradient_clip_val=0.1,
            limit_val_batches=0,
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                pl.callbacks.LambdaCallback(
                    on_train_start=lambda trainer, module, kept=kept: keep_last_gradients(trainer, module, kept)
                )
            ],
        )
        trainer.fit(module, scenes_data())
        seen.append((kept, trainer.callback_metrics))
    for kept, logged in seen:
        for part in ("base", "heads"):
            assert logged[f"train/gradient_norm/{part}"] > 0.1
            assert kept[part].norm() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(seen[0][0]["base"], seen[1][0]["base"])
    ratio = seen[1][1]["train/gradient_norm/heads"] / seen[0][1]["train/gradient_norm/heads"]
    assert ratio.item() == pytest.approx(1e4, rel=1e-3)


def keep_last_gradients(trainer: pl.Trainer, module: TinyModule, kept: dict[str, torch.Tensor]) -> None:
    """The optimiser forgets them after its step: what it had is kept just before."""
    optimiser = trainer.optimizers[0]
    forget = optimiser.zero_grad

    def keep_and_forget(set_to_none: bool = True) -> None:
        gradients(module, kept)
        forget(set_to_none)

    optimiser.zero_grad = keep_and_forget


def gradients(module: TinyModule, kept: dict[str, torch.Tensor]) -> None:
    """The gradients as the optimiser sees them, flat, by part."""
    for part, owner in (("base", module.base), ("heads", module.infotok)):
        found = [parameter.grad.flatten() for parameter in owner.parameters() if parameter.grad is not None]
        if found:
            kept[part] = torch.cat(found).clone()


def test_adams_eps_is_a_setting() -> None:
    module = TinyModule(())
    module.optimiser_config = OptimiserConfig(eps=1e-12)
    module.configure_model()
    module.trainer = pl.Trainer(max_steps=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    assert {group["eps"] for group in module.configure_optimizers()["optimizer"].param_groups} == {1e-12}
    with pytest.raises(ValueError, match="optimiser.eps is 0"):
        OptimiserConfig(eps=0)


def test_balance_needs_a_task_to_measure_by() -> None:
    from infotok_lit.modules import HarmonModule
    from infotok_lit.modules.losses import TaskWeights
    from infotok_lit.objective.config import ObjectiveConfig

    with pytest.raises(ValueError, match="task_weights.generation is 0.*objective.balance.generation to null"):
        HarmonModule(objective=ObjectiveConfig(balance=BALANCED), task_weights=TaskWeights(generation=0.0))
