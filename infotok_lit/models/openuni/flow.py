"""OpenUni's flow matching: training times are uniform thousandths; velocity is noise minus image."""

from dataclasses import dataclass

import torch
from torch import Tensor

TRAINING_STEPS = 1000


@dataclass(frozen=True)
class TrainingDraws:
    """Every random number of n images in one loss, so that runs can be replayed."""

    noise: Tensor
    """(n, C, h, w) standard normal."""
    uniform: Tensor
    """(n,) in [0, 1): decides the time."""


def draw_training(shape: torch.Size, device: torch.device) -> TrainingDraws:
    """Draws for latents of a shape (n, C, h, w)."""
    return TrainingDraws(torch.randn(shape, device=device), torch.rand(shape[0], device=device))


def timesteps_of(uniform: Tensor) -> Tensor:
    """(n,) float32 in {1, ..., 1000}: noise levels in thousandths."""
    return TRAINING_STEPS - (TRAINING_STEPS * uniform.float()).long().float()


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents, (n, C, h, w)."""
    sigmas = (timesteps / TRAINING_STEPS).view(-1, 1, 1, 1).to(latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise
