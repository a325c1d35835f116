"""What is watched: every number of a branch by name, whose units docs/objective.md gives. Nothing here is optimised.

All numbers are over the global batch and equal on every rank; log them without a second reduction. Nothing is read
from the device but by what makes a message.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from infotok_lit.batch import Branch
from infotok_lit.objective.alignment import Contrast
from infotok_lit.objective.balance import Balance
from infotok_lit.objective.distributed import global_sum, world_size
from infotok_lit.objective.term import FACTORS, Term, TermNats

Number = float | Tensor
NUM_NOISE_BANDS = 4
NOISE_BANDS = tuple(
    f"t_{band / NUM_NOISE_BANDS:.2f}_{(band + 1) / NUM_NOISE_BANDS:.2f}" for band in range(NUM_NOISE_BANDS)
)
"""Names of the bands of the time t in [0, 1] of a flow model, from noise to clean; the last one includes 1."""
ACTIVE_NATS = 0.01
"""Mean KL above which a dimension carries something."""
COLLAPSED_BITS_PER_TOKEN = 0.05
INERT_NATS = 0.01
"""Nats per answer token that sufficiency must take from the tokens."""


def rate_report(kl: Tensor) -> dict[str, Tensor]:
    """(B, N, d) nats -> rate and active units."""
    images, tokens, width = kl.shape
    counts = torch.stack([kl.new_full((), images), kl.new_full((), images * tokens)])
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
    parts = (contrast.nats, contrast.log_k, contrast.bound, contrast.found, contrast.paired)
    nats, log_k, bound, found, pairs = _totals(*(part.sum() for part in parts))
    pairs = pairs.clamp(min=1)
    return {
        "alignment_nats": nats / pairs,
        "alignment_log_k": log_k / pairs,
        "alignment_bound_nats": bound / pairs,
        "alignment_accuracy": found / pairs,
    }


def self_alignment_report(term: TermNats) -> dict[str, Tensor]:
    """The mean cosine between tokens and their targets."""
    distance, tokens = _totals(term.per_image.sum(), term.elements.sum())
    return {"self_alignment_cosine": 1 - distance / tokens.clamp(min=1)}


def captioning_report(term: TermNats) -> dict[str, Tensor]:
    """Nats per caption token; 0 where no image has a caption."""
    nats, words = _totals(term.per_image.detach().sum(), term.elements.sum())
    return {"captioning_nats_per_token": nats / words.clamp(min=1)}


def noise_band_report(
    noise_level: Tensor, token_rates: Tensor | None, terms: Mapping[Term, TermNats]
) -> dict[str, Tensor]:
    """Rate and terms per band of the time t; NaN for a band that no image of the global batch is in.

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
    named: dict[Term, str] = {
        "sufficiency": "sufficiency_nats_per_element",
        "alignment": "alignment_nats",
        "captioning": "captioning_nats_per_token",
    }
    for term, name in named.items():
        if term in terms:
            ratios[name] = (terms[term].per_image.detach(), terms[term].elements)
    if not ratios:
        return {}
    band = (noise_level * NUM_NOISE_BANDS).long().clamp(0, NUM_NOISE_BANDS - 1)
    # Not F.one_hot, which reads its input to check it.
    in_band = band[:, None] == torch.arange(NUM_NOISE_BANDS, device=band.device)
    values = torch.stack([value.float() for ratio in ratios.values() for value in ratio])
    sums = global_sum((values[..., None] * in_band).sum(1))
    names = [f"{name}/{band}" for name in ratios for band in NOISE_BANDS]
    totals, counts = sums[0::2].flatten(), sums[1::2].flatten()
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}


def weight_report(terms: Mapping[Term, Tensor]) -> dict[str, Tensor]:
    """Weighted terms (this rank's shares) -> their global values: what each adds to the total loss."""
    values = _totals(*terms.values()) / world_size()
    return {f"weighted_{name}": value for name, value in zip(terms, values, strict=True)}


def balance_report(balance: Balance, weights: Mapping[Term, Tensor | float], lambda_: float) -> dict[str, Tensor]:
    """The measured pulls, and the lambda, alpha and beta that amount to the weights which balance has found.

    rho is what a term pulls now, weight included, as a share of the task's pull; NaN where the task pulls on nothing.
    """
    task, *pulls = balance.pulls()
    report = {"pull_task": task}
    for term, pull in zip(balance.shares, pulls, strict=True):
        rho = weights[term] * pull / task.clamp(min=torch.finfo(task.dtype).tiny)
        # Of a task that pulls on nothing there is no share; of what was never measured it is 0.
        report[f"rho_{term}"] = torch.where((task == 0) & (pull > 0), torch.nan, rho)
    # Numbers are written on the device: to copy one there would wait for it.
    values = {
        term: weight if isinstance(weight, Tensor) else torch.full_like(task, weight)
        for term, weight in weights.items()
    }
    equivalents = equivalent_weights(values, torch.full_like(task, lambda_))
    return report | {f"equivalent_{name}": value.detach() for name, value in equivalents.items()}


def equivalent_weights(weights: Mapping[Term, Number], lambda_: Number) -> dict[str, Number]:
    """The lambda, alpha and beta of Eq. 10 and 11 that amount to each term's factor in the total loss.

    Args:
        lambda_: the configured one, which is taken without compactness, as nothing else fixes it then.
    """
    found = {"lambda": weights.get("compactness", lambda_)}
    factors = {name: weights[term] / (found["lambda"] + 1e-30) for term, name in FACTORS.items() if term in weights}
    return found | factors


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
        f"Raise {branch}.beta (or alpha), or its share in balance; warm up compactness (compactness_warmup_steps), let "
        "tokens carry some bits for free (free_bits), add sufficiency to terms, or bind the rate to the tokens "
        "themselves with projection.kind identity or bottleneck inline."
    )


def inert_message(branch: Branch, gap: float, error: float) -> str | None:
    """Says in words that sufficiency takes nothing from the tokens, and what to change; None while it does.

    Args:
        gap: mean nats per target element that S loses with another image's tokens.
        error: its standard error; NaN, as is the gap, where too few images could be compared.
    """
    if math.isnan(error) or gap > max(3 * error, INERT_NATS if branch == "understanding" else 0.0):
        return None
    return (
        f"{branch}: sufficiency is inert: with the tokens of another image S is only {gap:.4f} nats per element worse "
        f"(standard error {error:.4f}). Its decoder predicts from what it knows without tokens, so the term teaches "
        "the encoder nothing. Let decoder.teacher_forcing be false, take a smaller decoder, warm up compactness "
        "(compactness_warmup_steps), set free_bits, or train longer."
    )


def gradient_norms(terms: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """|| d term / d tokens ||, over the local batch: what each weighted term sends into the shared encoder.

    Only the heads lie between, so this costs little; it keeps the graph for the step's own backward pass. Alignment
    is collective: with several ranks, all of them must call this at the same step.

    Args:
        terms: name -> scalar with its graph; e.g. `BranchObjective.terms`, or the loss under a name.
        tokens: (B, N, D), those of the `BranchObjective`.

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
    some = next(value for value in local if isinstance(value, Tensor)).detach().float()
    return global_sum(torch.stack([v.float() if isinstance(v, Tensor) else some.new_full((), v) for v in local]))
