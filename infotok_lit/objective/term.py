"""What all terms share: their names, nats per image and how these are reduced, and texts as vectors.

Shapes: B images, S text length, M texts that are false of an image, H width of the LLM's input embeddings.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.distributed import global_mean

Term = Literal["compactness", "sufficiency", "alignment", "self_alignment", "captioning"]
PAPER_TERMS: tuple[Term, ...] = ("compactness", "sufficiency", "alignment")
"""The paper's whole objective, C&S&A."""
RIVALS: tuple[Term, ...] = ("self_alignment", "captioning")
"""Terms that are not of the paper, and act in generation only."""
Reduction = Literal["tokens", "mean"]
FACTORS: dict[Term, str] = {
    "alignment": "alpha",
    "sufficiency": "beta",
    "self_alignment": "gamma",
    "captioning": "delta",
}
"""What the factor of a term is called in Eq. 10 and in the settings; compactness has none."""


class Widths(NamedTuple):
    """What the heads must know of one branch of a model."""

    tokens: int
    """D: width of the shared tokens."""
    latents: int
    """C: channels of the image latents."""
    text: int
    """H: width of the LLM's input embeddings."""
    num_extra: int
    """Tokens without a place in the grid."""


@dataclass(frozen=True)
class TermNats:
    """One term on one local batch.

    Attributes:
        per_image: (B,) float32 nats per image, with its graph.
        elements: (B,) integers: how many elements of its own the term summed per image: tokens x dimensions for C,
            answer tokens or latent numbers for S, 1 (or 0 without a text) for A, caption tokens for captioning.
    """

    per_image: Tensor
    elements: Tensor

    def reduce(self, reduction: Reduction, num_tokens: int) -> Tensor:
        """Scalar, this rank's share of the global number.

        `tokens`: nats per image / N, the mean over the global batch, so that all terms share the unit nats/token.
        `mean`: nats per element of the term's own.
        """
        if reduction == "mean":
            return global_mean(self.per_image.sum(), self.elements.sum())
        return global_mean(self.per_image.sum() / num_tokens, len(self.per_image))


@dataclass(frozen=True)
class BranchObjective:
    """The terms of one branch on one batch, and what there is to know about them."""

    terms: dict[Term, Tensor] = field(default_factory=dict)
    """Each term, a scalar with its graph; this rank's share (its average over ranks is the global number). From the
    heads: not yet weighted. From `InfoTok`: what the term adds to the total loss."""
    report: dict[str, Tensor] = field(default_factory=dict)
    """Raw numbers, detached and global; docs/objective.md names their units."""
    tokens: Tensor | None = None
    """(B, N, D) float32: what the terms were computed from, for gradients: the shared tokens, or a placebo's copy."""
    token_rates: Tensor | None = None
    """(B, N) bits per token, detached; None without a posterior."""
    unit_rates: Tensor | None = None
    """(d,) bits per token that each dimension carries, the mean of this rank's tokens; None without a posterior."""
    sufficiency_gaps: Tensor | None = None
    """(B,) nats per target element that S loses with the tokens of another image, NaN where no other image differs;
    None in training, and without sufficiency."""

    @property
    def loss(self) -> Tensor:
        """Scalar: the sum of the terms, which there must be."""
        return torch.stack(list(self.terms.values())).sum()


def embedded_text(output: BranchOutput) -> Tensor:
    """(B, S, H) float32: the detached embeddings of the text; those of id 0 at padding."""
    return _embedded(output, output.text.ids, output.text.mask)


def mean_text(output: BranchOutput, words: Tensor) -> Tensor:
    """(B, H): the mean embedding of the chosen words (B, S) of each text, detached; 0 for a row without any."""
    return _mean(embedded_text(output), words)


def mean_negatives(output: BranchOutput, count: int) -> tuple[Tensor, Tensor]:
    """The first texts that are false of each image: their mean embeddings (B, m, H), and where there is one (B, m).

    m is at most `count`, and 0 where the batch has none.
    """
    if output.text.negatives is None:
        nothing = output.tokens.new_zeros(len(output.tokens), 0, dtype=torch.bool)
        return nothing.new_zeros(*nothing.shape, output.text_embedding.embedding_dim, dtype=torch.float32), nothing
    ids, mask = (part[:, :count] for part in output.text.negatives)
    return _mean(_embedded(output, ids, mask), mask), mask.any(-1)


def answer_words(output: BranchOutput) -> Tensor:
    """(B, S) bool: the answer's tokens, which sufficiency of understanding predicts."""
    return output.text.target_mask & output.text.mask


def _embedded(output: BranchOutput, ids: Tensor, mask: Tensor) -> Tensor:
    return F.embedding(ids.masked_fill(~mask, 0), output.text_embedding.weight.detach()).float()


def _mean(embedded: Tensor, words: Tensor) -> Tensor:
    mask = words[..., None].float()
    return (embedded * mask).sum(-2) / mask.sum(-2).clamp(min=1)
