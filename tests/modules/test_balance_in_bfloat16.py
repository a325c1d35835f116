"""Balance where the model computes in bfloat16: the weights that it finds, and what a thousandfold term changes."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from tiny import TinyModule, scenes_data

from infotok_lit.objective.balance import BalanceConfig, Shares

SHARES = Shares(0.03, 0.1, 0.3)


class LastGradients(pl.Callback):
    """What the optimiser gets in the last step, flat, by part."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for part in ("base", "infotok"):
            found = [p.grad.flatten() for p in getattr(pl_module, part).parameters() if p.grad is not None]
            setattr(self, part, torch.cat(found).float().clone())


def settled(folder, precision: str, factor: float = 1.0) -> tuple[TinyModule, LastGradients]:
    """Six steps that measure and, as good as, train nothing; sufficiency is `factor` times itself."""
    module = TinyModule(lr=1e-12)
    module.objective_config = replace(module.objective_config, balance=BalanceConfig(SHARES, SHARES, lowest=1e-12))
    module.optimiser_config = replace(module.optimiser_config, heads_lr=1e-12)
    torch.manual_seed(0)
    module.configure_model()
    for head in module.infotok.heads.values():
        original = head.decoder.forward
        head.decoder.forward = lambda *given, original=original: replace(
            (nats := original(*given)), per_image=factor * nats.per_image
        )
    last = LastGradients()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision=precision,
        max_steps=6,
        max_epochs=1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[last],
    )
    trainer.fit(module, scenes_data())
    return module, last


def test_the_weights_are_those_of_float32(tmp_path) -> None:
    (exact, _), (coarse, _) = (settled(tmp_path, precision) for precision in ("32-true", "bf16-mixed"))
    for branch, balance in exact.infotok.balances.items():
        other = coarse.infotok.balances[branch]
        assert not torch.equal(balance.mean_squares, other.mean_squares), "the model did compute in bfloat16"
        for term, weight in balance.factors().items():
            assert other.factors()[term].item() == pytest.approx(weight.item(), rel=0.03), (branch, term)
        pulls = other.pulls()
        for number, (term, share) in enumerate(other.shares.items(), start=1):
            assert (other.factors()[term] * pulls[number] / pulls[0]).item() == pytest.approx(share, rel=1e-3)


def test_a_thousand_times_a_term_leaves_the_settled_step_unchanged(tmp_path) -> None:
    (first, once), (second, thousandfold) = (settled(tmp_path, "bf16-mixed", factor) for factor in (1.0, 1000.0))
    for branch, balance in first.infotok.balances.items():
        weights, others = balance.factors(), second.infotok.balances[branch].factors()
        assert others["sufficiency"].item() == pytest.approx(weights["sufficiency"].item() / 1000, rel=1e-3)
        assert others["alignment"].item() == pytest.approx(weights["alignment"].item(), rel=1e-3)
    for part in ("base", "infotok"):
        found, other = getattr(once, part), getattr(thousandfold, part)
        assert found.norm() > 0 and (found - other).norm() < 0.01 * found.norm()
