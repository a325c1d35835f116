"""How text and image share the positions of Harmon's language model."""

import torch
from torch import Tensor, nn


def build_projection(width_in: int, width_hidden: int, width_out: int) -> nn.Sequential:
    """The maps between visual tokens and the language model."""
    return nn.Sequential(nn.Linear(width_in, width_hidden), nn.SiLU(), nn.Linear(width_hidden, width_out))


def followed_by_ones(mask: Tensor, count: int) -> Tensor:
    """A mask (B, T) of text, continued by `count` visible tokens: (B, T + count)."""
    return torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)


def compact_positions(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: an image continues right after the last word, not after the padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
