"""The variational terms of one branch: its training-only heads, and what they measure in nats."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch, BranchOutput
from infotok_lit.objective.alignment import Alignment
from infotok_lit.objective.compactness import Posterior, Projection, compactness
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.report import (
    alignment_report,
    captioning_report,
    noise_band_report,
    rate_report,
    self_alignment_report,
    sufficiency_report,
)
from infotok_lit.objective.self_alignment import SelfAlignment
from infotok_lit.objective.sufficiency import LatentDecoder, TextDecoder, other_images
from infotok_lit.objective.term import BranchObjective, Term, TermNats, Widths


class BranchHeads(nn.Module):
    """Everything trainable for one branch. A head that its terms do not need is None."""

    def __init__(self, branch: Branch, config: ObjectiveConfig, widths: Widths, understood_width: int) -> None:
        super().__init__()
        terms = config.active_terms(branch)
        inline = config.bottleneck == "inline"
        projection = replace(config.projection, kind="identity") if inline else config.projection
        with_variance = "compactness" in terms or "sufficiency" in terms
        self.branch = branch
        self.reduction = config.reduction
        self.free_nats = config.free_bits * math.log(2)
        self.with_compactness = "compactness" in terms
        projected = with_variance or "alignment" in terms
        self.projection = Projection(projection, widths.tokens, with_variance) if projected else None
        width = self.projection.latent_width if projected else 0
        decoded = "sufficiency" in terms and not inline
        self.decoder = _decoder(branch, config, widths, width) if decoded else None
        aligned = "alignment" in terms
        settings = (config.temperature, config.negatives, config.learn_temperature, config.shuffled_texts)
        self.alignment = Alignment(widths.text, width, *settings) if aligned else None
        sizes = (widths.tokens, understood_width, config.projection.hidden_width)
        self.self_alignment = SelfAlignment(*sizes) if "self_alignment" in terms else None

    def forward(
        self,
        tokens: Tensor,
        posterior: Posterior | None,
        output: BranchOutput,
        noise: Tensor | None,
        understood: Tensor | None,
        caption: TermNats | None,
    ) -> BranchObjective:
        """The terms, not yet weighted, and what is measured on the way; a collective call.

        Args:
            tokens: (B, N, D), those of `output` or a detached copy.
            posterior: of these tokens; None without a projection.
            noise: for the posterior's sample; drawn if None.
            understood: (B, N', D'): the understanding tokens of the same images, for self-alignment.
            caption: captioning, which was measured by the model; None where it is off.
        """
        terms: dict[Term, TermNats] = {}
        report: dict[str, Tensor] = {}
        rates: dict[str, Tensor] = {}
        if posterior is not None and posterior.log_variance is not None:
            kl = posterior.kl()
            bits = kl.detach() / math.log(2)
            rates = {"token_rates": bits.sum(-1), "unit_rates": bits.mean((0, 1))}
            report |= rate_report(kl.detach())
            if self.with_compactness:
                terms["compactness"] = compactness(kl, self.free_nats)
        if self.decoder is not None:
            sample = posterior.rsample(noise)
            terms["sufficiency"] = self.decoder(sample, output)
            report |= sufficiency_report(terms["sufficiency"])
            if not self.training:
                rates["sufficiency_gaps"] = self._gaps(sample, output, terms["sufficiency"])
        if self.alignment is not None:
            contrast = self.alignment(posterior.mean, output)
            terms["alignment"] = contrast.term()
            report |= alignment_report(contrast)
        if self.self_alignment is not None:
            terms["self_alignment"] = self.self_alignment(tokens, output, understood)
            report |= self_alignment_report(terms["self_alignment"])
        if caption is not None:
            terms["captioning"] = caption
            report |= captioning_report(caption)
        if output.noise_level is not None:
            report |= noise_band_report(output.noise_level, rates.get("token_rates"), terms)
        reduced = {name: term.reduce(self.reduction, output.layout.num_tokens) for name, term in terms.items()}
        return BranchObjective(reduced, report, **rates)

    @torch.no_grad()
    def _gaps(self, sample: Tensor, output: BranchOutput, own: TermNats) -> Tensor:
        """(B,): S with the sample of another image, minus S, per target element; NaN where no image differs."""
        other, differs = other_images(self.branch, output)
        # The other image's places go with its sample; which latents count stays, or the two would not compare.
        nats = self.decoder(sample[other], output, output.token_index[other])
        gap = (nats.per_image - own.per_image) / own.elements.clamp(min=1)
        return gap.where(differs & (own.elements > 0), torch.nan)


def _decoder(branch: Branch, config: ObjectiveConfig, widths: Widths, latent_width: int) -> nn.Module:
    if branch == "understanding":
        return TextDecoder(config.decoder, latent_width, widths.text, widths.num_extra)
    return LatentDecoder(config.decoder, latent_width, widths.latents, widths.num_extra)
