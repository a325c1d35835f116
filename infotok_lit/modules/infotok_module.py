"""One LightningModule for every base model: it joins the model's own losses and the InfoTok objective.

A training checkpoint holds `base.*`, which is the model, and `infotok.*`, which only training needs.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from infotok_lit.batch import BRANCHES, Batch, Branch, GenerationBatch
from infotok_lit.checkpoints import CHECKPOINT_KEY
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.language_model import compile_blocks
from infotok_lit.models.common.reconstruction import ReconstructionConfig
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.base_model import HOW_TO_LOAD, InitialModel, build_heads, plain, refuse_lost_average
from infotok_lit.modules.finite import FiniteGuard
from infotok_lit.modules.gradients import ENCODER_EVERY, GradientWatch, frozen_tokens_message
from infotok_lit.modules.half_linear import halve_frozen_layers, warn_of_rounding
from infotok_lit.modules.kept_gradients import KeptGradients, backward_scale, refuse_sharding
from infotok_lit.modules.lora import LoraConfig, add_adapters
from infotok_lit.modules.losses import (
    BranchResult,
    ReconstructionResult,
    TaskWeights,
    check_trainable,
    draw_seeds,
    elements_of_step,
    idle_message,
    loss_parts,
    read_with_fewer,
    task_loss,
    trained_branches,
)
from infotok_lit.modules.optimiser import (
    MaskedAdamW,
    OptimiserConfig,
    build_optimiser,
    clip_apart,
    freeze,
    refuse_trainer,
    warmup_cosine,
)
from infotok_lit.modules.run_callbacks import callbacks_of_models, seeds_of_step, tell_model_is_built
from infotok_lit.modules.run_checkpoint import check_resumed
from infotok_lit.modules.sharding import refuse_captioning, reshard, shard
from infotok_lit.modules.validation import Validation, finite_only
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.distributed import global_sum, world_size
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.report import collapse_message
from infotok_lit.seeding import isolated_rng


class InfoTokModule(pl.LightningModule):
    """Fine-tunes a unified model on both tasks with the terms of the objective that are on.

    A subclass names its family and documents its sizes and files; everything else is here.

    Args:
        size: Which of the family's sizes.
        init_from: Where the weights come from, without any optimiser state: `embedded` (the base that ships with the
            package, for scenes32), an official file or folder, an exported folder, a run (its folder or one of its
            checkpoints), or a name on the Hugging Face hub (docs/checkpoints.md). None starts from random weights.
        parts: Official files that the family needs beside its main one, by name, such as `autoencoder`; exported
            folders and runs bring their own.
        tokenizer: Folder or hub name of the tokenizer; default: the one that init_from brings, or that of the size.
        image_size: Side of the images in pixels; default: that of the size.
        capacity_bits: The most bits that the shared tokens of an image may carry in training, in each branch: they are
            normalised without a gain, then noise of a fixed strength is added (docs/objective.md). Null for no limit.
        reading_gradient_scale: Factor on the image-to-text loss's gradient in the visual encoder; default: the size's.
        settings: Other entries of the model's configuration that differ from the size's, nested as in an exported
            config.json.
        objective: The InfoTok objective; its `terms` decide which heads exist.
        optimiser: AdamW and its schedule.
        task_weights: Weights of the task losses.
        reconstruction: How images are reconstructed, where that loss has a weight.
        freeze: Prefixes of the parameters that stay as they are, such as `llm.`; the autoencoder always does.
        unfreeze: Prefixes of parameters that are trained although `freeze` names them.
        lora: Low-rank adapters, trained whatever `freeze` says; export merges them into the weights. None for none.
        halve_frozen: Keep frozen linear layers in bfloat16, in half the memory; bf16-mixed computes the same with them.
        activation_checkpointing: Save memory by recomputing activations in the backward pass.
        backward_per_branch: Save memory by running each branch's backward pass before the next one's forward pass, at
            the cost of 4 bytes for each trained weight (docs/memory.md). Not with trainer/fsdp.
        compile_blocks: Compile the layers with torch.compile; the first steps take minutes, later ones less time.
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
        capacity_bits: float | None = None,
        reading_gradient_scale: float | None = None,
        settings: dict[str, Any] | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
        optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - frozen
        task_weights: TaskWeights = TaskWeights(),  # noqa: B008 - frozen
        reconstruction: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 - frozen
        freeze: tuple[str, ...] = (),
        unfreeze: tuple[str, ...] = (),
        lora: LoraConfig | None = None,
        halve_frozen: bool = False,
        activation_checkpointing: bool = False,
        backward_per_branch: bool = False,
        compile_blocks: bool = False,
        answer_tokens: int = 32,
    ) -> None:
        super().__init__()
        named = {"image_size": image_size, "capacity_bits": capacity_bits, "grad_scale": reading_gradient_scale}
        settings = dict(settings or {}) | {name: value for name, value in named.items() if value is not None}
        self.initial_model = InitialModel(self.family, size, init_from, dict(parts or {}), tokenizer, settings)
        self.objective_config, self.optimiser_config = objective, optimiser
        self.task_weights, self.reconstruction = task_weights, reconstruction
        check_trainable(task_weights, objective)
        if answer_tokens < 1:
            raise SettingsError(f"answer_tokens is {answer_tokens}; set it to 1 or more")
        self.frozen, self.unfrozen = tuple(freeze), tuple(unfreeze)
        self.lora, self.halve_frozen, self.compile_blocks = lora, halve_frozen, compile_blocks
        self.activation_checkpointing, self.backward_per_branch = activation_checkpointing, backward_per_branch
        self.answer_tokens = answer_tokens
        self.guard, self.gradients = FiniteGuard(), GradientWatch()
        self.validation: Validation | None = None
        self._said: set[tuple[str, Branch]] = set()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *_: Any, **__: Any) -> NoReturn:
        """SettingsError: a run's model is rebuilt without this class."""
        raise SettingsError(HOW_TO_LOAD.format(path=str(checkpoint_path)))

    def build_base(self) -> UnifiedModel:
        """The base model with the weights that training starts from."""
        base = self.initial_model.build()
        source = self.initial_model.init_from or "random weights"
        rank_zero_info(f"The base model is {base.title} {self.initial_model.size}, initialised from {source}.")
        return base

    def setup(self, stage: str) -> None:
        """Refuse a precision or a strategy that cannot train."""
        refuse_trainer(self.trainer.precision, self.trainer.strategy)
        if self.backward_per_branch:
            refuse_sharding(self.trainer.strategy)
        if self.halve_frozen:
            warn_of_rounding(self.trainer.precision)

    def configure_model(self) -> None:
        """Build the base model and the heads once; a resumed run then overwrites their weights."""
        if hasattr(self, "base"):
            return
        strategy = None if self.device_mesh is None else self.trainer.strategy
        self.base = self.build_base()
        freeze(self.base, self.frozen, self.unfrozen)
        if self.lora is not None:
            add_adapters(self.base, self.lora)
        if self.activation_checkpointing:
            self.base.recompute_activations()
        if self.compile_blocks:
            compile_blocks(self.base)
        self.infotok = build_heads(self.objective_config, self.base)
        self.frozen_weights = self.initial_model.frozen_weights(self.base, strategy, self.halve_frozen)
        if self.halve_frozen:
            halve_frozen_layers(self.base)
        if strategy is not None:
            refuse_captioning(self.objective_config)
            shard(self.base, self.infotok, self.device_mesh)
        tell_model_is_built(self)

    def plain_base(self, exact: bool = False) -> AbstractContextManager[UnifiedModel | None]:
        """The base model without adapters, which are merged for as long as the context lasts; see `plain`."""
        return plain(self.base, self.initial_model, self.lora, exact)

    def configure_callbacks(self) -> list[pl.Callback]:
        """What every run gets, also with a Trainer that was built by hand."""
        return callbacks_of_models()

    def hard_negatives(self, branch: Branch) -> int:
        """How many texts per image are asked of the data that it knows to be false of the image."""
        return self.objective_config.negatives_from_data(branch)

    # One step

    def run_branch(self, branch: Branch, batch: Batch) -> BranchResult:
        """One forward pass of one branch: the model's own loss, and the objective on the tokens it made."""
        path = self.infotok.path(branch, self.global_step)
        forward = self.base.understanding if branch == "understanding" else self.base.generation
        output = forward(batch, path)
        with torch.no_grad():
            needed = self.infotok.needs_understood(branch)
            understood = self.base.understood_tokens(batch.pixel_values) if needed else None
        objective = self.infotok(
            branch,
            output,
            self.global_step,
            path=path,
            pixel_values=batch.pixel_values,
            understood=understood,
            read_caption=lambda tokens: self.base.caption_nats(tokens, output, batch.captions),
        )
        fewer = read_with_fewer(self.base, self.infotok, batch, output.tokens) if branch == "understanding" else None
        return BranchResult(output, task_loss(output), objective, fewer=fewer)

    def run_reconstruction(self, batch: GenerationBatch) -> ReconstructionResult:
        """One forward pass that draws images from what the model understands of them.

        An inline bottleneck noises both sets of shared tokens; their rate is priced in the branches' own passes.
        """
        reading, drawing = (self.infotok.path(branch, self.global_step, priced=False) for branch in BRANCHES)
        output = self.base.reconstruction(batch, self.reconstruction, reading, drawing)
        return ReconstructionResult(task_loss(output), output.quantiser_loss)

    def training_step(self, batch: Mapping[Branch, Batch], batch_idx: int) -> Tensor:
        """L = L_i2t + L_t2i + lambda (L_u + L_g), Eq. 11; and the reconstruction loss, where it has a weight."""
        seeds, elements = draw_seeds(), elements_of_step(self.base, batch, seeds_of_step(self.trainer, batch_idx))
        branches = trained_branches(self.base, self.infotok.heads, self.task_weights)
        self._say_once("idle", "understanding", idle_message(self.base, self.task_weights, branches))
        kept = KeptGradients(self.parameters(), backward_scale(self.trainer)) if self.backward_per_branch else None
        parts: dict[str, Tensor] = {}
        for branch in branches:
            is_last = branch == branches[-1] and not self.task_weights.reconstruction
            parts |= self._branch_loss(branch, batch[branch], seeds[branch], elements, None if is_last else kept)
        if self.task_weights.reconstruction:
            with isolated_rng(seeds["reconstruction"], self.device):
                reconstruction = self.run_reconstruction(batch["generation"])
            parts |= loss_parts(self.task_weights, {}, reconstruction)
            if self._logs_this_step():
                self.log("train/reconstruction/loss", reconstruction.task_loss.detach(), sync_dist=True)
        parts |= {} if kept is None else kept.rest()
        total = self.guard.watch_losses(parts, {**batch, "reconstruction": batch["generation"]}, self.global_step)
        shown = global_sum(total.detach()) / world_size() if self._logs_this_step() else total.detach()
        self.log("train/loss", shown, prog_bar=True)
        return total

    def _branch_loss(
        self, branch: Branch, batch: Batch, seed: int, elements: Mapping[Branch, float], kept: KeptGradients | None
    ) -> dict[str, Tensor]:
        """The summands that a branch adds to the loss; only their values, where its gradients are kept."""
        with isolated_rng(seed, self.device):
            result = self.run_branch(branch, batch)
        self._say_once("frozen", branch, frozen_tokens_message(branch, self.base, result))
        parts = loss_parts(self.task_weights, {branch: result}, elements=elements)
        if self._logs_this_step():
            self._log_branch(branch, result, parts[f"{branch}/task"])
        return parts if kept is None else kept.take(parts, self.infotok.units())

    def configure_gradient_clipping(
        self, optimizer: MaskedAdamW, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the base model and the heads apart; mask a step that is not finite; log what reached what."""
        self.infotok.finish_step()
        parts = {"base": self.base.parameters(), "heads": self.infotok.parameters()}
        norms = clip_apart(parts, gradient_clip_val, gradient_clip_algorithm)
        self.guard.finish_step(norms, optimizer, self)
        if self._logs_this_step():
            self.log_dict({f"train/gradient_norm/{part}": norm for part, norm in norms.items()})
            self.log_dict(self.gradients.take())

    def on_train_end(self) -> None:
        """What happened since the last step that logged."""
        self.guard.check(self, self.trainer)

    def _logs_this_step(self) -> bool:
        return bool(every := self.trainer.log_every_n_steps) and (self.global_step + 1) % every == 0

    def _log_branch(self, branch: Branch, result: BranchResult, task: Tensor) -> None:
        self.log(f"train/{branch}/loss", result.task_loss.detach(), prog_bar=True, sync_dist=True)
        report = finite_only(result.report())
        self.log_dict({f"train/{branch}/{name}": value for name, value in report.items()})
        self.gradients.watch(branch, self.base, self.infotok, result, scale=backward_scale(self.trainer))
        if (self.global_step + 1) % (ENCODER_EVERY * self.trainer.log_every_n_steps) == 0:
            self.gradients.watch_encoder(branch, self.base, self.infotok, result, task)
        self._say_once("collapse", branch, collapse_message(branch, report))
        if branch in self.infotok.balances:
            self._say_once("silent task", branch, self.infotok.balances[branch].silent_task_message(branch))

    def _say_once(self, kind: str, branch: Branch, message: str | None) -> None:
        if message is not None and (kind, branch) not in self._said:
            self._said.add((kind, branch))
            rank_zero_warn(f"step {self.global_step}: {message}")

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self.validation = Validation(self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> BranchResult:
        """Losses and information of one branch on fixed random draws, and for understanding the answers."""
        branch, others = BRANCHES[dataloader_idx], {}
        with isolated_rng(batch_idx, self.device):
            result = self.run_branch(branch, batch)
        if branch == "generation" and self.task_weights.reconstruction:
            with isolated_rng(batch_idx, self.device):
                others["reconstruction/loss"] = self.run_reconstruction(batch).task_loss
        self.validation.add(branch, result, others, images=len(batch.names))
        if branch == "understanding":
            answers = self.base.describe(batch.pixel_values, batch.questions, self.answer_tokens)
            self.validation.add_answers(answers, batch.answers, batch.questions)
            result = replace(result, answers=answers)
        return result

    def on_validation_epoch_end(self) -> None:
        """Log the means over all batches and ranks, and the exact match of the answers."""
        # Logged here, not in each step: Lightning drops what a step logs while it checks sanity, our "before".
        values, warnings = self.validation.finish()
        self.log_dict(values)
        for warning in warnings if self.global_step else ():  # untrained heads use nothing yet
            rank_zero_warn(f"step {self.global_step}: {warning}")

    def on_after_backward(self) -> None:
        """Keep no more of a sharded model than this process's share of it."""
        reshard(self.base, self.infotok)

    on_validation_end = on_after_backward

    # Optimiser and checkpoints

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the official groups; the schedule ends at `trainer.max_steps`."""
        optimiser = build_optimiser(self.optimiser_config, self.base, self.infotok, self.base.decays)
        schedule = warmup_cosine(optimiser, self.optimiser_config, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what rebuilds the model without this class, and leave out what can be read again; primitives only."""
        checkpoint[CHECKPOINT_KEY] = {
            **self.initial_model.rebuilding(self, self.lora),
            "frozen": self.frozen_weights.leave_out(checkpoint["state_dict"]),
            "step": self.global_step,
            "restored_settings": self.optimiser_config.restored(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what was left out; refuse other adapters than the run's, and warn of settings that are overridden."""
        refuse_lost_average(self, checkpoint)
        run = checkpoint.get(CHECKPOINT_KEY, {})
        check_resumed(run, self.lora, self.optimiser_config)
        self.frozen_weights.fill_in(checkpoint, run.get("frozen", {}))
