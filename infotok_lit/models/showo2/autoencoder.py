"""Pixels to latents and back, frozen: the Wan2.1 VAE (diffusers' AutoencoderKLWan) or the block transform.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w).
"""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from infotok_lit.models.common.block_transform import BlockTransform
from infotok_lit.models.showo2.config import AutoencoderConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class LatentPosterior(NamedTuple):
    """A Gaussian over latents."""

    mean: Tensor
    """Normalised per channel."""
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A draw, given standard normal noise. The official code normalises the mean but not the deviation."""
        return self.mean + torch.exp(0.5 * self.log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise


class WanVAE(nn.Module):
    """The causal video VAE of Wan2.1, for single frames."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.network = AutoencoderKLWan(
            base_dim=config.base_width,
            z_dim=config.latent_channels,
            dim_mult=list(config.width_multipliers),
            num_res_blocks=config.blocks_per_level,
            attn_scales=[],
            temperal_downsample=list(config.temporal_downsample),
        )
        self.register_buffer("mean", _per_channel(self.network.config.latents_mean), persistent=False)
        self.register_buffer("inverse_std", 1 / _per_channel(self.network.config.latents_std), persistent=False)

    def posterior(self, images: Tensor) -> LatentPosterior:
        """(B, 3, height, width), or (B, 3, frames, height, width) -> a Gaussian over latents of as many axes."""
        single = images.ndim == 4
        parameters = self.network.encode(images.unsqueeze(2) if single else images).latent_dist.parameters
        mean, log_variance = parameters.chunk(2, dim=1)
        mean = (mean - self.mean) * self.inverse_std
        return LatentPosterior(*(x.squeeze(2) if single else x for x in (mean, log_variance)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), or (B, C, frames, h, w) -> images in [-1, 1]."""
        single = latents.ndim == 4
        # Written as the official code does: multiplying by the deviation instead rounds differently.
        unnormalised = (latents.unsqueeze(2) if single else latents) / self.inverse_std + self.mean
        images = self.network.decode(unnormalised).sample
        return images.squeeze(2) if single else images


def build_autoencoder(config: AutoencoderConfig) -> WanVAE | BlockTransform:
    """The autoencoder of a configuration, frozen and in evaluation mode."""
    autoencoder = BlockTransform(config.block_size, config.kept) if config.kind == "dct" else WanVAE(config)
    return autoencoder.eval().requires_grad_(False)


def _per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)
