"""Pixels to latents and back, frozen: KL-16 (diffusers' AutoencoderKL) or the block transform.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w).
"""

from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.models.common.block_transform import BlockTransform
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


def build_autoencoder(config: AutoencoderConfig) -> KL16 | BlockTransform:
    """The autoencoder of a configuration, frozen and in evaluation mode."""
    autoencoder = BlockTransform(config.block_size, config.kept) if config.kind == "dct" else KL16(config)
    return autoencoder.eval().requires_grad_(False)


def to_tokens(latents: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, c, H, W) -> tokens (B, L, c p^2) in raster order and their grid; channel slowest, then row, then column."""
    grid = (latents.shape[2] // patch_size, latents.shape[3] // patch_size)
    return F.unfold(latents, kernel_size=patch_size, stride=patch_size).transpose(1, 2), grid


def from_tokens(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of to_tokens."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    return F.fold(tokens.transpose(1, 2), size, kernel_size=patch_size, stride=patch_size)
