"""A term of one's own, as docs/new_term.md explains: the shared tokens of an image are to differ in direction."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from infotok_lit.batch import Batch, Branch
from infotok_lit.errors import SettingsError
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.distributed import global_mean, global_sum, world_size


def likeness(tokens: Tensor) -> Tensor:
    """(B, N, D), N >= 2 -> (B,): the mean cosine of two different tokens of an image; 1 where all are alike."""
    number = tokens.shape[1]
    together = F.normalize(tokens.float(), dim=-1).sum(1).square().sum(-1)
    return (together - number) / (number * (number - 1))


class HarmonWithLikeness(HarmonModule):
    """Harmon with a further term: likeness.

    Args:
        likeness_weight: What the term weighs in the total loss, in nats per unit of cosine; 0 only measures it.
    """

    def __init__(self, likeness_weight: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        if likeness_weight < 0:
            raise SettingsError(f"likeness_weight is {likeness_weight}; set it to 0 (off) or more")
        self.likeness_weight = likeness_weight

    def run_branch(self, branch: Branch, batch: Batch) -> BranchResult:
        """The branch, in training and in validation, with the term beside those of the objective."""
        result = super().run_branch(branch, batch)
        objective = result.objective
        # A placebo hands its terms a copy, through which no gradient reaches the model.
        tokens = result.output.tokens if objective.tokens is None else objective.tokens
        cost = global_mean(likeness(tokens).sum(), len(tokens))
        terms = dict(objective.terms)
        if self.likeness_weight:
            terms["likeness"] = self.likeness_weight * cost
        report = {**objective.report, "likeness": global_sum(cost) / world_size()}
        return replace(result, objective=replace(objective, terms=terms, report=report, tokens=tokens))
