"""Compactness C_b (Eq. 7): the rate of the posterior, an upper bound on I(Z~; I)."""

import torch
from torch import Tensor

from infotok_lit.objective.term import TermNats


def compactness(kl: Tensor) -> TermNats:
    """(B, N, d) nats per token and dimension -> nats per image, summed over the tokens that are present and d."""
    elements = torch.full_like(kl[:, 0, 0], kl[0].numel(), dtype=torch.int64)
    return TermNats(kl.sum((1, 2)), elements)
