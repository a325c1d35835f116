"""Pixels to latents and back, frozen: the official autoencoders, and a transform without weights in their place.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w). diffusers is imported when it is needed: the
embedded sizes do without.
"""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.checkpoints import KeyMap
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import AutoencoderConfig, DCAEConfig, Grid, KL16Config, WanConfig

NOMINAL_RESOLUTION = 256
"""Pixels per side of the images that KL-16's levels are named after."""
LOG_VARIANCE_RANGE = (-30.0, 20.0)
NETWORK = (r"^autoencoder\.network\.", "")
"""The rename that all key maps of official autoencoders begin with."""


class BlockTransform(nn.Module):
    """Orthonormal discrete cosine transform of square blocks: no weights, nothing to train.

    Keeping fewer frequencies than pixels projects each block on its lowest ones.

    Args:
        block_size: pixels per side of a block.
        kept: how many of the lowest frequencies per axis are kept; block_size keeps everything.
    """

    def __init__(self, block_size: int, kept: int) -> None:
        super().__init__()
        if not 1 <= kept <= block_size:
            raise SettingsError(f"autoencoder.kept must be in [1, {block_size}], the block size; got {kept}")
        frequency, pixel = torch.arange(kept).unsqueeze(1), torch.arange(block_size)
        basis = torch.cos(math.pi * (2 * pixel + 1) * frequency / (2 * block_size)) * math.sqrt(2 / block_size)
        basis[0] = math.sqrt(1 / block_size)
        atoms = torch.einsum("ai,bj->abij", basis, basis).reshape(kept**2, 1, block_size, block_size)
        self.stride = block_size
        self.channels = 3 * kept**2
        # One group per colour, so channels are (colour, vertical frequency, horizontal frequency).
        self.register_buffer("atoms", atoms.repeat(3, 1, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, 3 kept^2, height / block_size, width / block_size)."""
        return F.conv2d(images, self.atoms, stride=self.stride, groups=3)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 kept^2, h, w) -> (B, 3, h block_size, w block_size), not clamped."""
        return F.conv_transpose2d(latents, self.atoms, stride=self.stride, groups=3)


class KL16(nn.Module):
    """The KL autoencoder of Harmon (diffusers' AutoencoderKL); a latent is the posterior mean, never a sample."""

    def __init__(self, config: KL16Config) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        resolutions = [NOMINAL_RESOLUTION // 2**level for level in range(config.num_levels)]
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


class DCAE(nn.Module):
    """SANA's deep-compression autoencoder (diffusers' AutoencoderDC); deterministic."""

    def __init__(self, config: DCAEConfig) -> None:
        from diffusers import AutoencoderDC

        super().__init__()
        plain = config.num_levels - config.attention_stages
        blocks = ("ResBlock",) * plain + ("EfficientViTBlock",) * config.attention_stages
        scales = ((),) * plain + ((5,),) * config.attention_stages
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


class LatentPosterior(NamedTuple):
    """A Gaussian over latents."""

    mean: Tensor
    """Normalised per channel."""
    log_variance: Tensor

    @classmethod
    def of(cls, encoded: Tensor) -> "LatentPosterior":
        """From means and log-variances (B, 2 C, h, w), as `encode` gives them."""
        return cls(*encoded.chunk(2, dim=1))

    def sample(self, noise: Tensor) -> Tensor:
        """A sample, given standard normal noise. The official code normalises the mean but not the deviation."""
        return self.mean + torch.exp(0.5 * self.log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise


class WanVAE(nn.Module):
    """The causal video VAE of Wan2.1 (diffusers' AutoencoderKLWan), for single frames."""

    def __init__(self, config: WanConfig) -> None:
        from diffusers import AutoencoderKLWan

        super().__init__()
        self.network = AutoencoderKLWan(
            base_dim=config.base_width,
            z_dim=config.latent_channels,
            dim_mult=list(config.width_multipliers),
            num_res_blocks=config.blocks_per_level,
            attn_scales=[],
            temperal_downsample=list(config.temporal_downsample),
        )
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (self.network.config.latents_mean, self.network.config.latents_std)
        )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("inverse_std", 1 / std, persistent=False)

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


OFFICIAL: dict[str, type[nn.Module]] = {"kl16": KL16, "wan": WanVAE, "dc_ae": DCAE}


def build_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """The autoencoder of a configuration, frozen and in evaluation mode."""
    dct = config.kind == "dct"
    if not dct and config.kind not in OFFICIAL:
        raise SettingsError(f"autoencoder.kind: {config.kind!r} is not one of dct, {', '.join(OFFICIAL)}")
    autoencoder = BlockTransform(config.block_size, config.kept) if dct else OFFICIAL[config.kind](config)
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) -> (B, C, h, w), or for a posterior its means and log-variances (B, 2 C, h, w).

    It runs in the precision of its weights, in training float32, whatever is set around it, and draws nothing at
    random: a cache may keep the result.
    """
    images = images.to(next(chain(autoencoder.parameters(), autoencoder.buffers())).dtype)
    device = images.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        if isinstance(autoencoder, WanVAE):
            return torch.cat(autoencoder.posterior(images), dim=1)
        return autoencoder.encode(images)


def autoencoder_digest(config: AutoencoderConfig, autoencoder: nn.Module) -> str:
    """SHA-256 of an autoencoder's settings and weights: what decides about its latents."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def to_tokens(latents: Tensor, patch_size: int) -> tuple[Tensor, Grid]:
    """(B, c, H, W) -> tokens (B, L, c p^2) in raster order and their grid; channel slowest, then row, then column."""
    grid = (latents.shape[2] // patch_size, latents.shape[3] // patch_size)
    return F.unfold(latents, kernel_size=patch_size, stride=patch_size).transpose(1, 2), grid


def from_tokens(tokens: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Inverse of to_tokens."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    return F.fold(tokens.transpose(1, 2), size, kernel_size=patch_size, stride=patch_size)


def kl16_keys(num_levels: int) -> KeyMap:
    """Official names of KL-16 (`kl16.ckpt`), whose decoder counts its levels from the finest."""
    decoder_levels = tuple(
        (rf"^decoder\.up_blocks\.{ours}\.", f"decoder.up.{num_levels - 1 - ours}.") for ours in range(num_levels)
    )
    return KeyMap(
        renames=(
            NETWORK,
            *decoder_levels,
            (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
            (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
            (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
            (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
            (r"\.resnets\.", r".block."),
            (r"\.attentions\.", r".attn."),
            (r"\.conv_shortcut\.", r".nin_shortcut."),
            (r"\.downsamplers\.0\.", r".downsample."),
            (r"\.upsamplers\.0\.", r".upsample."),
            (r"\.group_norm\.", r".norm."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.0\.", r".proj_out."),
            (r"\.conv_norm_out\.", r".norm_out."),
        ),
        pointwise=r".*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight",
    )


def wan_keys(num_levels: int, blocks_per_level: int) -> KeyMap:
    """Official names of the Wan VAE, whose decoder numbers its blocks and upsamplers through."""
    per_level = blocks_per_level + 2
    decoder_blocks = tuple(
        (rf"^decoder\.up_blocks\.{level}\.resnets\.{block}\.", f"decoder.upsamples.{level * per_level + block}.")
        for level in range(num_levels)
        for block in range(blocks_per_level + 1)
    )
    upsamplers = tuple(
        (rf"^decoder\.up_blocks\.{level}\.upsamplers\.0\.", f"decoder.upsamples.{(level + 1) * per_level - 1}.")
        for level in range(num_levels)
    )
    residual = r"((?:middle|downsamples|upsamples)\.\d+)"
    return KeyMap(
        renames=(
            NETWORK,
            (r"^quant_conv\.", r"conv1."),
            (r"^post_quant_conv\.", r"conv2."),
            *decoder_blocks,
            *upsamplers,
            (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.downsamples.\1."),
            (r"\.mid_block\.resnets\.0\.", r".middle.0."),
            (r"\.mid_block\.attentions\.0\.", r".middle.1."),
            (r"\.mid_block\.resnets\.1\.", r".middle.2."),
            (rf"{residual}\.norm1\.", r"\1.residual.0."),
            (rf"{residual}\.conv1\.", r"\1.residual.2."),
            (rf"{residual}\.norm2\.", r"\1.residual.3."),
            (rf"{residual}\.conv2\.", r"\1.residual.6."),
            (rf"{residual}\.conv_shortcut\.", r"\1.shortcut."),
            (r"\.conv_in\.", r".conv1."),
            (r"\.norm_out\.", r".head.0."),
            (r"\.conv_out\.", r".head.2."),
        )
    )
