"""What a step and a validation batch hand back, and what the objective reads of it."""

from dataclasses import dataclass

from torch import Tensor

from infotok_lit.batch import BranchOutput, TokenCodes, TokenLayout
from infotok_lit.metrics.code_usage import code_entropy_bits, code_usage_fraction
from infotok_lit.objective.infotok import BranchObjective
from infotok_lit.objective.inputs import BranchInputs


@dataclass(frozen=True)
class BranchResult:
    """One branch of one step."""

    output: BranchOutput
    task_loss: Tensor
    """The model's own loss, a mean over the global batch: this rank's share."""
    objective: BranchObjective

    def report(self) -> dict[str, Tensor]:
        """What there is to know about the tokens: the objective's report, and for codes how they are used."""
        found = self.output.codes
        if found is None:
            return self.objective.report
        usage = {
            "code_entropy_bits": code_entropy_bits(found.codes, found.num_codes),
            "code_usage_fraction": code_usage_fraction(found.codes, found.num_codes),
        }
        return self.objective.report | usage


@dataclass(frozen=True)
class ReconstructionResult:
    """The reconstruction loss of one step."""

    task_loss: Tensor
    """A mean over the global batch: this rank's share."""
    quantiser_loss: Tensor | None
    """None for continuous tokens."""


@dataclass(frozen=True)
class Reading:
    """What validation learns from one batch of one branch."""

    answers: list[str] | None
    """The model's answers; None for generation."""
    tokens: Tensor
    """(B, N, D): the shared tokens."""
    layout: TokenLayout
    token_rates: Tensor | None
    """(B, N) bits per token, None without a posterior."""
    unit_rates: Tensor | None
    """(d,) bits per token that each dimension carries, the mean of this rank's tokens; None without a posterior."""
    codes: TokenCodes | None
    """None for continuous tokens."""


def objective_inputs(output: BranchOutput, image: Tensor | None = None) -> BranchInputs:
    """What the objective reads, from what a model gives; `image` (B, F) where its estimator asks for it."""
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
        negative_ids=None if output.text.negatives is None else output.text.negatives.ids,
        negative_mask=None if output.text.negatives is None else output.text.negatives.mask,
        latents=output.latents,
        latent_grid=output.latent_grid,
        noise_level=output.noise_level,
        image=image,
    )
