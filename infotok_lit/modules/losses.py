"""What one branch of a step gives, and the summands of the total loss."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infotok_lit.batch import BRANCHES, Batch, Branch, BranchOutput, ReconstructionOutput, UnderstandingBatch
from infotok_lit.errors import SettingsError
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.distributed import global_mean, global_sum, world_size
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import BranchObjective
from infotok_lit.objective.token_budget import distillation


@dataclass(frozen=True)
class TaskWeights:
    """Weights of the base model's own losses in the total. What has weight 0 and serves no term is not computed.

    Args:
        understanding: Weight of the image-to-text loss.
        generation: Weight of the text-to-image loss.
        reconstruction: Weight of drawing the generation batch's images from what the model understands of them.
    """

    understanding: float = 1.0
    generation: float = 1.0
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if weight < 0:
                raise SettingsError(f"task_weights.{name} is {weight}; set it to 0 (off) or above")


def check_trainable(weights: TaskWeights, objective: ObjectiveConfig) -> None:
    """Raise SettingsError where nothing would be trained, a placebo would, or balance has no task to measure by."""
    if not any((*asdict(weights).values(), *map(objective.active_terms, objective.branches))):
        raise SettingsError("nothing to train: all task_weights are 0, and objective.terms is empty")
    if objective.placebo and objective.token_budget is not None and objective.token_budget.weight:
        raise SettingsError(
            "objective.placebo leaves the model as plain fine-tuning does, and objective.token_budget trains it to "
            "read fewer tokens: set token_budget.weight to 0, which measures only, or placebo to false"
        )
    for branch in objective.branches:
        if objective.balanced_terms(branch) and not getattr(weights, branch):
            raise SettingsError(
                f"task_weights.{branch} is 0, so its task pulls on no token, and objective.balance has nothing to "
                f"measure the terms of {branch} by: give the task a weight, set the shares of "
                f"objective.balance.{branch} to null, or leave {branch} out of objective.branches"
            )


class ReadWithFewer(NamedTuple):
    """What answers from fewer tokens miss."""

    loss: Tensor
    """KL to the answers from all tokens in nats per answer token, weighted: this rank's share of the global mean."""
    report: dict[str, Tensor]
    """Raw numbers, detached and global."""


def idle_branches(base: UnifiedModel) -> tuple[Branch, ...]:
    """The branches whose own loss reaches no parameter that is trained."""
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    return () if any(name.startswith(base.understanding_prefixes) for name in trained) else ("understanding",)


def trained_branches(base: UnifiedModel, regularised: Collection[Branch], weights: TaskWeights) -> tuple[Branch, ...]:
    """The branches that a training step computes: a term regularises them, or their own loss trains something."""
    idle = idle_branches(base)
    return tuple(
        branch for branch in BRANCHES if branch in regularised or (getattr(weights, branch) > 0 and branch not in idle)
    )


def idle_message(base: UnifiedModel, weights: TaskWeights, computed: Sequence[Branch]) -> str | None:
    """Says that training skips understanding; None where it does not, or was asked to.

    Raises:
        SettingsError: if nothing else is trained.
    """
    if not weights.understanding or "understanding" in computed:
        return None
    if not computed and not weights.reconstruction:
        raise SettingsError(
            "nothing to train: all that understanding computes with is frozen, and nothing else has a weight. Take a "
            "part out of model.freeze, or give generation a weight in task_weights"
        )
    return (
        "Training skips the understanding branch: all that it computes with is frozen and no term regularises it, so "
        "its loss would train nothing. Validation measures it all the same"
    )


@dataclass(frozen=True)
class BranchResult:
    """One branch of one step, in training and in validation."""

    output: BranchOutput
    task_loss: Tensor
    """The model's own loss, a mean over the global batch: this rank's share."""
    objective: BranchObjective
    answers: list[str] | None = None
    """What the model answers; None in training, and for generation."""
    fewer: ReadWithFewer | None = None
    """None without a token budget, and for generation."""

    def report(self) -> dict[str, Tensor]:
        """What there is to know about the tokens: the objective's report, use of codes, and fewer tokens."""
        report, found = dict(self.objective.report), self.output.codes
        if found is not None:
            report |= {"code_entropy_bits": found.entropy_bits(), "code_usage_fraction": found.usage_fraction()}
        if self.fewer is not None:
            report |= self.fewer.report
        return report


@dataclass(frozen=True)
class ReconstructionResult:
    """The reconstruction loss of one step."""

    task_loss: Tensor
    """A mean over the global batch: this rank's share."""
    quantiser_loss: Tensor | None
    """None for continuous tokens."""


def task_loss(output: BranchOutput | ReconstructionOutput, elements: float | None = None) -> Tensor:
    """The model's own loss, a mean over the global batch: this rank's share; a collective call.

    Args:
        elements: what to divide by instead of the number of elements: that of a batch of the step in the mean.
    """
    return global_mean(output.loss_sum.float(), output.loss_count if elements is None else elements)


def draw_seeds(generator: torch.Generator | None = None) -> dict[str, int]:
    """A seed for each part of a training step: what one draws must not shift another's.

    So runs that differ in their terms alone share their noise.
    """
    seeds = torch.randint(2**31, (3,), generator=generator).tolist()
    return dict(zip((*BRANCHES, "reconstruction"), seeds, strict=True))


def elements_of_step(base: UnifiedModel, batch: Mapping[Branch, Batch], seeds: Sequence[int]) -> dict[Branch, float]:
    """How many elements a branch's own loss has, in the mean over the batches of one optimiser step of this process.

    Divided by these, gradients that are accumulated are those of one large batch. What is left out has as many in each.

    Args:
        batch: one of them.
        seeds: what all of them are seeded with, before `draw_seeds`.
    """
    found = {}
    if len(seeds) == 1:
        return found
    if (labels := batch["understanding"].step_labels) is not None:
        found["understanding"] = labels
    images = batch["generation"].pixel_values
    draws = [torch.Generator().manual_seed(draw_seeds(torch.Generator().manual_seed(s))["generation"]) for s in seeds]
    drawn = [base.drawn_elements(len(images), base.grid_of(*images.shape[2:]), draw) for draw in draws]
    if None not in drawn:
        found["generation"] = sum(drawn) / len(drawn)
    return found


def read_with_fewer(
    base: UnifiedModel, infotok: InfoTok, batch: UnderstandingBatch, tokens: Tensor
) -> ReadWithFewer | None:
    """A further pass of the language model over shared tokens (B, N, D), some of which it must do without.

    Its answers are to be those of a pass over all tokens, which it does not change; None without a token budget. A
    collective call.
    """
    budget = infotok.budget
    if budget is None:
        return None
    kept = budget.draw(infotok.rates("understanding", tokens))
    nats = torch.zeros((), device=kept.device)
    if budget.config.weight:
        with torch.no_grad():
            teacher, _ = base.answer_logits(batch, tokens)
        nats = distillation(base.answer_logits(batch, tokens, kept=kept)[0], teacher)
    both = global_sum(torch.stack([nats.detach(), kept.float().mean()])) / world_size()
    report = dict(zip(("fewer_tokens_nats", "fewer_tokens_share"), both, strict=True))
    return ReadWithFewer(budget.config.weight * nats, report)


def loss_parts(
    weights: TaskWeights,
    results: Mapping[Branch, BranchResult],
    reconstruction: ReconstructionResult | None = None,
    elements: Mapping[Branch, float] | None = None,
) -> dict[str, Tensor]:
    """Every summand of the total loss under a name; a collective call.

    Args:
        elements: what `elements_of_step` gives, in training.
    """
    parts = {}
    for branch, result in results.items():
        of_step = (elements or {}).get(branch)
        task = result.task_loss if of_step is None else task_loss(result.output, of_step)
        parts[f"{branch}/task"] = getattr(weights, branch) * task
        parts |= {f"{branch}/{term}": value for term, value in result.objective.terms.items()}
        if result.output.codes is not None and result.output.codes.loss is not None:
            parts[f"{branch}/quantiser"] = result.output.codes.loss
        if result.fewer is not None:
            parts[f"{branch}/fewer_tokens"] = result.fewer.loss
    if reconstruction is not None:
        parts["reconstruction/task"] = weights.reconstruction * reconstruction.task_loss
        if reconstruction.quantiser_loss is not None:
            parts["reconstruction/quantiser"] = reconstruction.quantiser_loss
    return parts
