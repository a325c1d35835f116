"""The variational terms of one branch: its training-only heads, and what they measure in nats."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch, BranchOutput
from infotok_lit.objective.alignment import Alignment
from infotok_lit.objective.compactness import Posterior, Projection, compactness
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.report import alignment_report, noise_band_report, rate_report, sufficiency_report
from infotok_lit.objective.sufficiency import LatentDecoder, TextDecoder, other_images
from infotok_lit.objective.term import BranchObjective, Term, TermNats, Widths


class BranchHeads(nn.Module):
    """Everything trainable for one branch. A head that its terms do not need is None."""

    def __init__(self, branch: Branch, config: ObjectiveConfig, widths: Widths) -> None:
        super().__init__()
        terms = config.active_terms(branch)
        inline = config.bottleneck == "inline"
        projection = replace(config.projection, kind="identity") if inline else config.projection
        with_variance = "compactness" in terms or "sufficiency" in terms
        self.branch = branch
        self.reduction = config.reduction
        self.free_nats = config.free_bits * math.log(2)
        self.with_compactness = "compactness" in terms
        self.projection = Projection(projection, widths.tokens, with_variance)
        width = self.projection.latent_width
        decoded = "sufficiency" in terms and not inline
        self.decoder = _decoder(branch, config, widths, width) if decoded else None
        aligned = "alignment" in terms
        settings = (config.temperature, config.negatives, config.learn_temperature)
        self.alignment = Alignment(widths.text, width, *settings) if aligned else None

    def forward(self, posterior: Posterior, output: BranchOutput, noise: Tensor | None) -> BranchObjective:
        """The terms, not yet weighted, and what is measured on the way; a collective call."""
        terms: dict[Term, TermNats] = {}
        report: dict[str, Tensor] = {}
        token_rates = unit_rates = gaps = None
        if posterior.log_variance is not None:
            kl = posterior.kl()
            token_rates = kl.detach().sum(-1) / math.log(2)
            unit_rates = kl.detach().mean((0, 1)) / math.log(2)
            report |= rate_report(kl.detach())
            if self.with_compactness:
                terms["compactness"] = compactness(kl, self.free_nats)
        if self.decoder is not None:
            sample = posterior.rsample(noise)
            terms["sufficiency"] = self.decoder(sample, output)
            report |= sufficiency_report(terms["sufficiency"])
            if not self.training:
                gaps = self._gaps(sample, output, terms["sufficiency"])
        if self.alignment is not None:
            contrast = self.alignment(posterior.mean, output)
            terms["alignment"] = contrast.term()
            report |= alignment_report(contrast)
        if output.noise_level is not None:
            report |= noise_band_report(output.noise_level, token_rates, terms)
        reduced = {name: term.reduce(self.reduction, output.layout.num_tokens) for name, term in terms.items()}
        return BranchObjective(reduced, report, token_rates=token_rates, unit_rates=unit_rates, sufficiency_gaps=gaps)

    @torch.no_grad()
    def _gaps(self, sample: Tensor, output: BranchOutput, own: TermNats) -> Tensor:
        """(B,): S with the sample of another image, minus S, per target element; NaN where no image differs."""
        other, differs = other_images(self.branch, output)
        # The other image's places go with its sample; which latents count stays, or the two would not compare.
        nats = self.decoder(sample[other], replace(output, token_index=output.token_index[other]))
        gap = (nats.per_image - own.per_image) / own.elements.clamp(min=1)
        return gap.where(differs & (own.elements > 0), torch.nan)


def _decoder(branch: Branch, config: ObjectiveConfig, widths: Widths, latent_width: int) -> nn.Module:
    if branch == "understanding":
        return TextDecoder(config.decoder, latent_width, widths.text, widths.num_extra)
    return LatentDecoder(config.decoder, latent_width, widths.latents, widths.num_extra)
