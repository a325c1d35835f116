"""Every random number of Harmon's training loss and of its sampler, drawn in one place so that runs can be replayed.

Shapes: B batch, L places, n hidden places per row, M = noise_draws * B * n hidden tokens, C token channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infotok_lit.models.common.image_noise import ImageNoise
from infotok_lit.models.harmon.diffusion import TRAINING_STEPS


@dataclass(frozen=True)
class TrainingDraws:
    """Randomness of one text-to-image loss."""

    hidden: Tensor
    """(B, L) bool: the places to predict; every row hides the same number."""
    timesteps: Tensor
    """(M,) int64, over hidden tokens: whole copies of the batch one after another, rows and places in raster order."""
    noise: Tensor
    """(M, C) standard normal, in the same order."""


def draw_training(
    batch: int, places: int, channels: int, noise_draws: int, ratio_min: float, ratio_std: float, device: torch.device
) -> TrainingDraws:
    """One mask ratio for the batch, a random set of that size per row, and independent noise per hidden token."""
    num_hidden = math.ceil(places * truncated_normal_ratio(ratio_min, ratio_std))
    order = torch.rand(batch, places, device=device).argsort(dim=1)
    hidden = order.argsort(dim=1) < num_hidden
    count = noise_draws * batch * num_hidden
    timesteps = torch.randint(TRAINING_STEPS, (count,), device=device)
    return TrainingDraws(hidden, timesteps, torch.randn(count, channels, device=device))


def truncated_normal_ratio(minimum: float, std: float) -> float:
    """A draw from a normal with mean 1 truncated to [minimum, 1], by inversion of its distribution function."""
    lowest = 0.5 * (1 + math.erf((minimum - 1) / (std * math.sqrt(2))))
    level = lowest + float(torch.rand((), dtype=torch.float64)) * (0.5 - lowest)
    quantile = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    return min(1.0, max(minimum, 1 + std * quantile))


class DrawingNoise(ImageNoise):
    """Randomness of the sampler, per image."""

    def orders(self, places: int) -> Tensor:
        """(B, L) int64: for each image, a random order of its places."""
        orders = [torch.randperm(places, generator=generator) for generator in self.generators]
        return torch.stack(orders).to(self.device)

    def token_normal(self, per_image: int, channels: int) -> Tensor:
        """(B * per_image, C) standard normal, images one after another."""
        return self.normal(per_image, channels).flatten(0, 1)
