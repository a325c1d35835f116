"""Pixels to latents and back, frozen: SANA's DC-AE (diffusers' AutoencoderDC) or the block transform.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w).
"""

from diffusers import AutoencoderDC
from torch import Tensor, nn

from infotok_lit.models.common.block_transform import BlockTransform
from infotok_lit.models.openuni.config import AutoencoderConfig

RESIDUAL, ATTENTION = "ResBlock", "EfficientViTBlock"
MULTISCALE = 5


class DCAE(nn.Module):
    """The deep-compression autoencoder; deterministic."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        plain = len(config.widths) - config.attention_stages
        blocks = (RESIDUAL,) * plain + (ATTENTION,) * config.attention_stages
        scales = ((),) * plain + ((MULTISCALE,),) * config.attention_stages
        self.network = AutoencoderDC(
            latent_channels=config.latent_channels,
            attention_head_dim=config.attention_head_dim,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=config.widths,
            decoder_block_out_channels=config.widths,
            encoder_layers_per_block=config.encoder_layers,
            decoder_layers_per_block=config.decoder_layers,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        )

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, C, h, w)."""
        return self.network.encode(images).latent

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, height, width), not clamped."""
        return self.network.decode(latents).sample


def build_autoencoder(config: AutoencoderConfig) -> DCAE | BlockTransform:
    """The autoencoder of a configuration, frozen and in evaluation mode."""
    autoencoder = BlockTransform(config.block_size, config.kept) if config.kind == "dct" else DCAE(config)
    return autoencoder.eval().requires_grad_(False)
