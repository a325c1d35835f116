"""The video tokenizer: Cosmos's causal encoder and decoder, FSQ, and a transformer on either side of it.

Pixels are (B, 3, T, H, W) in [-1, 1] with T = temporal_compression * k + 1; tokens lie on a grid (B, t, h, w), where
the first latent frame is the first frame's alone.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosDecoder3d, CosmosEncoder3d
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from infotok_lit.budgets import RunningMean, keep_top, kept_count
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.video.transformer import Block, Grid

MAX_CODES = 1 << 24
"""FSQ computes the number of a code in float32, which is exact up to here."""


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """The shape of a tokenizer; the default is the released 4x8x8 one, with 123 million parameters.

    Args:
        channels: Width of the encoder's first layer and of the decoder's last.
        channel_multipliers: Widths of the levels, as multiples of `channels`.
        residual_blocks: Residual blocks per encoder level; a decoder level has one more.
        patch_size: Side of the Haar patches, a power of two.
        temporal_compression: Frames per latent frame, a power of two that is not below `patch_size`.
        spatial_compression: Pixels per token along each side, a power of two that is not below `patch_size`.
        attention_resolutions: Levels with this nominal side also have attention.
        resolution: The nominal side of a frame, from which those of the levels follow.
        latent_channels: Width of the encoder's output.
        levels: FSQ's levels per code channel; their product is the number of codes.
        width: Width of the transformers.
        mlp_width: Width inside their MLPs.
        num_heads: Attention heads; width / num_heads must be a multiple of 4.
        encoder_layers: Blocks of the compressor.
        decoder_layers: Blocks of the decompressor.
        rotary_base: The base of the rotary frequencies.
        norm_eps: Epsilon of their RMS norms.
        max_latent_frames: The longest clip, in latent frames.
        init_std: Standard deviation of the transformers' initial weights.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (2, 4, 4)
    residual_blocks: int = 2
    patch_size: int = 2
    temporal_compression: int = 4
    spatial_compression: int = 8
    attention_resolutions: tuple[int, ...] = (32,)
    resolution: int = 1024
    latent_channels: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    width: int = 256
    mlp_width: int = 512
    num_heads: int = 32
    encoder_layers: int = 8
    decoder_layers: int = 8
    rotary_base: float = 1e4
    norm_eps: float = 1e-5
    max_latent_frames: int = 49
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("channel_multipliers", "attention_resolutions", "levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_numbers()
        if self.width % (4 * self.num_heads):
            raise SettingsError(f"width {self.width} / num_heads {self.num_heads} must be a multiple of 4")
        if not self.levels or min(self.levels) < 3 or self.num_codes > MAX_CODES:
            raise SettingsError(
                f"levels must be 3 or more each, and no more than {MAX_CODES} codes, got {list(self.levels)}"
            )
        sides = (self.patch_size, self.temporal_compression, self.spatial_compression)
        if any(side < 1 or side & (side - 1) for side in sides) or self.patch_size > min(sides):
            raise SettingsError(
                "patch_size, temporal_compression and spatial_compression must be powers of two, and patch_size not "
                f"above the others; got {sides}"
            )
        in_time, in_space = ((side // self.patch_size).bit_length() - 1 for side in sides[1:])
        # The decoder's levels mirror the encoder's but for an offset of one where time is doubled.
        needed = 2 + max(in_time, in_space - 1) if in_space else 1
        if in_time > in_space or len(self.channel_multipliers) < needed:
            raise SettingsError(
                f"with patches of {self.patch_size}, {sides[1]} frames and {sides[2]} pixels per token need "
                f"{needed} channel_multipliers or more, and temporal_compression not above spatial_compression"
            )

    def _check_numbers(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name.endswith("_layers") else 1
            if field.type is float:
                fits = isinstance(value, int | float) and value > 0
            else:
                fits = all(isinstance(v, int) and v >= least for v in (value if isinstance(value, tuple) else (value,)))
            if not fits:
                kind = "a number above 0" if field.type is float else f"whole, {least} or more"
                raise SettingsError(f"{field.name} must be {kind}, got {value!r}")

    @property
    def num_codes(self) -> int:
        """How many different tokens there are."""
        return math.prod(self.levels)

    @property
    def max_frames(self) -> int:
        """The longest clip, in frames."""
        return (self.max_latent_frames - 1) * self.temporal_compression + 1

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of a clip's tokens.

        Raises:
            DataError: for a clip that does not divide evenly, or is too long.
        """
        time, side = self.temporal_compression, self.spatial_compression
        if frames < 1 or (frames - 1) % time or height < side or height % side or width < side or width % side:
            raise DataError(
                f"a clip of {frames} frames of {height} x {width} pixels does not divide into tokens: it needs a "
                f"multiple of {time} and 1 frames, and sides that are multiples of {side}"
            )
        if frames > self.max_frames:
            raise DataError(f"a clip of {frames} frames is too long for this tokenizer, which takes {self.max_frames}")
        return (frames - 1) // time + 1, height // side, width // side

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a config.json."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


SIZES: dict[str, VideoTokenizerConfig] = {
    "4x8x8": VideoTokenizerConfig(),
    "8x8x8": VideoTokenizerConfig(patch_size=4, temporal_compression=8),
    "scenes": VideoTokenizerConfig(
        channels=20,
        channel_multipliers=(1, 2, 2),
        residual_blocks=1,
        latent_channels=48,
        levels=(8, 5, 5, 5),
        width=48,
        mlp_width=96,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=2,
        max_latent_frames=3,
    ),
}
"""The released size, a DV8x8x8 as Cosmos has it, and one for clips of 9 x 32 x 32 pixels on a CPU."""


MaskKind = Literal["map", "first", "jump", "random"]
JUMP = 4


class Encoded(NamedTuple):
    """What the encoding half makes of a clip, by stage."""

    latent: Tensor
    """(B, latent_channels, t, h, w): the encoder's output."""
    compressed: Tensor
    """(B, latent_channels, t, h, w): the compressor's output."""
    before_quantising: Tensor
    """(B, d, t, h, w)."""
    codes: Tensor
    """(B, d, t, h, w): values in [-1, 1]; gradients pass straight through."""
    indices: Tensor
    """(B, t, h, w) int32: the tokens."""


class Reconstruction(NamedTuple):
    """A clip from a part of its tokens."""

    pixels: Tensor
    """(B, 3, T, H, W)."""
    mask: Tensor
    """(B, t, h, w) bool: the tokens that were kept."""
    token_map: Tensor
    """(B, t, h, w): the router's score of each token."""
    rate: Tensor
    """(B,): the rate that was asked for."""


class VideoTokenizer(nn.Module):
    """Clip -> tokens -> clip. What a checkpoint holds: everything here also exists at inference."""

    def __init__(self, config: VideoTokenizerConfig, complexity: RunningMean | None = None) -> None:
        """
        Args:
            config: the shape.
            complexity: how the mean error of the training clips is tracked; None for the default.
        """
        super().__init__()
        self.config = config
        widths = tuple(config.channels * multiplier for multiplier in config.channel_multipliers)
        shared: dict[str, Any] = {
            "num_resnet_blocks": config.residual_blocks,
            "attention_resolutions": config.attention_resolutions,
            "resolution": config.resolution,
            "patch_size": config.patch_size,
            "spatial_compression_ratio": config.spatial_compression,
            "temporal_compression_ratio": config.temporal_compression,
        }
        latent, code = config.latent_channels, len(config.levels)
        self.encoder = CosmosEncoder3d(3, latent, (config.channels, *widths), **shared)
        self.decoder = CosmosDecoder3d(latent, 3, (*widths, widths[-1]), **shared)
        self.quant_conv = nn.Conv3d(latent, code, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(code, latent, kernel_size=1)
        with torch.device("cpu"):  # it reads its number of codes, which the meta device cannot
            self.quantiser = FSQ(list(config.levels))
        block = (config.width, config.mlp_width, config.num_heads, config.rotary_base, config.norm_eps)
        self.temporal_embedding = nn.Parameter(torch.empty(config.max_latent_frames, config.width))
        self.compressor = nn.ModuleList(Block(*block) for _ in range(config.encoder_layers))
        self.decompressor = nn.ModuleList(Block(*block) for _ in range(config.decoder_layers))
        narrow = config.width == latent
        self.tokens_in = nn.Identity() if narrow else nn.Linear(latent, config.width, bias=False)
        self.tokens_out = nn.Identity() if narrow else nn.Linear(config.width, latent, bias=False)
        self.complexity = RunningMean() if complexity is None else complexity
        self._initialise()

    def _initialise(self) -> None:
        """The transformers start small; what diffusers builds keeps its own initial weights."""
        nn.init.normal_(self.temporal_embedding, std=self.config.init_std)
        for part in (self.compressor, self.decompressor, self.tokens_in, self.tokens_out):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=self.config.init_std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.temporal_embedding.device

    # Both halves

    def encode(self, pixels: Tensor) -> Encoded:
        """(B, 3, T, H, W) -> its tokens, and the stages on the way to them; DataError for an uneven clip."""
        self.config.token_grid(*pixels.shape[2:])
        latent = self.encoder(pixels)
        compressed = self.compress(latent)
        before = self.quant_conv(compressed)
        codes, indices = self.quantiser(before)
        return Encoded(latent, compressed, before, codes, indices)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, d, t, h, w), zero where a token is not kept -> (B, 3, T, H, W), about in [-1, 1]."""
        return self.decoder(self.decompress(self.post_quant_conv(codes)))

    def compress(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, t, h, w) -> the same: information is gathered into some of the tokens."""
        return self._transform(self.compressor, latent)

    def decompress(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, t, h, w) -> the same: information is spread over all tokens."""
        return self._transform(self.decompressor, latent)

    def codes_of(self, indices: Tensor) -> Tensor:
        """(B, t, h, w) tokens -> (B, d, t, h, w) codes."""
        return self.quantiser.indices_to_codes(indices)

    def _transform(self, blocks: nn.ModuleList, latent: Tensor) -> Tensor:
        grid: Grid = latent.shape[2:]
        tokens = self.tokens_in(latent.flatten(2).transpose(1, 2))
        per_frame = grid[1] * grid[2]
        tokens = tokens + self.temporal_embedding[: grid[0]].repeat_interleave(per_frame, dim=0)
        for block in blocks:
            tokens = block(tokens, grid)
        return self.tokens_out(tokens).transpose(1, 2).unflatten(2, grid)

    # The router

    @torch.no_grad()
    def token_map(self, pixels: Tensor, codes: Tensor) -> Tensor:
        """How badly all tokens together reconstruct the part of the clip that belongs to each.

        Args:
            pixels: (B, 3, T, H, W), the clip.
            codes: (B, d, t, h, w), all of its codes.

        Returns:
            (B, t, h, w) in float32: the mean absolute error of the token's pixels.
        """
        return pool_error(pixels, self.decode(codes), self.config)

    def reconstruct(
        self, pixels: Tensor, rate_of: Callable[[Tensor], Tensor], kind: MaskKind = "map"
    ) -> Reconstruction:
        """Encode a clip, let the router choose, and decode what is kept; differentiable but for the choice.

        Args:
            pixels: (B, 3, T, H, W).
            rate_of: gives the rates (B,) of clips from their token maps (B, t, h, w).
            kind: which tokens are kept at a given rate.
        """
        codes = self.encode(pixels).codes
        token_map = self.token_map(pixels, codes.detach())
        rate = rate_of(token_map)
        mask = keep_clipwide(token_map, rate, kind)
        return Reconstruction(self.decode(codes * mask[:, None]), mask, token_map, rate)


def pool_error(pixels: Tensor, reconstructed: Tensor, config: VideoTokenizerConfig) -> Tensor:
    """The mean absolute error (B, t, h, w) of each token's pixels; the first frame has tokens of its own."""
    error = (pixels.float() - reconstructed.float()).abs().mean(1, keepdim=True)
    error = F.avg_pool3d(error, (1, config.spatial_compression, config.spatial_compression))
    later = (
        F.avg_pool3d(error[:, :, 1:], (config.temporal_compression, 1, 1)) if error.shape[2] > 1 else error[:, :, 1:]
    )
    return torch.cat((error[:, :, :1], later), dim=2).squeeze(1)


def keep_clipwide(token_map: Tensor, rate: Tensor, kind: MaskKind = "map") -> Tensor:
    """The tokens of each clip that are kept: as many at a rate, whatever the kind.

    Args:
        token_map: (B, t, h, w), the router's scores.
        rate: (B,).
        kind: `map` keeps the highest scores; the ablations know no scores: `first` (R2L in the paper) keeps the first
            of each latent frame in raster order, `jump` deals those out over the frame in steps of four, and `random`
            draws with torch's global generator.

    Returns:
        bool (B, t, h, w).
    """
    scores = token_map.flatten(1)
    if kind == "random":
        scores = torch.rand_like(scores)
    elif kind != "map":
        place = torch.arange(token_map[0, 0].numel(), device=token_map.device)
        if kind == "jump":
            place = place % JUMP * len(place) + place // JUMP
        scores = -place.repeat(token_map.shape[1]).expand_as(scores)
    return keep_top(scores, kept_count(rate, scores.shape[1])).view_as(token_map)
