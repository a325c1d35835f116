"""One step: what is summed, what is trained, what is logged, what stops the run."""

import math
from contextlib import nullcontext
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny import FAMILIES, TinyModule, scenes_data, tiny_model
from transformers import PreTrainedModel

from infotok_lit.batch import BRANCHES, Source
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.models.harmon.diffusion import TokenDiffusion
from infotok_lit.modules.finite import NonFiniteError
from infotok_lit.objective.alignment import NegativesConfig
from infotok_lit.scenes import Scenes

TERMS = ("compactness", "sufficiency", "alignment")


def trainer(tmp_path, **options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "max_epochs": 1,
        "logger": CSVLogger(tmp_path),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{**defaults, **options})


def batches(module: TinyModule, count: int = 4):
    source = scenes_data()._train["understanding"]
    processor = module.base.processor
    return {
        branch: getattr(processor, branch)([source.sample(branch, i, None) for i in range(count)])
        for branch in BRANCHES
    }


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("bottleneck", ["projected", "inline"])
@pytest.mark.parametrize("terms", [(), TERMS[:1], TERMS[:2], TERMS])
def test_every_trainable_parameter_gets_a_gradient(family, terms, bottleneck) -> None:
    module = TinyModule(terms, bottleneck, family=family)
    module.configure_model()
    batch = batches(module)
    parts = {}
    for branch in BRANCHES:
        result = module.run_branch(branch, batch[branch])
        parts[branch] = torch.stack([result.task_loss, *result.objective.terms.values()]).sum()
    sum(parts.values()).backward()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    if not terms:
        assert not list(module.infotok.parameters())


def test_the_task_losses_do_not_depend_on_the_noise_of_the_heads(family, tmp_path) -> None:
    losses = []
    for terms in ((), TERMS):
        pl.seed_everything(0)
        fit = trainer(tmp_path / str(len(terms)), max_steps=1, limit_val_batches=0)
        fit.fit(TinyModule(terms, family=family), scenes_data())
        losses.append([fit.logged_metrics[f"train/{branch}/loss"].item() for branch in BRANCHES])
    assert losses[0] == losses[1]


def test_the_generation_loss_does_not_depend_on_what_is_drawn_at_the_tokens(family) -> None:
    """As an inline bottleneck draws there; tiny models have no dropout after it."""
    module = TinyModule((), family=family)
    module.configure_model()
    batch, drawn = batches(module)["generation"], []

    def draws(tokens):
        drawn.append(torch.randn(1000))
        return tokens

    losses = []
    for transform in (None, draws):
        torch.manual_seed(0)
        losses.append(module.base.generation(batch, transform).loss_sum.item())
    assert drawn and losses[0] == losses[1]


def test_asking_a_module_for_its_callbacks_changes_no_run(tmp_path) -> None:
    """Of a batch that is half a step, too, whose loss rests on the seeds of the whole step."""

    class Ask(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.configure_callbacks()

    losses = []
    for callbacks in ([], [Ask()]):
        pl.seed_everything(0, verbose=False)
        run = trainer(
            tmp_path, callbacks=callbacks, max_steps=1, accumulate_grad_batches=2, limit_val_batches=0, logger=False
        )
        run.fit(TinyModule(()), scenes_data())
        losses.append(run.callback_metrics["train/loss"])
    assert torch.equal(*losses)


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_run_keeps_attention_out_of_cudnn_and_then_gives_it_back(tmp_path, ends_well) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_) -> None:
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            if not ends_well:
                raise KeyError("no")

    run = trainer(tmp_path, callbacks=[Look()], max_steps=1, limit_val_batches=0, logger=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with nullcontext() if ends_well else pytest.raises(KeyError):
        run.fit(TinyModule(()), scenes_data())
    assert before and seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()


def test_plain_fine_tuning_is_the_sum_of_the_task_losses() -> None:
    module = TinyModule(())
    module.configure_model()
    batch = batches(module)["understanding"]
    result = module.run_branch("understanding", batch)
    labels = batch.labels[:, 1:]
    latents, grid = module.base.latent_tokens(batch.pixel_values)
    visual = module.base.project_for_llm(module.base.encoder(latents, grid))
    embeds = module.base.embed_with_images(batch.input_ids, visual)
    logits = module.base.llm(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(result.task_loss, expected)
    assert result.objective.terms == {}


def test_no_term_reaches_the_language_model_through_its_embeddings(family) -> None:
    module = TinyModule(TERMS, family=family)
    module.configure_model()
    result = module.run_branch("understanding", batches(module)["understanding"])
    result.objective.loss.backward()
    assert result.output.text_embedding.weight.grad is None
    encoders = {"harmon": "encoder.", "showo2": "encoder.", "openuni": "vlm.model.vision_tower."}
    reached = {name for name, p in module.base.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith(encoders[family]) for name in reached)


def test_fit_logs_units_and_validates_both_tasks(tmp_path, family) -> None:
    run = trainer(tmp_path)
    run.fit(TinyModule(TERMS, family=family), scenes_data())
    logged = run.logged_metrics.keys() | run.callback_metrics.keys()
    for branch in BRANCHES:
        for name in ("loss", "rate_bits_per_token", "alignment_bound_nats", "sufficiency_nats_per_element"):
            assert f"train/{branch}/{name}" in logged
            assert f"val/{branch}/{name}" in logged
        for part in (*TERMS, "total"):
            assert f"train/{branch}/token_gradient/{part}" in logged
    assert "val/understanding/answers/overall" in logged
    assert {"train/gradient_norm/base", "train/gradient_norm/heads"} <= logged


def test_noise_levels_are_reported_in_bands(tmp_path) -> None:
    run = trainer(tmp_path)
    run.fit(TinyModule(TERMS, family="showo2"), scenes_data(batch_size=16))
    bands = [name for name in run.logged_metrics if name.startswith("train/generation/rate_bits_per_token/t_")]
    assert 1 <= len(bands) <= 4
    assert not [name for name in run.logged_metrics if name.startswith("train/understanding/") and "/t_" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_false_texts_of_the_data_are_further_candidates(tmp_path, family) -> None:
    """Scenes has at least three for a caption; a batch of one has no other negatives."""
    module = TinyModule(TERMS, family=family)
    negatives = replace(module.objective_config.negatives, from_data=3)
    module.objective_config = replace(module.objective_config, negatives=negatives)
    run = trainer(tmp_path, max_steps=1, val_check_interval=1)
    run.fit(module, scenes_data(batch_size=1))
    torch.testing.assert_close(run.logged_metrics["train/generation/alignment_log_k"].exp().item(), 4.0)
    assert run.logged_metrics["train/understanding/alignment_log_k"] > 0
    assert run.logged_metrics["train/generation/alignment_bound_nats"] == 0
    # Four images to validate on: another three texts each, unless two of them have the same.
    log_k = run.logged_metrics["val/generation/alignment_log_k"]
    # A few units in the last place of log 7 are what logarithms and means round by.
    assert math.log(4) < log_k <= math.log(7) * (1 + 4 * torch.finfo(torch.float32).eps)


def test_a_source_that_knows_no_false_texts_is_named(tmp_path) -> None:
    class Unknowing(Scenes):
        hard_negatives = Source.hard_negatives

    module = TinyModule(TERMS)
    module.objective_config = replace(module.objective_config, negatives=NegativesConfig(from_data=3))
    data = UnifiedDataModule(
        Unknowing(), Unknowing(), val_samples=2, understanding_batch_size=2, generation_batch_size=2
    )
    with pytest.warns(UserWarning, match="Unknowing knows no hard negatives for generation.*kept nearest"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)


def test_hsic_needs_no_heads(tmp_path, family) -> None:
    module = TinyModule(TERMS, family=family)
    module.objective_config = replace(module.objective_config, estimator="hsic")
    torch.manual_seed(0)  # a step in which Harmon shows nothing of any image would have no gradient
    run = trainer(tmp_path)
    run.fit(module, scenes_data())
    assert not list(module.infotok.parameters())
    for term in TERMS:
        assert f"train/understanding/hsic_{term}" in run.logged_metrics
        assert run.logged_metrics[f"train/generation/token_gradient/{term}"] > 0


def test_token_gradients_are_those_of_the_loss(tmp_path) -> None:
    """The logged total is || d total loss / d Z ||, also when gradients are accumulated."""
    module = TinyModule(TERMS)
    run = trainer(tmp_path, max_steps=1, accumulate_grad_batches=2, limit_val_batches=0)
    seen = {}
    original = module.run_branch

    def watched(branch, batch):
        result = original(branch, batch)
        loss = result.task_loss + result.objective.loss
        (gradient,) = torch.autograd.grad(loss, result.output.tokens, retain_graph=True)
        seen[branch] = gradient.norm()
        return result

    module.run_branch = watched
    run.fit(module, scenes_data())
    for branch in BRANCHES:
        logged = run.logged_metrics[f"train/{branch}/token_gradient/total"]
        torch.testing.assert_close(logged, seen[branch], rtol=1e-4, atol=1e-6)


def test_validation_does_not_shift_the_random_numbers_of_training(tmp_path) -> None:
    weights = []
    for interval in (1, 4):
        module = TinyModule(TERMS)
        torch.manual_seed(0)
        trainer(tmp_path, max_steps=4, val_check_interval=interval).fit(module, scenes_data())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_loss_that_is_not_finite_stops_with_term_and_samples(tmp_path, branch) -> None:
    module = TinyModule(())
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    original = module.base.__getattribute__(branch)

    def poisoned(batch, transform=None):
        output = original(batch, transform)
        output.loss_sum = output.loss_sum * float("nan")
        return output

    setattr(module.base, branch, poisoned)
    with pytest.raises(NonFiniteError, match=rf"step 0: not finite: {branch}/task = nan.*scenes32/train/{branch}/"):
        trainer(tmp_path).fit(module, scenes_data())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path) -> None:
    module = TinyModule(())
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.base.encoder.token_embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="step 0: not finite: base = inf"):
        trainer(tmp_path).fit(module, scenes_data())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_activation_checkpointing_changes_no_gradient(family) -> None:
    gradients = []
    for enabled in (False, True):
        module = TinyModule((), family=family)
        module.activation_checkpointing = enabled
        module.configure_model()
        module.train()
        torch.manual_seed(0)
        batch = batches(module)
        torch.manual_seed(1)
        sum(module.run_branch(branch, batch[branch]).task_loss for branch in BRANCHES).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.base.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_activation_checkpointing_keeps_little_of_the_token_diffusion() -> None:
    kept = []
    for enabled in (False, True):
        network, sizes = TokenDiffusion(channels=4, condition_width=8, width=32, depth=6), []
        network.activation_checkpointing = enabled
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            network(torch.randn(64, 4), torch.zeros(64, dtype=torch.int64), torch.randn(64, 32))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_activation_checkpointing_reaches_the_language_model_by_either_name(family, name, monkeypatch) -> None:
    """transformers 5.23 gave the method a new name; a version that lacks it must not train with all activations."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(PreTrainedModel, known) for known in names if hasattr(PreTrainedModel, known))
    monkeypatch.delattr(PreTrainedModel, names[0], raising=False)
    monkeypatch.setattr(PreTrainedModel, name, enable, raising=False)
    model = tiny_model(family).train()
    source = scenes_data()._train["understanding"]
    batch = model.processor.understanding([source.sample("understanding", i, None) for i in range(4)])
    kept = []
    for _ in range(2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model.understanding(batch)
        kept.append(sum(sizes))
        model.recompute_activations()
    assert kept[1] < 0.5 * kept[0]


def test_bf16_mixed_precision_trains(tmp_path, family) -> None:
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(TinyModule(TERMS, family=family), scenes_data())
    assert torch.isfinite(run.logged_metrics["train/loss"])


def test_the_language_model_head_runs_on_labelled_positions_only(family) -> None:
    model = tiny_model(family)
    source = scenes_data()._train["understanding"]
    batch = model.processor.understanding([source.sample("understanding", i, None) for i in range(4)])
    rows = []
    head = model.vlm.lm_head if family == "openuni" else model.llm.lm_head
    head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    model.understanding(batch)
    assert rows == [int((batch.labels >= 0).sum())]
