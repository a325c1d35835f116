"""Flow matching between noise (time 0) and clean latents (time 1): the path, the times, and the layout of targets."""

import math

import torch
from torch import Tensor, nn

from infotok_lit.models.showo2.config import PATCH_SIZE

NUM_FREQUENCIES = 128
MAX_PERIOD = 10000.0
RUN = PATCH_SIZE**2
"""Latent pixels that one token predicts."""


class TimeEmbedding(nn.Module):
    """Times in [0, 1] -> (n, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, time: Tensor) -> Tensor:
        """(n,) -> (n, width)."""
        return self.mlp(sinusoid(time).to(self.mlp[0].weight.dtype))


def sinusoid(time: Tensor) -> Tensor:
    """(n,) times, used as they are and not in thousandths -> (n, 256) float32: cosines, then sines."""
    steps = torch.arange(NUM_FREQUENCIES, device=time.device, dtype=torch.float32)
    angles = time.float().unsqueeze(1) * torch.exp(-math.log(MAX_PERIOD) * steps / NUM_FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def training_time(normal: Tensor, minimum: float = 0.0, num_image_tokens: int | None = None) -> Tensor:
    """Logit-normal times from standard normal draws, in [minimum, 1).

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
