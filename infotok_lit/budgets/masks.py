"""Which tokens are kept at a given budget. A mask is True where a token is kept, and carries no gradient."""

import torch
from torch import Tensor


def kept_count(rate: Tensor, length: int) -> Tensor:
    """How many of `length` tokens the official video tokenizer keeps: one less than one might think at rate 1.

    Args:
        rate: (B,) in [0, 1].

    Returns:
        (B,) int64: length - 1 - floor((1 - rate) (length - 1)).
    """
    return length - 1 - torch.floor((1 - rate) * (length - 1)).long()


def nearest_count(share: Tensor, length: int) -> Tensor:
    """How many of `length` tokens are nearest to a share (B,) in (0, 1] of them, at least one: (B,) int64."""
    return torch.round(share * length).long().clamp(min=1)


def keep_top(scores: Tensor, count: Tensor) -> Tensor:
    """Keep the tokens with the highest scores; of equal ones, the first.

    The official code keeps what is strictly above a threshold. That is the same without ties, but drops all of the tied
    tokens at the threshold: on a clip that never changes, nearly everything.

    Args:
        scores: (B, N).
        count: (B,) int64, how many to keep.

    Returns:
        (B, N) bool with exactly `count` True in a row.
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order).contiguous())
    return rank < count[:, None]


def keep_first(rate: Tensor, length: int, stride: int = 1) -> Tensor:
    """Keep the first tokens of each block, whatever they hold: the ablations R2L (stride 1) and Jump of the paper.

    Args:
        rate: (..., T), the rate of each of T blocks.
        length: tokens per block; a multiple of `stride`.
        stride: the kept tokens are dealt out over the block in steps of length / stride.

    Returns:
        (..., T, length) bool: position i of a block is kept if i <= rate * length, before dealing out.
    """
    places = torch.arange(length, device=rate.device)
    kept = places <= rate[..., None] * length
    return kept.unflatten(-1, (stride, -1)).transpose(-1, -2).flatten(-2)


def keep_spread(count: Tensor, length: int) -> Tensor:
    """Keep tokens in equal steps, whatever they hold.

    Args:
        count: (B,) int64, how many of `length` to keep.

    Returns:
        (B, length) bool with exactly `count` True in a row.
    """
    steps = torch.arange(length + 1, device=count.device) * count[:, None] // length
    return steps[:, 1:] > steps[:, :-1]
