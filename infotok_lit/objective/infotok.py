"""InfoTok: the information bottleneck on the shared tokens of one unified model (Eq. 10 and its share of Eq. 11).

The heads live here and nowhere else, and they exist exactly for the terms that are on: delete this module and what is
left is the model as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.objective.config import ObjectiveConfig, Term
from infotok_lit.objective.constraint import build_constraint
from infotok_lit.objective.dependence import DependenceTerms
from infotok_lit.objective.heads import BranchHeads, BranchTerms, Widths
from infotok_lit.objective.inline import InlineBottleneck
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.multipliers import build_multiplier
from infotok_lit.objective.posterior import Posterior
from infotok_lit.objective.report import weight_report


@dataclass(frozen=True)
class BranchObjective:
    """One branch's share of the total loss, and what there is to know about it."""

    loss: Tensor
    """Scalar: multiplier * L_b; this rank's share (its average over ranks is the global number)."""
    terms: dict[str, Tensor]
    """The parts of `loss`, weighted, with their graph: for gradient norms."""
    report: dict[str, Tensor]
    """Raw numbers, detached, global; names and units in `report.REPORT_UNITS`."""
    token_rates: Tensor | None
    """(B, N): bits per token of the local batch, detached; None where no term draws a sample."""
    unit_rates: Tensor | None = None
    """(d,): bits per token that each dimension carries, over the local batch; None where `token_rates` is."""


class InfoTok(nn.Module):
    """The objective of both branches.

    Why there are two bottlenecks. `projected`, the paper's: noise and rate live on f_b(Z), which only the heads see.
    f_b is free, and I(f_b(Z); I) <= I(Z; I): pressing on the smaller does not press on the larger, and with compactness
    alone f_b just forgets. What moves Z then is sufficiency and alignment; the rate sets the scale of the noise that
    they must survive. `inline`: noise and rate are on Z as the model consumes it, a true variational bottleneck. The
    model's own losses are its sufficiency term, so there is no decoder, `sufficiency` in `terms` changes nothing, and
    beta is 1 / lambda. Its only head is the variance; at inference the tokens go without noise.

    All terms are computed in float32, also under autocast; keep these heads in float32.

    Args:
        config: what is on, and how strongly.
        widths: what the heads must know of each branch of the model.
    """

    def __init__(self, config: ObjectiveConfig, widths: Mapping[Branch, Widths]) -> None:
        super().__init__()
        self.config = config
        self.widths = dict(widths)
        self.multiplier = build_multiplier(config)
        active = [branch for branch in config.branches if config.active_terms(branch)]
        self.heads = nn.ModuleDict({branch: _heads(branch, config, widths[branch]) for branch in active})
        self.constraints = nn.ModuleDict()
        for branch in active:
            constraint = build_constraint(config.weights(branch), config.active_terms(branch), config.dual)
            if constraint is not None:
                self.constraints[branch] = constraint
        self._inline: dict[Branch, InlineBottleneck] = {}

    def transform(self, branch: Branch, noise: Tensor | None = None, priced: bool = True) -> InlineBottleneck | None:
        """What the model must apply to the branch's shared tokens: None, or this step's inline bottleneck.

        The next `forward` of the branch takes its posterior; call this anew for every pass of the model, in validation
        too, where the bounds hold for noisy tokens.

        Args:
            branch: whose tokens.
            noise: (B, N, D) standard normal, drawn if not given.
            priced: False for a further pass over a branch's tokens, which meets the same noise and no `forward`.
        """
        if self.config.bottleneck != "inline" or branch not in self.heads:
            return None
        inline = InlineBottleneck(self.heads[branch].projection, noise)
        if priced:
            self._inline[branch] = inline
        return inline

    def forward(self, branch: Branch, inputs: BranchInputs, step: int, noise: Tensor | None = None) -> BranchObjective:
        """Loss and report of one branch; collective where several ranks train together.

        Args:
            branch: which heads to use; one without active terms costs nothing and returns a loss of 0.
            inputs: tokens and targets of the branch's one forward pass.
            step: global step, for the multiplier.
            noise: (B, N, d) standard normal for the posterior sample; drawn if not given. Projected bottleneck only.

        Raises:
            ValueError: inputs of another layout; an inline bottleneck that the model was not given.
        """
        if branch not in self.heads:
            return BranchObjective(inputs.tokens.new_zeros((), dtype=torch.float32), {}, {}, None)
        self._refuse_other_layout(branch, inputs)
        with torch.autocast(inputs.tokens.device.type, enabled=False):
            measured = self._measure(branch, inputs, noise)
            multiplier = self.config.weight * self.multiplier(step)
            factors = self._factors(branch, step)
            terms = {name: factors[name] * cost * multiplier for name, cost in measured.reduced.items()}
            loss = torch.stack(list(terms.values())).sum()
        report = measured.report | weight_report(terms, multiplier)
        if branch in self.constraints:
            report |= self.constraints[branch].observe(report)
        return BranchObjective(loss, terms, report, measured.token_rates, measured.unit_rates)

    def posterior(self, branch: Branch, tokens: Tensor) -> Posterior | None:
        """What the branch's heads make of shared tokens (B, N, D); None where it has no posterior with a variance."""
        if branch not in self.heads:
            return None
        head = self.heads[branch]
        if not isinstance(head, BranchHeads) or head.projection.log_variance is None:
            return None
        with torch.autocast(tokens.device.type, enabled=False):
            return head.projection(tokens)

    def _measure(self, branch: Branch, inputs: BranchInputs, noise: Tensor | None) -> BranchTerms:
        if self.config.estimator == "hsic":
            return self.heads[branch](inputs)
        return self.heads[branch](self._posterior(branch, inputs, noise), inputs, noise)

    def _factors(self, branch: Branch, step: int) -> dict[Term, Tensor | float]:
        """Eq. 10's 1, beta and alpha; where the branch has a constraint, its multiplier in place of one of them."""
        factors: dict[Term, Tensor | float] = {
            term: self.config.coefficient(branch, term) for term in self.config.active_terms(branch)
        }
        if branch in self.constraints:
            constraint = self.constraints[branch]
            factors[constraint.term] = constraint.multiplier(step)
        return factors

    def _refuse_other_layout(self, branch: Branch, inputs: BranchInputs) -> None:
        expected = self.widths[branch].num_extra
        if inputs.num_extra != expected:
            raise ValueError(f"inputs have {inputs.num_extra} extra tokens; the heads were built for {expected}.")

    def _posterior(self, branch: Branch, inputs: BranchInputs, noise: Tensor | None) -> Posterior:
        if self.config.bottleneck == "projected":
            return self.heads[branch].projection(inputs.tokens)
        if noise is not None:
            raise ValueError("The inline bottleneck draws its noise in the model; give noise to transform() instead.")
        inline = self._inline.pop(branch, None)
        if inline is None or inline.posterior is None:
            raise ValueError(f"bottleneck inline: pass transform({branch!r}) to the model in every forward pass.")
        if inline.posterior.mean.shape != inputs.tokens.shape:
            raise ValueError(
                f"bottleneck inline: the model's transform saw tokens {tuple(inline.posterior.mean.shape)}, "
                f"the objective got {tuple(inputs.tokens.shape)}; both must be of one forward pass."
            )
        return inline.posterior


def _heads(branch: Branch, config: ObjectiveConfig, widths: Widths) -> nn.Module:
    return DependenceTerms(branch, config) if config.estimator == "hsic" else BranchHeads(branch, config, widths)
