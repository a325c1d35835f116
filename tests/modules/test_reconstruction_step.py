"""Reconstruction in a training step: what it adds, what a weight of 0 leaves out, and the published cycle."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from test_training_step import TERMS, batches, trainer
from tiny import FAMILIES, TinyModule, scenes_data

from infotok_lit.batch import BRANCHES
from infotok_lit.models.common.reconstruction import ReconstructionConfig
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.finite import NonFiniteError
from infotok_lit.modules.losses import TaskWeights, loss_parts, trained_branches
from infotok_lit.objective.config import ObjectiveConfig

ALONE = TaskWeights(understanding=1.0, generation=0.0, reconstruction=1.0)


def configured(terms=(), **others) -> TinyModule:
    module = TinyModule(terms, **others)
    module.configure_model()
    return module


def counted(module: TinyModule, monkeypatch) -> dict[str, int]:
    """How often each forward pass of the base model is taken."""
    calls = dict.fromkeys((*BRANCHES, "reconstruction"), 0)

    def watch(name: str):
        original = getattr(module.base, name)

        def called(*given):
            calls[name] += 1
            return original(*given)

        monkeypatch.setattr(module.base, name, called)

    for name in calls:
        watch(name)
    return calls


@pytest.mark.parametrize(
    ("weights", "terms", "expected"),
    [
        (TaskWeights(), (), (2, 2, 0)),
        (TaskWeights(reconstruction=0.5), (), (2, 2, 2)),
        (ALONE, (), (2, 0, 2)),
        (ALONE, TERMS, (2, 2, 2)),
        (TaskWeights(0.0, 0.0, 1.0), (), (0, 0, 2)),
        (TaskWeights(0.0, 1.0), (), (0, 2, 0)),
    ],
)
def test_what_has_no_weight_and_serves_no_term_is_not_computed(tmp_path, monkeypatch, weights, terms, expected) -> None:
    module = configured(terms, task_weights=weights)
    calls = counted(module, monkeypatch)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(module, scenes_data())
    assert tuple(calls.values()) == expected
    for name, count in calls.items():
        assert (f"train/{name}/loss" in run.logged_metrics) == (count > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_logs_it_and_validation_reports_everything(tmp_path, family) -> None:
    run = trainer(tmp_path, max_steps=1, val_check_interval=1)
    run.fit(TinyModule((), family=family, task_weights=ALONE), scenes_data())
    logged = run.logged_metrics
    total = logged["train/understanding/loss"] + logged["train/reconstruction/loss"]
    torch.testing.assert_close(logged["train/loss"], total)
    assert "train/generation/loss" not in logged
    assert {f"val/{name}/loss" for name in (*BRANCHES, "reconstruction")} <= logged.keys()


def test_without_a_weight_validation_does_not_reconstruct(tmp_path, monkeypatch) -> None:
    module = configured()
    calls = counted(module, monkeypatch)
    run = trainer(tmp_path)
    run.fit(module, scenes_data())
    assert calls["reconstruction"] == 0 and "val/generation/loss" in run.logged_metrics
    assert not [name for name in run.logged_metrics if "reconstruction" in name]


def test_its_weight_multiplies_it() -> None:
    module = configured(task_weights=TaskWeights(reconstruction=0.25))
    torch.manual_seed(0)
    result = module.run_reconstruction(batches(module)["generation"])
    parts = loss_parts(module.task_weights, {}, result)
    torch.testing.assert_close(parts, {"reconstruction/task": 0.25 * result.task_loss})


def test_a_quantiser_has_its_say(monkeypatch) -> None:
    module = configured(family="showo2")
    output = module.base.reconstruction(batches(module)["generation"], ReconstructionConfig())
    assert output.quantiser_loss is None
    output.quantiser_loss = torch.tensor(3.0)
    monkeypatch.setattr(module.base, "reconstruction", lambda *given: output)
    parts = loss_parts(module.task_weights, {}, module.run_reconstruction(batches(module)["generation"]))
    assert parts["reconstruction/quantiser"] == 3.0


@pytest.mark.parametrize("bottleneck", ["projected", "inline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_objective_every_trainable_parameter_gets_a_gradient(family, bottleneck) -> None:
    module = configured(TERMS, bottleneck=bottleneck, family=family, task_weights=TaskWeights(reconstruction=1.0))
    batch = batches(module)
    results = {
        branch: module.run_branch(branch, batch[branch])
        for branch in trained_branches(module.base, module.infotok.heads, module.task_weights)
    }
    parts = loss_parts(module.task_weights, results, module.run_reconstruction(batch["generation"]))
    assert {"understanding/compactness", "generation/task", "reconstruction/task"} <= parts.keys()
    torch.stack(list(parts.values())).sum().backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_inline_bottleneck_noises_both_sets_of_tokens_and_prices_them_once() -> None:
    module = configured(("compactness",), bottleneck="inline", task_weights=TaskWeights(reconstruction=1.0))
    batch = batches(module)
    losses = []
    for std in (0.05, 0.9):
        for branch in BRANCHES:
            projection = module.infotok.heads[branch].projection
            torch.nn.init.constant_(projection.log_variance.bias, 2 * torch.tensor(std).log().item())
        torch.manual_seed(0)
        losses.append(module.run_reconstruction(batch["generation"]).task_loss.item())
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"pass path\('generation'\) to the model"):
        module.infotok("generation", module.base.generation(batch["generation"]), step=0)


def test_random_numbers_of_the_branches_are_those_of_plain_fine_tuning(tmp_path) -> None:
    losses = []
    for weights in (TaskWeights(), TaskWeights(reconstruction=1.0)):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        run.fit(TinyModule((), task_weights=weights), scenes_data())
        losses.append([run.logged_metrics[f"train/{branch}/loss"] for branch in BRANCHES])
    assert losses[0] == losses[1]


def test_what_is_frozen_stays() -> None:
    module = configured(family="openuni", task_weights=ALONE, freeze=("vlm.",))
    torch.manual_seed(0)
    module.run_reconstruction(batches(module)["generation"]).task_loss.backward()
    for name, parameter in module.base.named_parameters():
        frozen = name.startswith(("vlm.", "autoencoder."))
        assert (parameter.grad is None) == frozen, name


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_may_send_a_part_of_its_gradient(family) -> None:
    module, gradients = configured(family=family), []
    for scale in (None, 0.1):
        module.base.config = replace(module.base.config, grad_scale=scale)
        offset = torch.zeros(1, requires_grad=True)
        batch = batches(module)["understanding"]
        output = module.base.understanding(batch, lambda tokens, offset=offset: tokens + offset)
        gradients.append((output.loss_sum.item(), *torch.autograd.grad(output.loss_sum, offset)))
    assert gradients[0][0] == gradients[1][0]
    assert gradients[0][1].abs() > 0
    torch.testing.assert_close(gradients[1][1], 0.1 * gradients[0][1], rtol=1e-4, atol=1e-9)


def test_reading_gradient_scale_is_a_setting() -> None:
    module = HarmonModule(reading_gradient_scale=0.1, image_size=48, settings={"repetition_penalty": 1.2})
    assert module.initial_model.settings == {"repetition_penalty": 1.2, "image_size": 48, "grad_scale": 0.1}
    assert HarmonModule().initial_model.settings == {}


def test_one_step_of_two_accumulated_batches_at_half_weight_is_the_published_cycle(tmp_path) -> None:
    """Two batches to reconstruct, two to read, one update from the mean of the four: 2 : 2 : 0."""
    cycle, passes = configured(), []
    ours = TinyModule((), task_weights=TaskWeights(0.5, 0.0, 0.5), lr=1e-2)
    run = trainer(tmp_path, max_steps=1, accumulate_grad_batches=2, limit_val_batches=0)
    kept = {}
    ours.on_before_optimizer_step = lambda optimizer: kept.update(
        {name: p.grad.clone() for name, p in ours.base.named_parameters() if p.grad is not None}
    )
    run_branch, run_reconstruction = ours.run_branch, ours.run_reconstruction

    def reading(branch, batch):
        passes.append((torch.initial_seed(), lambda: cycle.run_branch(branch, batch).task_loss))
        return run_branch(branch, batch)

    def reconstruction(batch):
        passes.append((torch.initial_seed(), lambda: cycle.run_reconstruction(batch).task_loss))
        return run_reconstruction(batch)

    ours.run_branch, ours.run_reconstruction = reading, reconstruction
    run.fit(ours, scenes_data())
    assert len(passes) == 4
    for seed, replayed in passes:
        torch.manual_seed(seed)
        (replayed() / 4).backward()
    for name, parameter in cycle.base.named_parameters():
        torch.testing.assert_close(kept.get(name), parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_loss_that_is_not_finite_is_named_with_its_samples(tmp_path) -> None:
    module = configured(task_weights=ALONE)
    original = module.base.reconstruction

    def poisoned(*given):
        output = original(*given)
        output.loss_sum = output.loss_sum * float("nan")
        return output

    module.base.reconstruction = poisoned
    with pytest.raises(NonFiniteError, match=r"reconstruction/task = nan.*reconstruction: scenes32/train/generation/"):
        trainer(tmp_path).fit(module, scenes_data())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train: all task_weights are 0"):
        HarmonModule(objective=ObjectiveConfig(terms=()), task_weights=TaskWeights(0.0, 0.0))
    with pytest.raises(ValueError, match=r"task_weights\.generation is -1"):
        TaskWeights(generation=-1)


def test_nothing_of_it_is_kept() -> None:
    """No parameter and no buffer: what is exported and what is inferred stay as they were."""
    plain, with_it = configured(), configured(task_weights=ALONE)
    with_it.run_reconstruction(batches(with_it)["generation"]).task_loss.backward()
    assert plain.state_dict().keys() == with_it.state_dict().keys()
    assert not list(chain(with_it.infotok.parameters(), with_it.infotok.buffers()))
