"""What is watched: every number of a branch, its name and its unit. Nothing here is optimised.

All numbers are over the global batch and equal on every rank; log them without a second reduction.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from infotok_lit.batch import Branch
from infotok_lit.objective.alignment import Contrast
from infotok_lit.objective.config import Term
from infotok_lit.objective.distributed import global_sum, world_size
from infotok_lit.objective.term import TermNats

NUM_NOISE_BANDS = 4
NOISE_BANDS = tuple(
    f"t_{band / NUM_NOISE_BANDS:.2f}_{(band + 1) / NUM_NOISE_BANDS:.2f}" for band in range(NUM_NOISE_BANDS)
)
"""Names of the bands of the time t in [0, 1] of a flow model, from noise to clean; the last one includes 1."""
BANDED = {
    "rate_bits_per_token": "C: bits per token that is present, mean",
    "sufficiency_nats_per_element": "S: nats per target element, mean",
    "alignment_nats": "A: nats per pair, mean",
}
"""What is also reported per band, where images carry a time; a band that no image of the global batch is in is not."""

REPORT_UNITS = {
    "rate_bits_per_token": "C, upper bound on I(Z~; I): bits per token that is present, mean",
    "rate_bits_per_image": "C: bits per image, summed over its present tokens, mean over images",
    "rate_bits_per_dim": "C: bits per present token and dimension, mean",
    "active_units": "dimensions of Z~ whose mean KL exceeds 0.01 nats: a count",
    "active_units_fraction": "active units over d",
    "sufficiency_nats_per_image": "S: nats per image, summed over target elements, mean over images",
    "sufficiency_nats_per_element": "S: nats per answer token, or per latent number (a density: may be negative), mean",
    "alignment_nats": "A: nats per pair, mean over images that have a text",
    "alignment_log_k": "log of the candidates per pair that the loss took, the true text included: nats, mean",
    "alignment_bound_nats": "InfoNCE lower bound on I(Z~; T) from all texts, repeated ones too: nats, mean",
    "hsic_compactness": "normalised HSIC of the mean token and the image: dimensionless, 0 independent, 1 determined",
    "hsic_sufficiency": "normalised HSIC of the mean token and the target: dimensionless, 0 independent, 1 determined",
    "hsic_alignment": "normalised HSIC of the mean token and the text: dimensionless, 0 independent, 1 determined",
    "constraint_gap": "rate - budget in bits per token, or sufficiency - target in nats per element; 0 on the limit",
    "constraint_multiplier": "the factor that dual ascent found: of C (budget), or beta (target)",
    "multiplier": "lambda times its schedule: task loss per unit of a reduced term",
    "weighted_compactness": "what C adds to the total loss: multiplier * C, reduced",
    "weighted_sufficiency": "what S adds to the total loss: multiplier * beta * S, reduced",
    "weighted_alignment": "what A adds to the total loss: multiplier * alpha * A, reduced",
} | {
    f"{name}/{band}": f"{meaning}, over images at times {band}"
    for name, meaning in BANDED.items()
    for band in NOISE_BANDS
}
"""Report name -> unit and meaning."""

ACTIVE_NATS = 0.01
"""Mean KL above which a dimension carries something."""
COLLAPSED_BITS_PER_TOKEN = 0.05


def rate_report(kl: Tensor) -> dict[str, Tensor]:
    """(B, N, d) nats -> rate and active units."""
    images, tokens, width = kl.shape
    counts = kl.new_tensor([images, images * tokens])
    sums = global_sum(torch.cat([kl.sum((0, 1)), counts]))
    per_dim, images, tokens = sums[:-2], sums[-2], sums[-1]
    bits = per_dim.sum() / math.log(2)
    active = (per_dim / tokens > ACTIVE_NATS).sum().float()
    return {
        "rate_bits_per_token": bits / tokens,
        "rate_bits_per_image": bits / images,
        "rate_bits_per_dim": bits / (tokens * width),
        "active_units": active,
        "active_units_fraction": active / width,
    }


def sufficiency_report(term: TermNats) -> dict[str, Tensor]:
    """Nats per image and per target element."""
    nats, images, elements = _totals(term.per_image.sum(), len(term.per_image), term.elements.sum())
    return {
        "sufficiency_nats_per_image": nats / images,
        "sufficiency_nats_per_element": nats / elements.clamp(min=1),
    }


def alignment_report(contrast: Contrast) -> dict[str, Tensor]:
    """Means over the images that have a text; 0 where none has."""
    nats, log_k, bound, pairs = _totals(
        contrast.nats.sum(), contrast.log_k.sum(), contrast.bound.sum(), contrast.paired.sum()
    )
    pairs = pairs.clamp(min=1)
    return {
        "alignment_nats": nats / pairs,
        "alignment_log_k": log_k / pairs,
        "alignment_bound_nats": bound / pairs,
    }


def noise_band_report(
    noise_level: Tensor, token_rates: Tensor | None, terms: Mapping[Term, TermNats]
) -> dict[str, Tensor]:
    """The numbers of `BANDED` per band of the time t.

    Args:
        noise_level: (B,) t in [0, 1].
        token_rates: (B, N) bits per token, None where there is no posterior.
        terms: the terms of these images.
    """
    ratios = {}
    if token_rates is not None:
        ratios["rate_bits_per_token"] = (
            token_rates.sum(1),
            token_rates.new_full(noise_level.shape, token_rates.shape[1]),
        )
    for term, name in (("sufficiency", "sufficiency_nats_per_element"), ("alignment", "alignment_nats")):
        if term in terms:
            ratios[name] = (terms[term].per_image.detach(), terms[term].elements)
    if not ratios:
        return {}
    band = (noise_level * NUM_NOISE_BANDS).long().clamp(0, NUM_NOISE_BANDS - 1)
    values = torch.stack([value.float() for ratio in ratios.values() for value in ratio])
    sums = global_sum((values[..., None] * F.one_hot(band, NUM_NOISE_BANDS)).sum(1))
    names = [f"{name}/{band}" for name in ratios for band in NOISE_BANDS]
    totals, counts = sums[0::2].flatten(), sums[1::2].flatten()
    # Counts are global, so all ranks leave out the same bands.
    filled = (counts > 0).tolist()
    return {name: total / count for name, total, count, kept in zip(names, totals, counts, filled, strict=True) if kept}


def weight_report(terms: dict[str, Tensor], multiplier: float) -> dict[str, Tensor]:
    """Weighted terms (this rank's shares) -> their global values, and the multiplier that they contain."""
    values = _totals(*terms.values()) / world_size()
    weighted = {f"weighted_{name}": value for name, value in zip(terms, values, strict=True)}
    return weighted | {"multiplier": torch.full_like(values[0], multiplier)}


def collapse_message(branch: Branch, report: dict[str, Tensor]) -> str | None:
    """Says in words that the posterior has collapsed, and what to change; None while it has not. Reads from device."""
    if "rate_bits_per_token" not in report:
        return None
    rate, active = float(report["rate_bits_per_token"]), int(report["active_units"])
    if rate >= COLLAPSED_BITS_PER_TOKEN and active > 0:
        return None
    return (
        f"{branch}: the posterior has collapsed to the prior ({rate:.3f} bits/token, {active} active units). The noise "
        "drowns what the tokens say, so no decoder can use them and the objective no longer presses on the encoder. "
        f"Raise {branch}.beta (or alpha), lower weight or warm it up, add sufficiency to terms, or bind the rate to "
        "the tokens themselves with projection.kind identity or bottleneck inline."
    )


def gradient_norms(terms: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """|| d term / d tokens ||, over the local batch: what each weighted term sends into the shared encoder.

    Only the heads lie between, so this costs little; it keeps the graph for the step's own backward pass. Alignment
    is collective: with several ranks, all of them must call this at the same step.

    Args:
        terms: name -> scalar with its graph; e.g. `BranchObjective.terms`, or the loss under a name.
        tokens: (B, N, D), the very tensor that the objective was given.

    Returns:
        name -> scalar; 0 where a term does not reach the tokens or the encoder is frozen.
    """
    norms = {}
    for name, term in terms.items():
        gradient = None
        if tokens.requires_grad and term.requires_grad:
            (gradient,) = torch.autograd.grad(term, tokens, retain_graph=True, allow_unused=True)
        norms[name] = torch.zeros((), device=tokens.device) if gradient is None else gradient.float().norm()
    return norms


def _totals(*local: Tensor | int) -> Tensor:
    """Local scalars -> their sums over ranks, in one collective."""
    device = next(value.device for value in local if isinstance(value, Tensor))
    return global_sum(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in local]))
