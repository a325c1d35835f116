"""The shared visual encoder: a semantic and a low-level path over latents, fused into one set of tokens.

Shapes: n images, C latent channels, grid (gh, gw) of N = gh gw tokens, S semantic width, D language-model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from infotok_lit.models.showo2.config import PATCH_SIZE, QuantiserConfig, SemanticConfig
from infotok_lit.models.showo2.quantiser import SharedTokens, TokenQuantiser

FUSION_EPS = 1e-6


class DualPathEncoder(nn.Module):
    """Latents, clean or noisy -> the shared visual tokens of understanding and generation."""

    def __init__(self, config: SemanticConfig, quantiser: QuantiserConfig, channels: int, llm_width: int) -> None:
        super().__init__()
        self.understanding_embed = _patch_embedding(channels, config.width)
        self.generation_embed = _patch_embedding(channels, llm_width)
        self.positions = nn.Embedding(config.table_side**2, config.width)
        self.semantic = build_semantic_layers(config)
        both = config.width + llm_width
        self.fusion = nn.Sequential(
            Qwen2RMSNorm(both, eps=FUSION_EPS), nn.Linear(both, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )
        self.quantiser = None if quantiser.kind == "none" else TokenQuantiser(quantiser, llm_width)
        self.activation_checkpointing = False

    def forward(self, latents: Tensor) -> SharedTokens:
        """(n, C, 2 gh, 2 gw) -> tokens (n, N, D) in raster order, with their codes if there is a quantiser."""
        low_level = _as_tokens(self.generation_embed(latents))
        tokens = self.fusion(torch.cat([self.semantic_tokens(latents), low_level], dim=-1))
        return SharedTokens(tokens) if self.quantiser is None else self.quantiser(tokens)

    def semantic_tokens(self, latents: Tensor) -> Tensor:
        """(n, C, 2 gh, 2 gw) -> (n, N, S)."""
        patches = self.understanding_embed(latents)
        tokens = _as_tokens(patches) + self.grid_positions(*patches.shape[2:])
        for layer in self.semantic.layers:
            if self.activation_checkpointing and tokens.requires_grad:
                tokens = checkpoint(layer, tokens, None, use_reentrant=False)
            else:
                tokens = layer(tokens, None)
        return tokens

    def grid_positions(self, height: int, width: int) -> Tensor:
        """(1, N, S): the position table, interpolated bicubically unless the grid is its own."""
        side = math.isqrt(self.positions.num_embeddings)
        table = self.positions.weight
        if (height, width) == (side, side):
            return table.unsqueeze(0)
        square = table.T.reshape(1, -1, side, side)
        return _as_tokens(F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False))


def build_semantic_layers(config: SemanticConfig) -> SiglipEncoder:
    """SigLIP's encoder layers with fresh weights."""
    return SiglipEncoder(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            layer_norm_eps=config.layer_norm_eps,
            attn_implementation="sdpa",
        )
    )


def _patch_embedding(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
    nn.init.xavier_uniform_(conv.weight.data.flatten(1))
    nn.init.zeros_(conv.bias)
    return conv


def _as_tokens(grid: Tensor) -> Tensor:
    """(n, width, gh, gw) -> (n, N, width)."""
    return grid.flatten(2).transpose(1, 2)
