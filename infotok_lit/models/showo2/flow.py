"""Flow matching between noise (time 0) and clean latents (time 1): random numbers, the path, times, and targets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infotok_lit.models.common.sampling import TIME_FEATURES, sinusoid
from infotok_lit.models.showo2.family import PATCH_SIZE

RUN = PATCH_SIZE**2
"""Latent pixels that one token predicts."""


@dataclass(frozen=True)
class RandomNumbers:
    """The randomness of n images in one loss, drawn in one place so that runs can be replayed."""

    noise: Tensor
    """(n, C, h, w) standard normal: where the path begins."""
    normal: Tensor
    """(n,) standard normal: decides the time."""


def random_numbers(shape: torch.Size, device: torch.device) -> RandomNumbers:
    """For latents of a shape (n, C, h, w)."""
    return RandomNumbers(torch.randn(shape, device=device), torch.randn(shape[0], device=device))


class TimeEmbedding(nn.Module):
    """Times in [0, 1] -> (n, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, time: Tensor) -> Tensor:
        """(n,) -> (n, width)."""
        return self.mlp(sinusoid(time).to(self.mlp[0].weight.dtype))


def training_time(normal: Tensor, minimum: float = 0.0, num_image_tokens: int | None = None) -> Tensor:
    """Logit-normal times from standard normal numbers, in [minimum, 1).

    Args:
        num_image_tokens: shift the times towards noise as for this many tokens, the time's own included. The shift
            comes last, so times can end below `minimum`.
    """
    time = torch.sigmoid(normal) * (1 - minimum) + minimum
    if num_image_tokens is None:
        return time
    factor = math.exp(0.5 + (num_image_tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return 1 - factor / (factor + 1 / (1 - time) - 1)


def on_path(clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at a time (n,), and the velocity there; both as `clean` (n, C, h, w)."""
    at = time.view(-1, 1, 1, 1)
    return at * clean + (1 - at) * noise, clean - noise


def sampling_times(points: int, shift: float) -> Tensor:
    """(points,) from 0 to 1; above 1, `shift` puts more of them near 0."""
    time = torch.linspace(0, 1, points)
    return time / (time + shift - shift * time)


def to_runs(latents: Tensor) -> Tensor:
    """What each token predicts: (n, C, h, w) -> (n, h w / 4, 4 C).

    Not the 2x2 patch that the token has seen, but four latent pixels that follow each other in raster order, channels
    fastest: the released weights were trained so.
    """
    pixels = latents.flatten(2).transpose(1, 2)
    return pixels.reshape(len(latents), -1, RUN * latents.shape[1])


def from_runs(runs: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Inverse of to_runs: (n, h w / 4, 4 C) -> (n, C, h, w)."""
    return runs.reshape(len(runs), height * width, channels).transpose(1, 2).unflatten(2, (height, width))
