"""One branch's backward pass before the other's forward pass: the numbers of one backward pass, and less memory."""

import gc
import multiprocessing
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from tiny import FAMILIES, TinyModule, scenes_data
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.errors import SettingsError
from infotok_lit.modules.finite import NonFiniteError
from infotok_lit.modules.kept_gradients import KeptGradients
from infotok_lit.modules.lora import LoraConfig
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.modules.sharded_strategy import ShardedStrategy
from infotok_lit.objective.balance import BalanceConfig, Shares

STEPS = 4
TERMS = ("compactness", "sufficiency", "alignment")
SHARES = Shares(0.03, 0.1, 0.3)
PARTS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


class Record(pl.Callback):
    """All gradients that the optimiser gets, flat, and all numbers that are logged, step by step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        found = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found).clone())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items() if "/t_" not in name}
        self.logged.append({name: value for name, value in numbers.items() if name.startswith("train/")})


def fit(module: TinyModule, folder: Path, per_branch: bool, **options: Any) -> Record:
    """Four steps with all terms balanced, each of which logs."""
    record = Record()
    module.backward_per_branch = per_branch
    module.objective_config = replace(module.objective_config, balance=BalanceConfig(SHARES, SHARES))
    # Some gradients are zero but for rounding, as that of a bias of keys, and Adam would scale the rounding up.
    module.optimiser_config = replace(module.optimiser_config, eps=1e-3)
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "max_epochs": 1, "limit_val_batches": 0}
    settings |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings |= {"default_root_dir": folder, "log_every_n_steps": 1, "callbacks": [record]}
    pl.Trainer(**(settings | options)).fit(module, scenes_data())
    return record


def assert_same(build: Callable[[], TinyModule], folder: Path, **options: Any) -> None:
    """Gradients, weights, measured pulls and all that is logged are those of one backward pass for all branches."""
    modules = wanted, found = build(), build()
    records = [fit(module, folder, module is found, **options) for module in modules]
    for one, other in zip(*(record.gradients for record in records), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * float(one.abs().max()))
    for one, other in zip(*(record.logged for record in records), strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7, nan_ok=True)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_one_backward_pass(tmp_path, family) -> None:
    assert_same(lambda: TinyModule(family=family), tmp_path, **PARTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_is_a_third_pass(tmp_path, family) -> None:
    assert_same(lambda: TinyModule(family=family, task_weights=TaskWeights(reconstruction=1.0)), tmp_path, max_steps=2)


def test_adapters_in_a_frozen_part_that_is_halved(tmp_path) -> None:
    def build() -> TinyModule:
        module = TinyModule(freeze=("llm.",), lora=LoraConfig(("llm.model.*",), rank=2))
        module.halve_frozen = True
        return module

    assert_same(build, tmp_path, precision="bf16-mixed", max_steps=2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_may_be_computed_again(tmp_path, precision) -> None:
    """Under autocast, too: what is computed in float32, as all terms are, is differentiated in float32."""

    def build() -> TinyModule:
        module = TinyModule(bottleneck="inline" if precision == "32-true" else "projected", dropout=0.1)
        module.activation_checkpointing = True
        return module

    assert_same(build, tmp_path, precision=precision, max_steps=2)


def test_a_grad_scaler_scales_what_is_kept(tmp_path) -> None:
    scaled, options = {}, {"accumulate_grad_batches": 2, "max_steps": 2}
    for per_branch in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        scaled[per_branch] = fit(TinyModule(lr=1e-6), tmp_path, per_branch, plugins=plugins, **options)
    for one, other in zip(scaled[False].gradients, scaled[True].gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * float(one.abs().max()))
    # What is logged does not hold the scale.
    exact = fit(TinyModule(lr=1e-6), tmp_path, False, **options)
    names = [name for name in exact.logged[1] if "token_gradient" in name]
    assert len(names) == 8
    for name in names:
        assert scaled[True].logged[1][name] == pytest.approx(exact.logged[1][name], rel=0.1)


def test_a_frozen_branch_whose_terms_have_no_heads_has_nothing_to_keep(tmp_path) -> None:
    def build() -> TinyModule:
        module = TinyModule(family="openuni", freeze=("vlm.",))
        module.objective_config = replace(module.objective_config, estimator="hsic")
        return module

    assert_same(build, tmp_path, max_steps=1)


def test_two_processes_under_ddp_have_the_numbers_of_one_backward_pass(tmp_path) -> None:
    # In a process of its own: where a process group once was, one that is forked later waits for ever in its first sum.
    alone = multiprocessing.get_context("fork").Process(target=_train_in_two, args=(tmp_path,))
    alone.start()
    alone.join(300)
    alone.kill()
    assert alone.exitcode == 0
    for rank in range(2):
        one, other = (torch.load(tmp_path / f"{mode}_{rank}.pt", weights_only=True) for mode in (False, True))
        torch.testing.assert_close(other["gradients"], one["gradients"], rtol=1e-5, atol=1e-7)
        assert other["logged"] == pytest.approx(one["logged"], rel=1e-5, abs=1e-7, nan_ok=True)


class Leave(pl.Callback):
    """Leaves the last gradients and numbers of each process in a file."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (record,) = (callback for callback in trainer.callbacks if isinstance(callback, Record))
        content = {"gradients": record.gradients[-1], "logged": record.logged[-1]}
        torch.save(content, Path(trainer.default_root_dir, f"{pl_module.backward_per_branch}_{trainer.global_rank}.pt"))


def _train_in_two(folder: Path) -> None:
    for per_branch in (False, True):
        module = TinyModule(task_weights=TaskWeights(reconstruction=1.0))
        module.configure_callbacks = lambda module=module: [*TinyModule.configure_callbacks(module), Leave()]
        strategy = DDPStrategy(start_method="fork", gradient_as_bucket_view=True)
        fit(module, folder, per_branch, devices=2, strategy=strategy, max_steps=2, **PARTS)


class Saved:
    """What forward passes keep for backward passes: bytes now, and at the start of each branch's forward pass."""

    def __init__(self, module: TinyModule) -> None:
        self.bytes = 0
        self.at_start: dict[str, list[int]] = {"understanding": [], "generation": [], "reconstruction": []}
        run_branch, run_reconstruction = module.run_branch, module.run_reconstruction

        def branch_watched(branch: Branch, batch: Any) -> Any:
            self.at_start[branch].append(self.bytes)
            return run_branch(branch, batch)

        def reconstruction_watched(batch: Any) -> Any:
            self.at_start["reconstruction"].append(self.bytes)
            return run_reconstruction(batch)

        module.run_branch, module.run_reconstruction = branch_watched, reconstruction_watched

    def pack(self, tensor: Tensor) -> list[Tensor]:
        kept = Kept([tensor.detach()])
        self.bytes += tensor.nbytes
        weakref.finalize(kept, self._free, tensor.nbytes)
        return kept

    def _free(self, size: int) -> None:
        self.bytes -= size


class Kept(list):
    """A list that may be referred to weakly."""


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_branch_is_left_when_the_next_one_begins(tmp_path, family) -> None:
    """Also in steps that log; and at once, not when garbage is collected."""
    found = {}
    for per_branch in (False, True):
        module = TinyModule(family=family, task_weights=TaskWeights(reconstruction=1.0))
        saved = Saved(module)
        gc.disable()
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept[0]):
                fit(module, tmp_path, per_branch, max_steps=2)
        finally:
            gc.enable()
        found[per_branch] = saved.at_start
    assert found[True] == dict.fromkeys(found[True], [0, 0])
    assert found[False]["understanding"] == [0, 0] and min(found[False]["generation"]) > 0
    assert min(found[False]["reconstruction"]) > max(found[False]["generation"])


def test_kept_gradients_are_handed_out_as_the_loss_is_scaled() -> None:
    """L = 3 sum(a + b) + b . b + a . c, of which the first two summands are differentiated early."""
    a, b, c, frozen = (nn.Parameter(torch.arange(2.0) + i) for i in range(4))
    frozen.requires_grad_(False)
    kept = KeptGradients([a, b, c, frozen], torch.tensor(0.5))
    # d (a + b) is one tensor for both of them.
    first = kept.take({"sum": 3 * (a + b).sum(), "frozen": frozen.sum()}, [])
    second = kept.take({"square": b @ b}, [])
    assert not any(value.requires_grad for value in (first | second).values())
    assert all(parameter.grad is None for parameter in (a, b, c))
    rest = kept.rest()
    assert [value.item() for value in rest.values()] == [0.0] and kept.rest() == {}
    (0.25 * (a @ c + sum(rest.values()))).backward()
    for parameter, wanted in ((a, 3 + c), (b, 3 + 2 * b), (c, a)):
        torch.testing.assert_close(parameter.grad, 0.25 * wanted.detach())


@pytest.mark.parametrize("branch", ["understanding", "generation"])
def test_a_loss_that_is_not_finite_stops_and_moves_no_weight(tmp_path, branch) -> None:
    module = TinyModule(())
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    original = getattr(module.base, branch)

    def poisoned(*given: Any) -> Any:
        output = original(*given)
        output.loss_sum = output.loss_sum * float("nan")
        return output

    setattr(module.base, branch, poisoned)
    with pytest.raises(NonFiniteError, match=rf"step 0: not finite: {branch}/task = nan.*scenes32/train/{branch}/"):
        fit(module, tmp_path, True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_sharding_is_refused_with_the_way_out(tmp_path) -> None:
    module = TinyModule()
    module.backward_per_branch = True
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", strategy=ShardedStrategy(), logger=False)
    module.trainer = trainer
    with pytest.raises(
        SettingsError, match="backward_per_branch cannot work with trainer/fsdp.*activation_checkpointing"
    ):
        module.setup("fit")
