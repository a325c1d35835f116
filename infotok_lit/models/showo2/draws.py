"""Every random number of Show-o2's training loss, drawn in one place so that runs can be replayed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingDraws:
    """Randomness of n images."""

    noise: Tensor
    """(n, C, h, w) standard normal: where the path begins."""
    normal: Tensor
    """(n,) standard normal: decides the time."""


def draw_training(shape: torch.Size, device: torch.device) -> TrainingDraws:
    """Draws for latents of a shape (n, C, h, w)."""
    return TrainingDraws(torch.randn(shape, device=device), torch.randn(shape[0], device=device))
