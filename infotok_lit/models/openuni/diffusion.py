"""The diffusion half of OpenUni: from meta queries to SANA's condition, flow matching, and the sampler.

Training times are uniform thousandths, or shifted ones; velocity is noise minus image. Sampling is DPM-Solver++ on the
flow, with the settings of the official scripts. diffusers is imported when it is needed. Shapes: B batch, Q queries, C
latent channels, H language-model width, W connector width, D condition width, n images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infotok_lit.errors import SettingsError
from infotok_lit.models.common.language_model import SiglipLayers
from infotok_lit.models.common.sampling import guide
from infotok_lit.models.openuni.family import ConnectorConfig, DiffusionTransformerConfig, SamplingConfig

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

TRAINING_STEPS = 1000
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (b, C, h, w), timestep) -> velocities (B, C, h, w) under each condition."""


def build_connector(config: ConnectorConfig) -> SiglipLayers:
    """A bidirectional transformer without positions or final norm, as fresh as the official one begins."""
    connector = SiglipLayers(config.width, config.mlp_width, config.depth, config.heads)
    for name, parameter in connector.named_parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("_proj.bias"):
            nn.init.zeros_(parameter)
        elif name.endswith((".fc1.bias", ".fc2.bias")):
            nn.init.normal_(parameter, std=1e-6)
    return connector


def build_projector(config: ConnectorConfig, llm_width: int, condition_width: int) -> nn.Linear | nn.ModuleList:
    """The linear maps beside the connector.

    Raises:
        SettingsError: if the connector's width does not suit the order.
    """
    required = {"connector_first": llm_width, "projector_first": condition_width}.get(config.order, config.width)
    if config.width != required:
        raise SettingsError(f"connector.width must be {required} for order {config.order}, not {config.width}")
    if config.order == "projector_on_both_sides":
        return nn.ModuleList([nn.Linear(llm_width, config.width), nn.Linear(config.width, condition_width)])
    return nn.Linear(llm_width, condition_width)


def around_connector(projector: nn.Linear | nn.ModuleList, order: str) -> tuple[nn.Module, nn.Module]:
    """What stands before the connector, (B, Q, H) -> (B, Q, W), and after it, (B, Q, W) -> (B, Q, D)."""
    if order == "projector_on_both_sides":
        return projector[0], projector[1]
    return (projector, nn.Identity()) if order == "projector_first" else (nn.Identity(), projector)


def build_transformer(config: DiffusionTransformerConfig, channels: int) -> "SanaTransformer2DModel":
    """A SANA with fresh weights."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.cross_head_dim,
        cross_attention_dim=config.cross_heads * config.cross_head_dim,
        caption_channels=config.caption_width,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.sample_size,
        patch_size=1,
        qk_norm=config.qk_norm,
    )


@dataclass(frozen=True)
class RandomNumbers:
    """Every random number of n images in one loss, so that runs can be replayed."""

    noise: Tensor
    """(n, C, h, w) standard normal."""
    uniform: Tensor
    """(n,) in [0, 1): decides the time."""


def random_numbers(shape: torch.Size, device: torch.device, draws: int = 1) -> RandomNumbers:
    """For latents of a shape (n, C, h, w), of which each image stands `draws` times in a row.

    The times of one image are spread evenly behind the first, which is random: each is uniform, and together they tell
    more of the loss than as many that know nothing of one another.
    """
    noise, uniform = torch.randn(shape, device=device), torch.rand(shape[0] // draws, 1, device=device)
    return RandomNumbers(noise, (uniform + torch.arange(draws, device=device) / draws).remainder(1).flatten())


def timesteps_of(uniform: Tensor, shift: float = 1.0) -> Tensor:
    """(n,) float32: noise levels in thousandths, {1, ..., 1000}, moved towards 1000 as the sampler's are."""
    times = TRAINING_STEPS - (TRAINING_STEPS * uniform.float()).long().float()
    return shift * times / (1 + (shift - 1) * times / TRAINING_STEPS)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents, (n, C, h, w)."""
    sigmas = (timesteps / TRAINING_STEPS).view(-1, 1, 1, 1).to(latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise


def build_scheduler(sampling: SamplingConfig) -> "DPMSolverMultistepScheduler":
    """The sampler with its timesteps set."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sampling.time_shift
    )
    scheduler.set_timesteps(sampling.iterations)
    # Timesteps are whole numbers: where the first two are equal, it would take the second for the first.
    scheduler.set_begin_index(0)
    return scheduler


def walk(
    velocity: Velocity, start: Tensor, sampling: SamplingConfig, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Where noise (b, C, h, w) leads.

    Under guidance the conditional velocities come first and the unconditional ones second.
    """
    scheduler, latents = build_scheduler(sampling), start
    for i, timestep in enumerate(scheduler.timesteps):
        step = guide(velocity(latents, timestep), sampling.scale)
        latents = scheduler.step(step, timestep, latents, return_dict=False)[0]
        if progress is not None:
            progress(i + 1, len(scheduler.timesteps))
    return latents


def sana_timestep(timestep: Tensor, count: int, device: torch.device) -> Tensor:
    """(count,) float32: what the network is told."""
    return timestep.to(device=device, dtype=torch.float32).expand(count)
