"""InfoTok: the information bottleneck on the shared tokens of one unified model (Eq. 10 and its share of Eq. 11).

The heads live here and nowhere else, and they exist exactly for the terms that are on: delete this module and what is
left is the model as it was.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infotok_lit.objective.alignment import Alignment
from infotok_lit.objective.compactness import compactness
from infotok_lit.objective.config import Branch, ObjectiveConfig
from infotok_lit.objective.inline import InlineBottleneck
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.multipliers import build_multiplier
from infotok_lit.objective.posterior import Posterior
from infotok_lit.objective.projection import Projection
from infotok_lit.objective.report import alignment_report, rate_report, sufficiency_report, weight_report
from infotok_lit.objective.sufficiency import LatentDecoder, TextDecoder
from infotok_lit.objective.term import TermNats


class Widths(NamedTuple):
    """What the heads must know of a model."""

    tokens: int
    """D: width of the shared tokens."""
    latents: int
    """C: channels of the image latents."""
    text: int
    """H: width of the LLM's input embeddings."""
    num_extra: int
    """Tokens without a place in the grid."""


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


class BranchHeads(nn.Module):
    """Everything trainable for one branch. A head that its terms do not need is None."""

    def __init__(self, branch: Branch, config: ObjectiveConfig, widths: Widths) -> None:
        super().__init__()
        terms = config.active_terms(branch)
        inline = config.bottleneck == "inline"
        projection = replace(config.projection, kind="identity") if inline else config.projection
        with_variance = "compactness" in terms or "sufficiency" in terms
        self.with_compactness = "compactness" in terms
        self.projection = Projection(projection, widths.tokens, with_variance)
        latent_width = self.projection.latent_width
        decoded = "sufficiency" in terms and not inline
        self.decoder = _decoder(branch, config, widths, latent_width) if decoded else None
        aligned = "alignment" in terms
        self.alignment = Alignment(widths.text, latent_width, config.temperature) if aligned else None

    def forward(
        self, posterior: Posterior, inputs: BranchInputs, noise: Tensor | None
    ) -> tuple[dict[str, TermNats], dict[str, Tensor], Tensor | None]:
        """The terms in nats, their report, and the token rates in bits (B, N)."""
        terms: dict[str, TermNats] = {}
        report: dict[str, Tensor] = {}
        token_rates = None
        if posterior.log_variance is not None:
            kl = posterior.kl()
            token_rates = kl.detach().sum(-1) / math.log(2)
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
        return terms, report, token_rates


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
        token_width: D of the shared tokens.
        latent_channels: C of the image latents.
        text_width: H of the LLM's input embeddings.
        num_extra: shared tokens without a place in the grid.
    """

    def __init__(
        self, config: ObjectiveConfig, token_width: int, latent_channels: int, text_width: int, num_extra: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_extra = num_extra
        self.multiplier = build_multiplier(config)
        widths = Widths(token_width, latent_channels, text_width, num_extra)
        self.heads = nn.ModuleDict(
            {branch: BranchHeads(branch, config, widths) for branch in config.branches if config.active_terms(branch)}
        )
        self._inline: dict[Branch, InlineBottleneck] = {}

    def transform(self, branch: Branch, noise: Tensor | None = None) -> InlineBottleneck | None:
        """What the model must apply to the branch's shared tokens: None, or this step's inline bottleneck.

        The next `forward` of the branch takes its posterior; call this anew for every pass of the model, in validation
        too, where the bounds hold for noisy tokens. `noise` (B, N, D) is standard normal, drawn if not given.
        """
        if self.config.bottleneck != "inline" or branch not in self.heads:
            return None
        self._inline[branch] = InlineBottleneck(self.heads[branch].projection, noise)
        return self._inline[branch]

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
        if inputs.num_extra != self.num_extra:
            raise ValueError(f"inputs have {inputs.num_extra} extra tokens; the heads were built for {self.num_extra}.")
        with torch.autocast(inputs.tokens.device.type, enabled=False):
            posterior = self._posterior(branch, inputs, noise)
            nats, report, token_rates = self.heads[branch](posterior, inputs, noise)
            multiplier = self.config.weight * self.multiplier(step)
            terms = {name: self._weighted(branch, name, term, inputs) * multiplier for name, term in nats.items()}
            loss = torch.stack(list(terms.values())).sum()
        return BranchObjective(loss, terms, report | weight_report(terms, multiplier), token_rates)

    def _weighted(self, branch: Branch, name: str, term: TermNats, inputs: BranchInputs) -> Tensor:
        reduced = term.reduce(self.config.reduction, inputs.num_places)
        return self.config.coefficient(branch, name) * reduced

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


def _decoder(branch: Branch, config: ObjectiveConfig, widths: Widths, latent_width: int) -> nn.Module:
    if branch == "understanding":
        return TextDecoder(config.decoder, latent_width, widths.text, widths.num_extra)
    return LatentDecoder(config.decoder, latent_width, widths.latents, widths.num_extra)
