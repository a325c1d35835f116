"""The network that denoises one token given its condition vector (Li et al. 2024, arXiv 2406.11838).

Shapes: M tokens, C token channels, E condition width, W network width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.models.harmon.diffusion import make_schedule, sample_tokens, token_diffusion_losses
from infotok_lit.models.harmon.vit import LAYER_NORM_EPS, init_linears

TIME_FEATURES = 256
MAX_PERIOD = 10000.0


class ResidualBlock(nn.Module):
    """An MLP whose input is modulated, and whose output is gated, by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, h: Tensor, activated: Tensor) -> Tensor:
        """(M, W), SiLU of the condition (M, W) -> (M, W)."""
        shift, scale, gate = self.modulation(activated).chunk(3, dim=-1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class TokenDiffusion(nn.Module):
    """Denoiser, training loss and sampler of a single token."""

    def __init__(self, channels: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition_embed = nn.Linear(condition_width, width)
        self.input_embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, 2 * channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict noise and variance interpolation.

        Args:
            x: (M, C) noisy tokens.
            t: (M,) int64 original timesteps.
            condition: (M, W) embedded by `condition_embed`.

        Returns:
            (M, 2C).
        """
        activated = F.silu(self.time_embed(time_features(t)) + condition)
        h = self.input_embed(x)
        for block in self.blocks:
            h = block(h, activated)
        shift, scale = self.output_modulation(activated).chunk(2, dim=-1)
        return self.output(F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift)

    def losses(self, targets: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and bound, (M,) each, of tokens (M, C) given z (M, E), at steps t (M,) with noise (M, C)."""
        condition = self.condition_embed(z)
        return token_diffusion_losses(
            lambda x, step: self(x, step, condition), targets.float(), t, noise, make_schedule()
        )

    def sample(
        self,
        z: Tensor,
        initial_noise: Tensor,
        step_noise: Callable[[int], Tensor],
        respacing: str,
        temperature: float = 1.0,
        guidance: float = 1.0,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Sample tokens (M, C) given conditions z (M, E); see diffusion.sample_tokens."""
        condition = self.condition_embed(z)
        return sample_tokens(
            lambda x, step: self(x, step, condition),
            initial_noise,
            step_noise,
            make_schedule(respacing),
            temperature,
            guidance,
            watch,
        )

    def _initialise(self) -> None:
        init_linears(self)
        nn.init.normal_(self.time_embed[0].weight, std=0.02)
        nn.init.normal_(self.time_embed[2].weight, std=0.02)
        # Zero modulation and output: an untrained network starts as the identity with a zero prediction.
        for layer in (*(block.modulation for block in self.blocks), self.output_modulation, self.output):
            nn.init.zeros_(layer.weight)


def time_features(t: Tensor) -> Tensor:
    """Sinusoidal features (M, 256) of timesteps (M,): cosines, then sines."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
