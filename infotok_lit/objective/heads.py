"""The variational terms of one branch: its heads, and what they measure in nats."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.objective.alignment import Alignment
from infotok_lit.objective.compactness import compactness
from infotok_lit.objective.config import ObjectiveConfig, Term
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.posterior import Posterior
from infotok_lit.objective.projection import Projection
from infotok_lit.objective.report import alignment_report, noise_band_report, rate_report, sufficiency_report
from infotok_lit.objective.sufficiency import LatentDecoder, TextDecoder
from infotok_lit.objective.term import TermNats


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
class BranchTerms:
    """What one branch's terms are on one batch."""

    reduced: dict[Term, Tensor]
    """The cost of each term, a scalar with its graph; this rank's share, not yet weighted."""
    report: dict[str, Tensor]
    """Raw numbers, detached and global."""
    token_rates: Tensor | None
    """(B, N) bits per token, detached; None without a posterior."""
    unit_rates: Tensor | None = None
    """(d,) bits per token that each dimension carries, the mean of this rank's tokens; None without a posterior."""


class BranchHeads(nn.Module):
    """Everything trainable for one branch. A head that its terms do not need is None."""

    def __init__(self, branch: Branch, config: ObjectiveConfig, widths: Widths) -> None:
        super().__init__()
        terms = config.active_terms(branch)
        inline = config.bottleneck == "inline"
        projection = replace(config.projection, kind="identity") if inline else config.projection
        with_variance = "compactness" in terms or "sufficiency" in terms
        self.reduction = config.reduction
        self.with_compactness = "compactness" in terms
        self.projection = Projection(projection, widths.tokens, with_variance)
        latent_width = self.projection.latent_width
        decoded = "sufficiency" in terms and not inline
        self.decoder = _decoder(branch, config, widths, latent_width) if decoded else None
        aligned = "alignment" in terms
        settings = (widths.text, latent_width, config.temperature, config.negatives)
        self.alignment = Alignment(*settings) if aligned else None

    def forward(self, posterior: Posterior, inputs: BranchInputs, noise: Tensor | None) -> BranchTerms:
        """The terms, what is measured on the way, and the rate of every token."""
        terms: dict[Term, TermNats] = {}
        report: dict[str, Tensor] = {}
        token_rates = unit_rates = None
        if posterior.log_variance is not None:
            kl = posterior.kl()
            token_rates = kl.detach().sum(-1) / math.log(2)
            unit_rates = kl.detach().mean((0, 1)) / math.log(2)
            report |= rate_report(kl.detach())
            if self.with_compactness:
                terms["compactness"] = compactness(kl)
        if self.decoder is not None:
            terms["sufficiency"] = self.decoder(posterior.rsample(noise), inputs)
            report |= sufficiency_report(terms["sufficiency"])
        if self.alignment is not None:
            contrast = self.alignment(posterior.mean, inputs)
            terms["alignment"] = contrast.term()
            report |= alignment_report(contrast)
        if inputs.noise_level is not None:
            report |= noise_band_report(inputs.noise_level, token_rates, terms)
        reduced = {name: term.reduce(self.reduction, inputs.num_places) for name, term in terms.items()}
        return BranchTerms(reduced, report, token_rates, unit_rates)


def _decoder(branch: Branch, config: ObjectiveConfig, widths: Widths, latent_width: int) -> nn.Module:
    if branch == "understanding":
        return TextDecoder(config.decoder, latent_width, widths.text, widths.num_extra)
    return LatentDecoder(config.decoder, latent_width, widths.latents, widths.num_extra)
