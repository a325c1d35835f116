"""Parts of a batch, on two processes under DDP or accumulated, are the whole: gradients, and what validation logs."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny import FAMILIES, TinyModule
from torch import Tensor

from infotok_lit.batch import Branch, Sample, Source, UnderstandingSample
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.models import unified
from infotok_lit.models.common.reconstruction import RandomTemplates, random_templates
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.models.harmon.sampling import RandomNumbers
from infotok_lit.models.openuni import model as openuni
from infotok_lit.models.showo2 import model as showo2
from infotok_lit.modules.lora import LoraConfig
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.objective.compactness import Posterior
from infotok_lit.scenes import Scenes

BATCH = 6
PART = {"index": 0, "of": 1}
"""Which part of the global batch is being computed, here and now."""
ALL = ("compactness", "sufficiency", "alignment")


class Uneven(Source):
    """Scenes whose answers have one to four words, and no two of which have one text."""

    def __init__(self) -> None:
        self.scenes = Scenes(num_samples=24)

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        sample = self.scenes.sample(branch, index, rng)
        if isinstance(sample, UnderstandingSample):
            return replace(sample, answer=" ".join(["red", "blue", "two", "yes"][: 1 + index % 4]))
        return sample


def data(parts: int) -> UnifiedDataModule:
    return UnifiedDataModule(
        train=Uneven(),
        val=Uneven(),
        understanding_batch_size=BATCH // parts,
        generation_batch_size=BATCH // parts,
        val_batch_size=BATCH // parts,
        val_samples=2 * BATCH,
    )


class Keep(pl.Callback):
    """Leaves in a folder, per rank: gradients, label count and loss of the first step, and what validation logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels = 0
        self.first: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self.labels = int((batch["understanding"].labels >= 0).sum())
        processes, accumulated = trainer.world_size, trainer.accumulate_grad_batches
        PART["index"] = batch_idx % accumulated * processes + trainer.global_rank
        PART["of"] = accumulated * processes

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad}
        if trainer.global_step == 0:
            loss = trainer.callback_metrics["train/loss"]
            self.first = {"gradients": deepcopy(gradients), "labels": self.labels, "loss": loss}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            at_tokens = {name: value for name, value in trainer.callback_metrics.items() if "token_gradient" in name}
            self.keep(trainer, {**self.first, "at_tokens": at_tokens})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer, {name: value for name, value in trainer.callback_metrics.items() if "val/" in name})

    def keep(self, trainer: pl.Trainer, content: dict[str, Any]) -> None:
        torch.save(content, self.folder / f"{trainer.global_rank}_of_{trainer.world_size}.pt")


def trainer(folder: Path, processes: int, steps: int = 1, accumulated: int = 1) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=100,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[Keep(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def kept(folder: Path, processes: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{i}_of_{processes}.pt", weights_only=True) for i in range(processes)]


@pytest.fixture
def sliced_draws(monkeypatch) -> None:
    """Every part draws the random numbers of the global batch and takes those of its own rows."""
    draw_global, rsample = Harmon.random_numbers, Posterior.rsample

    def draw(model: Harmon, batch: int, places: int, device: torch.device) -> RandomNumbers:
        torch.manual_seed(1)
        draws = draw_global(model, batch * PART["of"], places, device)
        mine = slice(batch * PART["index"], batch * (PART["index"] + 1))
        copies = (model.config.mar.noise_draws, batch * PART["of"], -1)

        def own(numbers: Tensor) -> Tensor:
            return numbers.unflatten(0, copies)[:, mine].flatten(0, 2)

        return RandomNumbers(draws.hidden[mine], own(draws.timesteps), own(draws.noise))

    def sample(posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        rows, *rest = posterior.mean.shape
        torch.manual_seed(2)
        return rsample(posterior, torch.randn(rows * PART["of"], *rest)[rows * PART["index"] :][:rows])

    def sliced(draw_flow: Callable[..., Any]) -> Callable[..., Any]:
        def draw(shape: torch.Size, device: torch.device, *several: int) -> Any:
            torch.manual_seed(1)
            draws = draw_flow((shape[0] * PART["of"], *shape[1:]), device, *several)
            mine = slice(shape[0] * PART["index"], shape[0] * (PART["index"] + 1))
            return type(draws)(*(getattr(draws, field.name)[mine] for field in fields(draws)))

        return draw

    def templates(batch: int) -> RandomTemplates:
        torch.manual_seed(3)
        draws, mine = random_templates(batch * PART["of"]), slice(batch * PART["index"], batch * (PART["index"] + 1))
        return RandomTemplates(draws.template[mine], draws.swap[mine])

    for family in (showo2, openuni):
        monkeypatch.setattr(family, "random_numbers", sliced(family.random_numbers))
    monkeypatch.setattr(unified, "random_templates", templates)
    monkeypatch.setattr(Harmon, "random_numbers", draw)
    monkeypatch.setattr(Harmon, "drawn_elements", lambda *_: None)  # all parts hide as many places
    monkeypatch.setattr(Posterior, "rsample", sample)


@pytest.fixture
def equal_draws(monkeypatch) -> None:
    """Every image gets the same random numbers, so that it does not matter which process validates it."""
    draw_one, rsample = Harmon.random_numbers, Posterior.rsample

    def draw(model: Harmon, batch: int, places: int, device: torch.device) -> RandomNumbers:
        torch.manual_seed(1)
        draws = draw_one(model, 1, places, device)
        copies = (model.config.mar.noise_draws, 1, -1)

        def repeated(numbers: Tensor) -> Tensor:
            each = numbers.unflatten(0, copies)
            return each.expand(-1, batch, *each.shape[2:]).flatten(0, 2)

        return RandomNumbers(draws.hidden.expand(batch, -1), repeated(draws.timesteps), repeated(draws.noise))

    def sample(posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        torch.manual_seed(2)
        return rsample(posterior, torch.randn(1, *posterior.mean.shape[1:]).expand_as(posterior.mean))

    monkeypatch.setattr(Harmon, "random_numbers", draw)
    monkeypatch.setattr(Posterior, "rsample", sample)


@pytest.mark.parametrize(
    ("terms", "bottleneck", "family", "weights"),
    [
        *((ALL, "projected", family, TaskWeights(reconstruction=1.0)) for family in FAMILIES),
        (ALL, "inline", "harmon", TaskWeights(reconstruction=1.0)),
        ((), "projected", "harmon", TaskWeights()),
        ((), "projected", "harmon", TaskWeights(generation=0.0, reconstruction=1.0)),
    ],
)
def test_two_halves_have_the_gradients_of_the_whole(tmp_path, sliced_draws, terms, bottleneck, family, weights) -> None:
    for processes in (1, 2):
        module = TinyModule(terms, bottleneck, family=family, task_weights=weights)
        trainer(tmp_path, processes).fit(module, data(processes))
    (whole,) = kept(tmp_path, 1)
    halves = kept(tmp_path, 2)
    # A mean of the halves' means would be wrong: they have different numbers of labels.
    assert halves[0]["labels"] != halves[1]["labels"]
    assert halves[0]["labels"] + halves[1]["labels"] == whole["labels"]
    assert all(gradient.any() for name, gradient in whole["gradients"].items() if name.startswith("base."))
    for half in halves:
        torch.testing.assert_close(half["gradients"], whole["gradients"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(half["loss"], whole["loss"])
        torch.testing.assert_close(half["at_tokens"], whole["at_tokens"], rtol=1e-3, atol=1e-7)
    assert len(whole["at_tokens"]) >= 2 * len(terms)


@pytest.mark.parametrize(
    ("family", "processes"), [*((family, 1) for family in FAMILIES), ("harmon", 2)], ids=lambda value: str(value)
)
def test_accumulated_batches_have_the_gradients_of_the_whole(tmp_path, sliced_draws, family, processes) -> None:
    for count, accumulated, folder in ((1, 1, tmp_path / "whole"), (processes, 3, tmp_path / "parts")):
        folder.mkdir()
        run = trainer(folder, count, accumulated=accumulated)
        run.fit(TinyModule((), family=family), data(count * accumulated))
    (whole,) = kept(tmp_path / "whole", 1)
    assert all(gradient.any() for gradient in whole["gradients"].values())
    for part in kept(tmp_path / "parts", processes):
        torch.testing.assert_close(part["gradients"], whole["gradients"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_batches_count_by_their_elements_whatever_they_draw(tmp_path, family) -> None:
    """The gradient is that of all batches' sums over all batches' counts, computed here in one piece."""
    module, whole = TinyModule((), family=family, dropout=0.1), TinyModule((), family=family, dropout=0.1)
    whole.configure_model()
    passes, run_branch = {"understanding": [], "generation": []}, module.run_branch

    def recorded(branch, batch):
        passes[branch].append((torch.initial_seed(), batch))
        return run_branch(branch, batch)

    module.run_branch = recorded
    trainer(tmp_path, 1, accumulated=3).fit(module, data(3))
    for branch, recordings in passes.items():
        outputs = []
        for seed, batch in recordings:
            torch.manual_seed(seed)
            outputs.append(getattr(whole.base, branch)(batch))
        counts = [int(output.loss_count) for output in outputs]
        assert len(counts) == 3 and (len(set(counts)) > 1) == (branch == "understanding" or family == "harmon")
        (sum(output.loss_sum for output in outputs) / sum(counts)).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(kept(tmp_path, 1)[0]["gradients"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("terms", "bottleneck"),
    [
        (("compactness",), "projected"),
        (("sufficiency",), "projected"),
        (("alignment",), "projected"),
        (("compactness", "sufficiency"), "projected"),
        (("compactness", "alignment"), "projected"),
        (("sufficiency", "alignment"), "projected"),
        (("compactness",), "inline"),
        (("compactness", "alignment"), "inline"),
    ],
)
def test_every_choice_of_terms_trains_under_ddp(tmp_path, terms, bottleneck) -> None:
    """DDP refuses the second step if a parameter of the first had no gradient; the first one is checked above."""
    trainer(tmp_path, 2, steps=2).fit(TinyModule(terms, bottleneck, freeze=("llm.",)), data(2))
    first, second = (half["gradients"] for half in kept(tmp_path, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "freeze", "options"),
    [
        ("openuni", ("vlm.",), {}),
        ("openuni", ("vlm.",), {"unfreeze": ("vlm.model.multi_modal_projector.",)}),
        ("openuni", ("vlm.", "transformer."), {"lora": LoraConfig(("vlm.model.language_model.*",), rank=2)}),
        ("harmon", ("encoder.",), {"lora": LoraConfig(("llm.model.*",), rank=2)}),
        ("showo2", ("llm.",), {"lora": LoraConfig(("llm.model.*",), rank=2)}),
    ],
)
def test_frozen_parts_and_adapters_train_under_ddp(tmp_path, sliced_draws, family, freeze, options) -> None:
    """As above, where part of the model has no gradient; then a second step, which DDP refuses if one was missing."""
    for processes in (1, 2):
        module = TinyModule(ALL, family=family, freeze=freeze, **options)
        trainer(tmp_path, processes, steps=2).fit(module, data(processes))
    (whole,) = kept(tmp_path, 1)
    reached = {name for name, gradient in whole["gradients"].items() if name.startswith("base.") and gradient.any()}
    assert reached and any(".lora_B." in name for name in reached) == ("lora" in options)
    for half in kept(tmp_path, 2):
        torch.testing.assert_close(half["gradients"], whole["gradients"], rtol=1e-3, atol=1e-6)


def test_validation_logs_the_numbers_of_one_process(tmp_path, equal_draws, monkeypatch) -> None:
    monkeypatch.setattr(Harmon, "describe", lambda model, images, prompts, count: ["red"] * len(prompts))
    for processes in (1, 2):
        trainer(tmp_path, processes).validate(TinyModule(ALL), data(processes), verbose=False)
    (whole,) = kept(tmp_path, 1)
    for half in kept(tmp_path, 2):
        # Which image is another image's other one depends on the batch that it is in.
        alike = {name: value for name, value in half.items() if "sufficiency_gap" not in name}
        assert half.keys() == whole.keys()
        torch.testing.assert_close(alike, {name: whole[name] for name in alike}, rtol=1e-4, atol=1e-5)
    assert whole["val/understanding/answers/overall"] == 0.25
    for name in ("loss", "rate_bits_per_token", "sufficiency_nats_per_element", "alignment_bound_nats"):
        assert {f"val/understanding/{name}", f"val/generation/{name}"} <= whole.keys()
