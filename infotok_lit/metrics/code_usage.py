"""How much of a codebook is used."""

import math

import torch
from torch import Tensor


def code_entropy_bits(codes: Tensor, num_codes: int) -> Tensor:
    """Entropy of the codes' frequencies, in bits; 2 to its power is the perplexity."""
    frequency = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()
    return torch.special.entr(frequency).sum() / math.log(2)


def code_usage_fraction(codes: Tensor, num_codes: int) -> Tensor:
    """The share of all codes that occur."""
    return (torch.bincount(codes.flatten(), minlength=num_codes) > 0).double().mean()
