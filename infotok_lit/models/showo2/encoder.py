"""The shared visual encoder: a semantic and a low-level path over latents, fused into one set of tokens, which may be
quantised.

Shapes: n images, C latent channels, grid (gh, gw) of N = gh gw tokens, S semantic width, D language-model width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.batch import TokenCodes
from infotok_lit.models.common.channel import Channel
from infotok_lit.models.common.language_model import RMSNorm, SiglipLayers
from infotok_lit.models.showo2.family import PATCH_SIZE, QuantiserConfig, SemanticConfig

FUSION_EPS = 1e-6
COMMITMENT_WEIGHT, ENTROPY_WEIGHT = 0.25, 0.1
"""Of the quantisers' own losses: tokens stay near their codes; choices are sure, and different (lookup-free alone)."""


class SharedTokens(NamedTuple):
    """What leaves the visual encoder."""

    tokens: Tensor
    """(n, N, D)."""
    codes: TokenCodes | None = None
    """(n, N) of them; None for continuous tokens."""


class TokenQuantiser(nn.Module):
    """Continuous tokens -> the nearest of a finite number of embeddings; an option.

    The InfoTok paper calls Show-o2's tokenizer discrete; the official code feeds it continuous latents, and has none of
    this. With a quantiser, everything behind the encoder, the objective's Gaussian posterior included, sees the
    quantised embeddings; gradients pass straight through.
    """

    def __init__(self, config: QuantiserConfig, width: int) -> None:
        super().__init__()
        self.num_codes = config.num_codes
        self.kind = config.kind
        self.codebook = build_codebook(config, width)

    def forward(self, tokens: Tensor) -> SharedTokens:
        """(n, N, D) -> quantised tokens, their codes and the quantiser's loss."""
        # In float32: a distance in bfloat16 would pick wrong codes.
        with torch.autocast(tokens.device.type, enabled=False):
            quantised, codes, *loss = self.codebook(tokens.float())
        token_codes = TokenCodes(codes.long(), self.num_codes, loss[0].sum() if loss else None)
        return SharedTokens(quantised.to(tokens.dtype), token_codes)


def build_codebook(config: QuantiserConfig, width: int) -> nn.Module:
    """The library's quantiser of a configuration."""
    from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

    if config.kind == "fsq":
        return FSQ(levels=list(config.levels), dim=width)
    if config.kind == "lfq":
        return LFQ(
            dim=width,
            codebook_size=config.codebook_size,
            entropy_loss_weight=ENTROPY_WEIGHT,
            commitment_loss_weight=COMMITMENT_WEIGHT,
        )
    return VectorQuantize(
        dim=width,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_width,
        commitment_weight=COMMITMENT_WEIGHT,
        kmeans_init=True,
    )


class DualPathEncoder(nn.Module):
    """Latents, clean or noisy -> the shared visual tokens of understanding and generation."""

    def __init__(
        self, config: SemanticConfig, quantiser: QuantiserConfig, channel: Channel, channels: int, llm_width: int
    ) -> None:
        super().__init__()
        self.understanding_embed = _patch_embedding(channels, config.width)
        self.generation_embed = _patch_embedding(channels, llm_width)
        self.positions = nn.Embedding(config.table_side**2, config.width)
        self.semantic = SiglipLayers(config.width, config.mlp_width, config.depth, config.heads, config.layer_norm_eps)
        both = config.width + llm_width
        self.fusion = nn.Sequential(
            RMSNorm(both, eps=FUSION_EPS), nn.Linear(both, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )
        self.channel = channel
        self.quantiser = None if quantiser.kind == "none" else TokenQuantiser(quantiser, llm_width)

    def forward(self, latents: Tensor) -> SharedTokens:
        """(n, C, 2 gh, 2 gw) -> tokens (n, N, D) in raster order, with their codes if there is a quantiser."""
        low_level = as_tokens(self.generation_embed(latents))
        tokens = self.channel(self.fusion(torch.cat([self.semantic_tokens(latents), low_level], dim=-1)))
        return SharedTokens(tokens) if self.quantiser is None else self.quantiser(tokens)

    def semantic_tokens(self, latents: Tensor) -> Tensor:
        """(n, C, 2 gh, 2 gw) -> (n, N, S)."""
        patches = self.understanding_embed(latents)
        return self.semantic(as_tokens(patches) + self.grid_positions(*patches.shape[2:]))

    def grid_positions(self, height: int, width: int) -> Tensor:
        """(1, N, S): the position table, interpolated bicubically unless the grid is its own."""
        side = math.isqrt(self.positions.num_embeddings)
        table = self.positions.weight
        if (height, width) == (side, side):
            return table.unsqueeze(0)
        square = table.T.reshape(1, -1, side, side)
        return as_tokens(F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False))


def _patch_embedding(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
    nn.init.xavier_uniform_(conv.weight.data.flatten(1))
    nn.init.zeros_(conv.bias)
    return conv


def as_tokens(grid: Tensor) -> Tensor:
    """(n, width, gh, gw) -> (n, N, width)."""
    return grid.flatten(2).transpose(1, 2)
