"""Pixels to latents and back, frozen: KL-16 (diffusers' AutoencoderKL) or a fixed orthonormal block transform.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w).
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.models.harmon.config import AutoencoderConfig

NOMINAL_RESOLUTION = 256


class KL16(nn.Module):
    """The KL autoencoder of Harmon; a latent is the posterior mean, never a sample."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        resolutions = [NOMINAL_RESOLUTION // 2**level for level in range(len(config.width_multipliers))]
        attends = [resolution == config.attention_resolution for resolution in resolutions]
        self.network = AutoencoderKL(
            down_block_types=tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends),
            up_block_types=("UpDecoderBlock2D",) * len(attends),
            block_out_channels=tuple(config.base_width * factor for factor in config.width_multipliers),
            layers_per_block=config.blocks_per_level,
            latent_channels=config.latent_channels,
            norm_num_groups=config.num_groups,
        )

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, C, h, w)."""
        return self.network.encode(images).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, height, width), not clamped."""
        return self.network.decode(latents).sample


class BlockTransform(nn.Module):
    """Orthonormal discrete cosine transform of square blocks: no weights, nothing to train.

    Keeping fewer frequencies than pixels projects each block on its lowest ones.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        size, kept = config.block_size, config.kept
        if not 1 <= kept <= size:
            raise ValueError(f"autoencoder.kept must be in [1, {size}], the block size; got {kept}")
        frequency, pixel = torch.arange(kept).unsqueeze(1), torch.arange(size)
        basis = torch.cos(math.pi * (2 * pixel + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
        basis[0] = math.sqrt(1 / size)
        atoms = torch.einsum("ai,bj->abij", basis, basis).reshape(kept**2, 1, size, size)
        self.stride = size
        # One group per colour, so channels are (colour, vertical frequency, horizontal frequency).
        self.register_buffer("atoms", atoms.repeat(3, 1, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, 3 kept^2, height / size, width / size)."""
        return F.conv2d(images, self.atoms, stride=self.stride, groups=3)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 kept^2, h, w) -> (B, 3, h size, w size), not clamped."""
        return F.conv_transpose2d(latents, self.atoms, stride=self.stride, groups=3)


def build_autoencoder(config: AutoencoderConfig) -> KL16 | BlockTransform:
    """The autoencoder of a configuration, frozen and in evaluation mode."""
    autoencoder = BlockTransform(config) if config.kind == "dct" else KL16(config)
    return autoencoder.eval().requires_grad_(False)


def to_tokens(latents: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, c, H, W) -> tokens (B, L, c p^2) in raster order and their grid; channel slowest, then row, then column."""
    grid = (latents.shape[2] // patch_size, latents.shape[3] // patch_size)
    return F.unfold(latents, kernel_size=patch_size, stride=patch_size).transpose(1, 2), grid


def from_tokens(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of to_tokens."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    return F.fold(tokens.transpose(1, 2), size, kernel_size=patch_size, stride=patch_size)
