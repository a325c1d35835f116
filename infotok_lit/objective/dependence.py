"""The three terms measured by HSIC instead of variational bounds: the same objective, another estimator.

There are no heads, so the terms act on the shared tokens themselves. All are over the global batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.objective.config import ObjectiveConfig, Term
from infotok_lit.objective.distributed import gather_rows
from infotok_lit.objective.heads import BranchTerms
from infotok_lit.objective.hsic import FEWEST_SAMPLES, normalised_hsic
from infotok_lit.objective.inputs import BranchInputs


@dataclass(frozen=True)
class Partner:
    """What the tokens are compared with: one vector per image, and where there is one."""

    vectors: Tensor
    """(B, width) float32, without a graph."""
    present: Tensor
    """(B,) bool."""


class DependenceTerms(nn.Module):
    """C = nHSIC(Z, I), S = 1 - nHSIC(Z, Y), A = 1 - nHSIC(Z, T): dimensionless costs, 0 at best.

    Z is the mean token of an image. Not all tokens side by side: a branch may show the encoder other places of every
    image, so entries would not correspond, and distances in a hundred thousand dimensions are all alike.
    I is the image as pixels, downsampled; Y the mean embedding of the answer's words (understanding) or all clean
    latents (generation); T the mean embedding of the paired text. Where Y says nearly what I says, as in generation, C
    and S pull on nearly the same number, and beta > 1 decides for S.

    Args:
        branch: which of the two targets Y is.
        config: which terms act, and the form of HSIC.
    """

    def __init__(self, branch: Branch, config: ObjectiveConfig) -> None:
        super().__init__()
        self.branch = branch
        self.terms = config.active_terms(branch)
        self.unbiased = config.hsic.unbiased

    def forward(self, inputs: BranchInputs) -> BranchTerms:
        """The terms of one batch; a collective call. A term with fewer than four pairs is not reported.

        Raises:
            ValueError: a term needs the image or the latents, and the inputs hold none; a training batch of fewer
                than four images.
        """
        (tokens,) = gather_rows(inputs.tokens.float().mean(1))
        if self.training and len(tokens) < FEWEST_SAMPLES:
            raise ValueError(
                f"estimator hsic compares the images of a batch, over all ranks; it needs {FEWEST_SAMPLES} or more and "
                f"got {len(tokens)}. Raise the batch size; accumulating gradients does not help."
            )
        costs: dict[Term, Tensor] = {}
        report: dict[str, Tensor] = {}
        for term in self.terms:
            partner = self._partner(term, inputs)
            vectors, present = gather_rows(partner.vectors, partner.present)
            compared = tokens[present]
            dependence = normalised_hsic(compared, vectors[present], self.unbiased)
            costs[term] = dependence if term == "compactness" else 1 - dependence
            if len(compared) >= FEWEST_SAMPLES:
                report[f"hsic_{term}"] = dependence.detach()
        return BranchTerms(costs, report, None)

    def _partner(self, term: Term, inputs: BranchInputs) -> Partner:
        everywhere = torch.ones_like(inputs.text_key, dtype=torch.bool)
        if term == "compactness":
            return Partner(_flat(inputs.image, "image"), everywhere)
        if term == "alignment":
            return Partner(inputs.mean_text(inputs.text_mask), inputs.text_mask.any(1))
        if self.branch == "generation":
            return Partner(_flat(inputs.latents, "latents"), everywhere)
        answer = inputs.target_mask & inputs.text_mask
        return Partner(inputs.mean_text(answer), answer.any(1))


def _flat(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"estimator hsic compares the tokens with the {name}; give {name}, or switch the term off.")
    return values.detach().float().flatten(1)
