"""Gaussian diffusion of one token: schedule, loss, and the network that denoises.

The loss is that of "Improved Denoising Diffusion Probabilistic Models" (Nichol & Dhariwal 2021) with a learned
variance range, per token as in MAR (Li et al. 2024). Shapes: M tokens, C channels,
S sampling steps, E condition width, W network width.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.errors import SettingsError
from infotok_lit.models.common.language_model import run_layers
from infotok_lit.models.common.sampling import TIME_FEATURES, Recorded, sinusoid
from infotok_lit.models.harmon.mar import LAYER_NORM_EPS, init_linears

TRAINING_STEPS = 1000
BETA_MAX = 0.999

Network = Callable[[Tensor, Tensor], Tensor]
"""(x (M, C), timestep (M,) or (1,)) -> (M, 2C): predicted noise, then the variance interpolation."""

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As a Network, whose third argument is the embedded condition (M, W)."""


class Coefficients(NamedTuple):
    """Numbers of one step of the chain for each token, (M, 1) float32; see `Schedule`."""

    signal: Tensor
    noise: Tensor
    inverse_signal: Tensor
    noise_to_signal: Tensor
    mean_on_x0: Tensor
    mean_on_x_t: Tensor
    log_beta: Tensor
    posterior_log_variance: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """A (possibly respaced) chain of S steps."""

    timesteps: Tensor
    """(S,) int64: the original step, in [0, 1000), that the network is told."""
    betas: Tensor
    """(S,) float64."""

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(S,) float64: the share of signal variance that is left."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """(S,) float64: the same one step earlier."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """(S,) float64: log variance of q(x_{t-1} | x_t, x_0); its first entry, log 0, is replaced by the second."""
        variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        return torch.cat([variance[1:2], variance[1:]]).log()

    def at(self, step: Tensor) -> Coefficients:
        """The coefficients at steps (M,) int64 of this chain, computed in float64 and used in float32."""
        return Coefficients(*_on_device(self, step.device)[1][:, step].unsqueeze(-1))

    def descend(self, device: torch.device) -> Iterator[tuple[Tensor, Coefficients]]:
        """Timestep (1,) and coefficients (1, 1) of each step, last step first: views, so that none is copied."""
        timesteps, tables = _on_device(self, device)
        for k in reversed(range(len(self))):
            yield timesteps[k : k + 1], Coefficients(*tables[:, k, None, None].unbind())

    def __len__(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=16)
def _on_device(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Timesteps (S,) and coefficients (8, S) float32: once per device, as a step should wait for no copy."""
    survived, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    tables = Coefficients(
        signal=survived.sqrt(),
        noise=(1 - survived).sqrt(),
        inverse_signal=survived.rsqrt(),
        noise_to_signal=(1 / survived - 1).sqrt(),
        mean_on_x0=schedule.betas * previous.sqrt() / (1 - survived),
        mean_on_x_t=(1 - previous) * (1 - schedule.betas).sqrt() / (1 - survived),
        log_beta=schedule.betas.log(),
        posterior_log_variance=schedule.posterior_log_variance,
    )
    return schedule.timesteps.to(device), torch.stack(tables).float().to(device)


@lru_cache(maxsize=16)
def make_schedule(respacing: str | None = None) -> Schedule:
    """The cosine schedule over 1000 steps, or the sub-chain that `respacing` keeps ("100", "10,20", "ddim5")."""
    steps = torch.arange(TRAINING_STEPS + 1, dtype=torch.float64) / TRAINING_STEPS
    survival = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - survival[1:] / survival[:-1]).clamp(max=BETA_MAX)
    if respacing is None:
        return Schedule(torch.arange(TRAINING_STEPS), betas)
    kept = torch.tensor(respaced_timesteps(respacing))
    survived = torch.cumprod(1 - betas, dim=0)[kept]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), survived[:-1]])
    return Schedule(kept, 1 - survived / previous)


def respaced_timesteps(respacing: str) -> list[int]:
    """The timesteps that a respacing string keeps, ascending.

    Raises:
        SettingsError: if it is no respacing, or asks for steps that do not fit.
    """
    if not re.fullmatch(r"ddim\d+|\d+(, *\d+)*", respacing):
        raise SettingsError(f"sampling_steps is {respacing!r}; set it to steps such as '100', '10,20' or 'ddim25'")
    if respacing.startswith("ddim"):
        wanted = int(respacing.removeprefix("ddim"))
        for stride in range(1, TRAINING_STEPS):
            if len(range(0, TRAINING_STEPS, stride)) == wanted:
                return list(range(0, TRAINING_STEPS, stride))
        raise SettingsError(f"no integer stride gives exactly {wanted} of {TRAINING_STEPS} timesteps")
    counts = [int(count) for count in respacing.split(",")]
    size, longer = divmod(TRAINING_STEPS, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise SettingsError(
                f"cannot keep {count} of a section of {length} timesteps (sampling_steps={respacing!r})"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    if len(kept) < 2:
        raise SettingsError(f"sampling_steps is {respacing!r}; set it to 2 steps or more")
    return kept


def token_diffusion_losses(
    network: Network, x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Both losses of each token: squared error of the noise, and the variational bound on the variance in bits.

    Args:
        network: the denoiser, with its condition already bound.
        x0: (M, C) clean tokens.
        t: (M,) int64 steps of the full chain.
        noise: (M, C) standard normal.
        schedule: the full 1000-step schedule.

    Returns:
        Squared error (M,) and bound (M,), float32; a token's loss is their sum.
    """
    at_t = schedule.at(t)
    x_t = at_t.signal * x0 + at_t.noise * noise
    predicted_noise, interpolation = network(x_t, t).float().chunk(2, dim=-1)
    squared_error = (noise - predicted_noise).square().mean(dim=-1)
    # Only the variance learns from the bound; the mean learns from the squared error.
    mean, log_variance = step_distribution(x_t, predicted_noise.detach(), interpolation, at_t)
    true_mean = at_t.mean_on_x0 * x0 + at_t.mean_on_x_t * x_t
    true_log_variance = at_t.posterior_log_variance
    divergence = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    decoder_nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    bound = torch.where((t == 0).unsqueeze(-1), decoder_nll, divergence).mean(dim=-1) / math.log(2.0)
    return squared_error, bound


def step_distribution(
    x_t: Tensor, predicted_noise: Tensor, interpolation: Tensor, at_t: Coefficients
) -> tuple[Tensor, Tensor]:
    """Mean and log variance (M, C) of p(x_{t-1} | x_t)."""
    x0 = at_t.inverse_signal * x_t - at_t.noise_to_signal * predicted_noise
    fraction = (interpolation + 1) / 2
    log_variance = fraction * at_t.log_beta + (1 - fraction) * at_t.posterior_log_variance
    return at_t.mean_on_x0 * x0 + at_t.mean_on_x_t * x_t, log_variance


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of x under a Gaussian integrated over bins of width 2/255 (the t = 0 term)."""
    centred, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = _approximate_normal_cdf(inverse_scale * (centred + 1 / 255))
    lower = _approximate_normal_cdf(inverse_scale * (centred - 1 / 255))
    log_upper = upper.clamp(min=1e-12).log()
    log_above_lower = (1 - lower).clamp(min=1e-12).log()
    log_between = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_above_lower, log_between))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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
        self.activation_checkpointing = False
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict noise and variance interpolation.

        Args:
            x: (M, C) noisy tokens.
            t: (M,) int64 original timesteps, or (1,) that of all.
            condition: (M, W) embedded by `condition_embed`.

        Returns:
            (M, 2C).
        """
        activated = F.silu(self.time_embed(sinusoid(t)) + condition)
        h = self.input_embed(x)
        h = run_layers(self.blocks, h, activated, recompute=self.activation_checkpointing)
        shift, scale = self.output_modulation(activated).chunk(2, dim=-1)
        return self.output(F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift)

    def losses(self, targets: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and bound, (M,) each, of tokens (M, C) given z (M, E), at steps t (M,) with noise (M, C)."""
        return token_diffusion_losses(self.given(z), targets.float(), t, noise, make_schedule())

    def given(self, z: Tensor, denoiser: Denoiser | None = None) -> Network:
        """The denoiser of tokens whose conditions are z (M, E); another one than this if it is named."""
        denoise, condition = denoiser or self, self.condition_embed(z)
        return lambda x, t: denoise(x, t, condition)

    def recorded(self) -> Denoiser:
        """This denoiser as a CUDA device launches it faster, where it can; until its weights are replaced."""
        if self.output.weight.device.type != "cuda":
            return self
        from torch.distributed.fsdp import FSDPModule

        # The layers of a sharded model gather their weights as they are called.
        return self if any(isinstance(module, FSDPModule) for module in self.modules()) else Recorded(self)

    def _initialise(self) -> None:
        init_linears(self)
        nn.init.normal_(self.time_embed[0].weight, std=0.02)
        nn.init.normal_(self.time_embed[2].weight, std=0.02)
        # Zero modulation and output: an untrained network starts as the identity with a zero prediction.
        for layer in (*(block.modulation for block in self.blocks), self.output_modulation, self.output):
            nn.init.zeros_(layer.weight)
