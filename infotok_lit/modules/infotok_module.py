"""One LightningModule for every base model: it joins the model's own losses and the InfoTok objective.

A training checkpoint holds `base.*`, which is the model, and `infotok.*`, which only training needs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from infotok_lit.batch import BRANCHES, Batch, Branch, GenerationBatch
from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.reconstruction import ReconstructionConfig
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.base_model import BaseModel
from infotok_lit.modules.determinism import StepSeed
from infotok_lit.modules.finite import check_finite_gradients, check_finite_losses
from infotok_lit.modules.heads import build_heads
from infotok_lit.modules.lora import LoraConfig, add_adapters, merged
from infotok_lit.modules.optimiser import OptimiserConfig, build_optimiser, freeze, warmup_cosine
from infotok_lit.modules.part_gradients import part_gradient_norms
from infotok_lit.modules.results import BranchResult, Reading, ReconstructionResult, objective_inputs
from infotok_lit.modules.task_weights import TaskWeights
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.distributed import global_mean
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.inputs import image_vector
from infotok_lit.objective.report import collapse_message, gradient_norms
from infotok_lit.scenes.metrics import QAExactMatch
from infotok_lit.seeding import isolated_rng

CHECKPOINT_FORMAT = 1
HALF_PRECISIONS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


class InfoTokModule(pl.LightningModule):
    """Fine-tunes a unified model on both tasks with the terms of the objective that are on.

    A subclass names its family and documents its sizes and files; everything else is here.

    Args:
        size: Which of the family's sizes.
        init_from: Where the weights come from, without any optimiser state: `embedded` (the base that ships with the
            package, for scenes32), an official file or folder, an exported folder, or a run (its folder or one of its
            checkpoints). None starts from random weights.
        parts: Official files that the family needs beside its main one, by name, such as `autoencoder`; exported
            folders and runs bring their own.
        tokenizer: Folder or hub name of the tokenizer; default: the one that init_from brings, or that of the size.
        image_size: Side of the images in pixels; default: that of the size.
        reading_gradient_scale: Factor on the gradient that the image-to-text loss sends into the visual encoder;
            default: that of the size.
        settings: Other entries of the model's configuration that differ from the size's, nested as in an exported
            config.json.
        objective: The InfoTok objective; its `terms` decide which heads exist.
        optimiser: AdamW and its schedule.
        task_weights: Weights of the task losses.
        reconstruction: How images are reconstructed, where that loss has a weight.
        freeze: Prefixes of the parameters that stay as they are, such as `llm.`; the autoencoder always does.
        unfreeze: Prefixes of parameters that are trained although `freeze` names them.
        lora: Low-rank adapters, trained whatever `freeze` says; export merges them into the weights. None for none.
        activation_checkpointing: Save memory by recomputing activations in the backward pass.
        answer_tokens: The longest answer that validation generates, in tokens.
    """

    family: str
    base: UnifiedModel
    infotok: InfoTok

    def __init__(
        self,
        size: str = "scenes32",
        init_from: str | None = None,
        parts: dict[str, str] | None = None,
        tokenizer: str | None = None,
        image_size: int | None = None,
        reading_gradient_scale: float | None = None,
        settings: dict[str, Any] | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
        optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - frozen
        task_weights: TaskWeights = TaskWeights(),  # noqa: B008 - frozen
        reconstruction: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 - frozen
        freeze: tuple[str, ...] = (),
        unfreeze: tuple[str, ...] = (),
        lora: LoraConfig | None = None,
        activation_checkpointing: bool = False,
        answer_tokens: int = 32,
    ) -> None:
        super().__init__()
        named = {"image_size": image_size, "grad_scale": reading_gradient_scale}
        settings = dict(settings or {}) | {name: value for name, value in named.items() if value is not None}
        self.base_model = BaseModel(self.family, size, init_from, dict(parts or {}), tokenizer, settings)
        self.objective_config = objective
        self.optimiser_config = optimiser
        self.task_weights = task_weights
        self.reconstruction = reconstruction
        if not any((*asdict(task_weights).values(), *map(objective.active_terms, objective.branches))):
            raise SettingsError("nothing to train: all task_weights are 0, and objective.terms is empty")
        self.frozen = tuple(freeze)
        self.unfrozen = tuple(unfreeze)
        self.lora = lora
        self.activation_checkpointing = activation_checkpointing
        self.answer_tokens = answer_tokens
        self.validation_means: dict[str, MeanMetric] = {}
        self._collapse_reported: set[Branch] = set()
        self._frozen_reported: set[Branch] = set()
        self._gradients: dict[str, Tensor] = {}

    def build_base(self) -> UnifiedModel:
        """The base model with the weights that training starts from."""
        base = self.base_model.build()
        source = self.base_model.init_from or "random weights"
        rank_zero_info(f"The base model is {base.title} {self.base_model.size}, initialised from {source}.")
        return base

    def setup(self, stage: str) -> None:
        """Refuse weights of 16 bits: the heads need 32, and fine-tuning moves weights by less than 16 resolve."""
        precision = self.trainer.precision
        if precision in HALF_PRECISIONS:
            raise SettingsError(
                f"trainer.precision: {precision} keeps the weights themselves in 16 bits, where updates of a "
                "fine-tuning's size are rounded away: set it to bf16-mixed. To save memory, use model.lora, "
                "model.freeze or model.activation_checkpointing"
            )

    def configure_model(self) -> None:
        """Build the base model and the heads once; a resumed run then overwrites their weights."""
        if hasattr(self, "base"):
            return
        self.base = self.build_base()
        freeze(self.base, self.frozen, self.unfrozen)
        if self.lora is not None:
            add_adapters(self.base, self.lora)
        if self.activation_checkpointing:
            self.base.set_activation_checkpointing(True)
        self.infotok = self.build_heads(self.objective_config)
        self.answer_score = QAExactMatch()

    @contextmanager
    def plain_base(self) -> Iterator[UnifiedModel]:
        """The base model as it is exported: adapters are merged for as long as the context lasts."""
        with nullcontext() if self.lora is None else merged(self.base, self.lora):
            yield self.base

    def configure_callbacks(self) -> list[pl.Callback]:
        """What makes resuming exact, also for a Trainer that was built by hand."""
        return [StepSeed()]

    def build_heads(self, objective: ObjectiveConfig) -> InfoTok:
        """Fresh training-only heads for the base model."""
        return build_heads(objective, self.base)

    def hard_negatives(self, branch: Branch) -> int:
        """How many texts per image are asked of the data that it knows to be false of the image."""
        return self.objective_config.negatives_from_data(branch)

    # One step

    @property
    def trained_branches(self) -> tuple[Branch, ...]:
        """The branches that a training step computes: their own loss has a weight, or a term regularises them."""
        return tuple(
            branch for branch in BRANCHES if getattr(self.task_weights, branch) > 0 or branch in self.infotok.heads
        )

    def run_branch(self, branch: Branch, batch: Batch) -> BranchResult:
        """One forward pass of one branch: the model's own loss, and the objective on the tokens it made."""
        transform = self.infotok.transform(branch)
        forward = self.base.understanding if branch == "understanding" else self.base.generation
        output = forward(batch, transform)
        task_loss = global_mean(output.loss_sum.float(), output.loss_count)
        image = image_vector(batch.pixel_values) if self.objective_config.estimator == "hsic" else None
        objective = self.infotok(branch, objective_inputs(output, image), self.global_step)
        return BranchResult(output, task_loss, objective)

    def training_step(self, batch: Mapping[Branch, Batch], batch_idx: int) -> Tensor:
        """L = L_i2t + L_t2i + lambda (L_u + L_g), Eq. 11; and the reconstruction loss, where it has a weight."""
        # What one branch draws must not shift another's: runs that differ in their terms alone share their noise.
        seeds = dict(zip((*BRANCHES, "reconstruction"), torch.randint(2**31, (3,)).tolist(), strict=True))
        results, reconstruction = {}, None
        for branch in self.trained_branches:
            with isolated_rng(seeds[branch], self.device):
                results[branch] = self.run_branch(branch, batch[branch])
            self._warn_of_frozen_tokens(branch, results[branch])
        if self.task_weights.reconstruction:
            with isolated_rng(seeds["reconstruction"], self.device):
                reconstruction = self.run_reconstruction(batch["generation"])
        parts = self.loss_parts(results, reconstruction)
        check_finite_losses(parts, {**batch, "reconstruction": batch["generation"]}, self.trainer)
        total = torch.stack(list(parts.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        if self._logs_this_step():
            for branch, result in results.items():
                self._log_branch(branch, result)
            if reconstruction is not None:
                self.log("train/reconstruction/loss", reconstruction.task_loss.detach(), sync_dist=True)
            if isinstance(self.trainer.datamodule, UnifiedDataModule):
                self.log("data/broken_samples", float(self.trainer.datamodule.broken_samples))
        return total

    def run_reconstruction(self, batch: GenerationBatch) -> ReconstructionResult:
        """One forward pass that draws images from what the model understands of them.

        An inline bottleneck noises both sets of shared tokens; their rate is priced in the branches' own passes.
        """
        reading, drawing = (self.infotok.transform(branch, priced=False) for branch in BRANCHES)
        output = self.base.reconstruction(batch, self.reconstruction, reading, drawing)
        return ReconstructionResult(global_mean(output.loss_sum.float(), output.loss_count), output.quantiser_loss)

    def loss_parts(
        self, results: Mapping[Branch, BranchResult], reconstruction: ReconstructionResult | None = None
    ) -> dict[str, Tensor]:
        """Every summand of the total loss under a name."""
        parts = {}
        for branch, result in results.items():
            parts[f"{branch}/task"] = getattr(self.task_weights, branch) * result.task_loss
            parts |= {f"{branch}/{term}": value for term, value in result.objective.terms.items()}
            if result.output.codes is not None and result.output.codes.loss is not None:
                parts[f"{branch}/quantiser"] = result.output.codes.loss
        if reconstruction is not None:
            parts["reconstruction/task"] = self.task_weights.reconstruction * reconstruction.task_loss
            if reconstruction.quantiser_loss is not None:
                parts["reconstruction/quantiser"] = reconstruction.quantiser_loss
        return parts

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a non-finite gradient reaches the weights; log what reached the shared tokens."""
        norm = check_finite_gradients(self.base.parameters(), self.infotok.parameters(), self.trainer)
        if self._logs_this_step():
            self.log("train/gradient_norm", norm)
            for name, value in self._gradients.items():
                self.log(name, value)
        self._gradients = {}

    def _logs_this_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _log_branch(self, branch: Branch, result: BranchResult) -> None:
        self.log(f"train/{branch}/loss", result.task_loss.detach(), sync_dist=True)
        self.log_dict({f"train/{branch}/{name}": value for name, value in result.report().items()})
        self._watch_token_gradients(branch, result)
        self._watch_part_gradients(branch, result)
        message = collapse_message(branch, result.objective.report)
        if message is not None and branch not in self._collapse_reported:
            self._collapse_reported.add(branch)
            rank_zero_warn(f"step {self.global_step}: {message}")

    def _warn_of_frozen_tokens(self, branch: Branch, result: BranchResult) -> None:
        """Say once that the terms of a branch cannot move the model, and what to do about it."""
        if branch in self._frozen_reported or not result.objective.terms or result.output.tokens.requires_grad:
            return
        self._frozen_reported.add(branch)
        makers = [prefix for part in self.base.token_parts[branch] for prefix in self.base.parts[part]]
        rank_zero_warn(
            f"The tokens of the {branch} branch require no gradient, because all that makes them is frozen; so its "
            f"terms ({', '.join(result.objective.terms)}) train only the heads and move no weight of the model. Ways "
            f"out: train one of the parts that make the tokens ({', '.join(makers)}) by taking it out of model.freeze "
            "or naming it in model.unfreeze; give one of them adapters with model.lora; or leave the branch out of "
            "objective.branches."
        )

    def _watch_part_gradients(self, branch: Branch, result: BranchResult) -> None:
        """How far the objective reaches: norms of d (its weighted sum) / d (each part of the model)."""
        if result.objective.terms:
            for part, norm in part_gradient_norms(result.objective.loss, self.base, self.base.parts).items():
                self._gradients[f"train/{branch}/part_gradient/{part}"] = norm

    def _watch_token_gradients(self, branch: Branch, result: BranchResult) -> None:
        """What each term, and everything together, sends into the shared encoder: norms of d loss / d Z."""
        tokens, prefix = result.output.tokens, f"train/{branch}/token_gradient"
        for term, norm in gradient_norms(result.objective.terms, tokens).items():
            self._gradients[f"{prefix}/{term}"] = norm
        if tokens.requires_grad:
            scale = self.trainer.accumulate_grad_batches
            tokens.register_hook(
                lambda gradient: self._gradients.update({f"{prefix}/total": scale * gradient.float().norm()})
            )

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Reading:
        """Losses and information of one branch on fixed random draws, and for understanding the answers."""
        branch = BRANCHES[dataloader_idx]
        with isolated_rng(batch_idx, self.device):
            result = self.run_branch(branch, batch)
        values = {f"{branch}/{name}": value for name, value in {"loss": result.task_loss, **result.report()}.items()}
        if branch == "generation" and self.task_weights.reconstruction:
            with isolated_rng(batch_idx, self.device):
                values["reconstruction/loss"] = self.run_reconstruction(batch).task_loss
        for name, value in values.items():
            mean = self.validation_means.setdefault(f"val/{name}", MeanMetric().to(self.device))
            mean.update(value, weight=len(batch.names))
        answers = None
        if branch == "understanding":
            answers = self.base.describe(batch.pixel_values, batch.questions, self.answer_tokens)
            self.answer_score.update(answers, batch.answers, batch.questions)
        output, rates = result.output, result.objective
        return Reading(answers, output.tokens, output.layout, rates.token_rates, rates.unit_rates, output.codes)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all batches and ranks, and the exact match of the answers."""
        # Logged here, not in each step: Lightning drops what a step logs while it checks sanity, our "before".
        self.log_dict({name: mean.compute() for name, mean in self.validation_means.items()})
        self.validation_means.clear()
        scores = self.answer_score.compute()
        self.log_dict({f"val/understanding/answers/{name}": value for name, value in scores.items()})
        self.answer_score.reset()

    # Optimiser and checkpoints

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the official groups; the schedule ends at `trainer.max_steps`."""
        optimiser = build_optimiser(self.optimiser_config, self.base, self.infotok, self.base.decays)
        schedule = warmup_cosine(optimiser, self.optimiser_config, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model without this class, and the settings that resuming restores; primitives only."""
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "family": self.base.family,
            "config": self.base.description(),
            **self.base_model.reference(),
            "step": self.global_step,
            "restored_settings": self._restored_settings(),
            "lora": None if self.lora is None else asdict(self.lora) | {"targets": list(self.lora.targets)},
            "objective": asdict(self.objective_config),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other adapters than the run's; warn about settings that resuming overrides with the checkpoint's."""
        run = checkpoint.get(CHECKPOINT_KEY, {})
        lora = None if run.get("lora") is None else LoraConfig(**run["lora"])
        if lora != self.lora:
            raise CheckpointError(
                f"model.lora is {self.lora} in the config, but the run to resume has {lora}. Set it to the run's, or "
                "start anew from its weights, into which its adapters are merged, with model.init_from"
            )
        saved = run.get("restored_settings", {})
        for name, now in self._restored_settings().items():
            if name in saved and saved[name] != now:
                rank_zero_warn(
                    f"{name} is {now} in the config, but resuming goes on with the checkpoint's {saved[name]}. "
                    "To start anew from its weights with the new setting, use model.init_from instead of --ckpt_path."
                )

    def _restored_settings(self) -> dict[str, Any]:
        settings = {f"optimiser.{name}": value for name, value in asdict(self.optimiser_config).items()}
        settings["optimiser.betas"] = list(self.optimiser_config.betas)
        # The schedule's shape is recomputed from the config, so only what the optimiser state holds is restored.
        return {name: value for name, value in settings.items() if name.split(".")[1] not in _RECOMPUTED}


_RECOMPUTED = ("warmup_steps", "final_factor")
