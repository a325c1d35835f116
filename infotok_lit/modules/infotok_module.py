"""One LightningModule for every base model: it joins the model's own losses and the InfoTok objective.

A training checkpoint holds `base.*`, which is the model, and `infotok.*`, which only training needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.metrics.scene_scores import QAExactMatch
from infotok_lit.models.unified import Batch, BranchOutput, TokenLayout, UnifiedModel
from infotok_lit.modules.determinism import StepSeed, isolated_rng
from infotok_lit.modules.finite import check_finite_gradients, check_finite_losses
from infotok_lit.modules.optimiser import OptimiserConfig, build_optimiser, freeze, warmup_cosine
from infotok_lit.modules.run import CHECKPOINT_KEY
from infotok_lit.objective.config import Branch, ObjectiveConfig
from infotok_lit.objective.distributed import global_mean
from infotok_lit.objective.infotok import BranchObjective, InfoTok
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.report import collapse_message, gradient_norms

BRANCHES: tuple[Branch, ...] = ("understanding", "generation")
CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class TaskWeights:
    """Weights of the base model's own two losses in the total.

    Args:
        understanding: Weight of the image-to-text loss.
        generation: Weight of the text-to-image loss.
    """

    understanding: float = 1.0
    generation: float = 1.0


@dataclass(frozen=True)
class BranchResult:
    """One branch of one step."""

    output: BranchOutput
    task_loss: Tensor
    """The model's own loss, a mean over the global batch: this rank's share."""
    objective: BranchObjective


@dataclass(frozen=True)
class Reading:
    """What validation reads from one understanding batch."""

    answers: list[str]
    token_rates: Tensor | None
    """(B, N) bits per token, None without a posterior."""
    layout: TokenLayout


class InfoTokModule(pl.LightningModule, ABC):
    """Fine-tunes a unified model on both tasks with the terms of the objective that are on.

    Subclasses say how their base model is built; everything else is here.
    """

    base: UnifiedModel
    infotok: InfoTok

    def __init__(
        self,
        objective: ObjectiveConfig,
        optimiser: OptimiserConfig,
        task_weights: TaskWeights,
        freeze: tuple[str, ...],
        activation_checkpointing: bool,
        answer_tokens: int,
    ) -> None:
        super().__init__()
        self.objective_config = objective
        self.optimiser_config = optimiser
        self.task_weights = task_weights
        self.frozen = tuple(freeze)
        self.activation_checkpointing = activation_checkpointing
        self.answer_tokens = answer_tokens
        self.validation_means: dict[str, MeanMetric] = {}
        self._collapse_reported: set[Branch] = set()
        self._token_gradients: dict[str, Tensor] = {}

    @abstractmethod
    def build_base(self) -> UnifiedModel:
        """The base model with the weights that training starts from."""

    @abstractmethod
    def base_reference(self) -> dict[str, Any]:
        """What rebuilds the base model beside its weights, in primitives, for the checkpoint."""

    def configure_model(self) -> None:
        """Build the base model and the heads once; a resumed run then overwrites their weights."""
        if hasattr(self, "base"):
            return
        self.base = self.build_base()
        freeze(self.base, self.frozen)
        if self.activation_checkpointing:
            self.base.set_activation_checkpointing(True)
        self.infotok = self.build_heads(self.objective_config)
        self.answer_score = QAExactMatch()

    def configure_callbacks(self) -> list[pl.Callback]:
        """What makes resuming exact, also for a Trainer that was built by hand."""
        return [StepSeed()]

    def build_heads(self, objective: ObjectiveConfig) -> InfoTok:
        """Fresh training-only heads for the base model."""
        return InfoTok(
            objective,
            token_width=self.base.token_width,
            latent_channels=self.base.latent_width,
            text_width=self.base.text_width,
            num_extra=self.base.num_extra,
        )

    # One step

    def run_branch(self, branch: Branch, batch: Batch) -> BranchResult:
        """One forward pass of one branch: the model's own loss, and the objective on the tokens it made."""
        transform = self.infotok.transform(branch)
        forward = self.base.understanding if branch == "understanding" else self.base.generation
        output = forward(batch, transform)
        task_loss = global_mean(output.loss_sum.float(), output.loss_count)
        objective = self.infotok(branch, objective_inputs(output), self.global_step)
        return BranchResult(output, task_loss, objective)

    def training_step(self, batch: Mapping[Branch, Batch], batch_idx: int) -> Tensor:
        """L = L_i2t + L_t2i + lambda (L_u + L_g), Eq. 11."""
        results = {branch: self.run_branch(branch, batch[branch]) for branch in BRANCHES}
        parts = self.loss_parts(results)
        check_finite_losses(parts, batch, self.trainer)
        total = torch.stack(list(parts.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        if self._logs_this_step():
            for branch, result in results.items():
                self._log_branch(branch, result)
            if isinstance(self.trainer.datamodule, UnifiedDataModule):
                self.log("data/broken_samples", float(self.trainer.datamodule.broken_samples))
        return total

    def loss_parts(self, results: Mapping[Branch, BranchResult]) -> dict[str, Tensor]:
        """Every summand of the total loss under a name."""
        parts = {}
        for branch, result in results.items():
            parts[f"{branch}/task"] = getattr(self.task_weights, branch) * result.task_loss
            parts |= {f"{branch}/{term}": value for term, value in result.objective.terms.items()}
        return parts

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a non-finite gradient reaches the weights; log what reached the shared tokens."""
        norm = check_finite_gradients(self.base.parameters(), self.infotok.parameters(), self.trainer)
        if self._logs_this_step():
            self.log("train/gradient_norm", norm)
            for name, value in self._token_gradients.items():
                self.log(name, value)
        self._token_gradients = {}

    def _logs_this_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _log_branch(self, branch: Branch, result: BranchResult) -> None:
        self.log(f"train/{branch}/loss", result.task_loss.detach(), sync_dist=True)
        self.log_dict({f"train/{branch}/{name}": value for name, value in result.objective.report.items()})
        self._watch_token_gradients(branch, result)
        message = collapse_message(branch, result.objective.report)
        if message is not None and branch not in self._collapse_reported:
            self._collapse_reported.add(branch)
            rank_zero_warn(f"step {self.global_step}: {message}")

    def _watch_token_gradients(self, branch: Branch, result: BranchResult) -> None:
        """What each term, and everything together, sends into the shared encoder: norms of d loss / d Z."""
        tokens, prefix = result.output.tokens, f"train/{branch}/token_gradient"
        for term, norm in gradient_norms(result.objective.terms, tokens).items():
            self._token_gradients[f"{prefix}/{term}"] = norm
        if tokens.requires_grad:
            scale = self.trainer.accumulate_grad_batches
            tokens.register_hook(
                lambda gradient: self._token_gradients.update({f"{prefix}/total": scale * gradient.float().norm()})
            )

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Reading | None:
        """Losses and information of one branch on fixed random draws, and for understanding the answers."""
        branch = BRANCHES[dataloader_idx]
        with isolated_rng(batch_idx, self.device):
            result = self.run_branch(branch, batch)
        for name, value in {"loss": result.task_loss, **result.objective.report}.items():
            mean = self.validation_means.setdefault(f"val/{branch}/{name}", MeanMetric().to(self.device))
            mean.update(value, weight=len(batch.names))
        if branch == "generation":
            return None
        answers = self.base.describe(batch.pixel_values, batch.questions, self.answer_tokens)
        self.answer_score.update(answers, batch.answers, batch.questions)
        return Reading(answers, result.objective.token_rates, result.output.layout)

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
            **self.base_reference(),
            "step": self.global_step,
            "restored_settings": self._restored_settings(),
            "objective": asdict(self.objective_config),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn about settings that resuming overrides with the checkpoint's."""
        saved = checkpoint.get(CHECKPOINT_KEY, {}).get("restored_settings", {})
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


def objective_inputs(output: BranchOutput) -> BranchInputs:
    """What the objective reads, from what a model gives."""
    return BranchInputs(
        tokens=output.tokens,
        token_index=output.token_index,
        num_extra=output.layout.num_extra,
        grid=output.layout.grid,
        text_ids=output.text.ids,
        text_mask=output.text.mask,
        target_mask=output.text.target_mask,
        text_key=output.text.key,
        text_embedding=output.text_embedding.weight,
        latents=output.latents,
        latent_grid=output.latent_grid,
    )
