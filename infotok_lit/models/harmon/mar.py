"""MAR (Li et al. 2024, arXiv 2406.11838): its encoder sees only visible tokens, its decoder fills a canvas.

The encoder is the visual tokenizer that understanding and generation share. Parameter names inside a block are those of
timm's ViT, which official checkpoints use. Shapes: B batch, L = h*w grid places, R buffers, K visible tokens, N tokens,
C token channels, D encoder width, E decoder width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.models.common.channel import Channel
from infotok_lit.models.common.language_model import run_layers, take_rows
from infotok_lit.models.common.model_config import Grid
from infotok_lit.models.harmon.family import MARConfig

LAYER_NORM_EPS = 1e-6


class MAREncoder(nn.Module):
    """Visible latent tokens and buffers -> shared tokens."""

    def __init__(self, config: MARConfig, channel: Channel, channels: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.num_buffers = config.num_buffers
        self.default_grid = config.default_grid
        self.token_embed = nn.Linear(channels, width)
        self.buffer_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.positions = position_table(config.num_buffers + math.prod(config.default_grid), width)
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = Transformer(
            width, config.encoder_depth, config.encoder_heads, config.mlp_ratio, config.dropout
        )
        self.channel = channel
        init_linears(self)

    def forward(self, latents: Tensor, grid: Grid, visible: Tensor | None = None) -> Tensor:
        """Encode tokens.

        Args:
            latents: (B, L, C).
            grid: (h, w).
            visible: (B, K) places that are seen, in raster order; None shows everything.

        Returns:
            (B, R + K, D), buffers first.
        """
        embedded = self.token_embed(latents)
        buffers = self.buffer_token.expand(latents.shape[0], self.num_buffers, -1).to(embedded.dtype)
        canvas = torch.cat([buffers, embedded], dim=1)
        canvas = self.input_norm(canvas + resize_positions(self.positions, self.num_buffers, self.default_grid, grid))
        if visible is not None:
            canvas = take_rows(canvas, with_buffers(visible, self.num_buffers))
        return self.channel(self.transformer(canvas))


class MARDecoder(nn.Module):
    """Visible shared tokens -> one condition vector for every place of the grid."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        width, area = config.decoder_width, math.prod(config.default_grid)
        self.num_buffers = config.num_buffers
        self.default_grid = config.default_grid
        self.embed = nn.Linear(config.encoder_width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = position_table(config.num_buffers + area, width)
        self.transformer = Transformer(
            width, config.decoder_depth, config.decoder_heads, config.mlp_ratio, config.dropout
        )
        self.diffusion_positions = position_table(area, width)
        init_linears(self)

    def forward(self, tokens: Tensor, grid: Grid, visible: Tensor) -> Tensor:
        """Decode tokens.

        Args:
            tokens: (B, R + K, D), buffers first.
            grid: (h, w).
            visible: (B, K) the place of each token that is not a buffer.

        Returns:
            (B, L, E).
        """
        embedded = self.embed(tokens)
        length = self.num_buffers + math.prod(grid)
        canvas = self.mask_token.to(embedded.dtype).expand(tokens.shape[0], length, -1)
        places = with_buffers(visible, self.num_buffers).unsqueeze(-1).expand_as(embedded)
        canvas = canvas.scatter(1, places, embedded)
        canvas = canvas + resize_positions(self.positions, self.num_buffers, self.default_grid, grid)
        decoded = self.transformer(canvas)[:, self.num_buffers :]
        return decoded + resize_positions(self.diffusion_positions, 0, self.default_grid, grid)


def with_buffers(visible: Tensor, num_buffers: int) -> Tensor:
    """Places (B, K) on the grid -> places (B, R + K) on the canvas [buffers | grid]."""
    buffers = torch.arange(num_buffers, device=visible.device).expand(visible.shape[0], -1)
    return torch.cat([buffers, visible + num_buffers], dim=1)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with one fused projection [q; k; v]."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with an exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks and a final norm."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.norm(run_layers(self.blocks, x, recompute=self.activation_checkpointing))


def resize_positions(table: Tensor, num_extra: int, default_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A learned position table (1, num_extra + h0*w0, D) for another grid: (1, num_extra + h*w, D).

    Rows of extra tokens stay; the grid is resized bilinearly without antialiasing, as released weights expect.
    """
    if grid == default_grid:
        return table
    extra, places = table[:, :num_extra], table[:, num_extra:]
    image = places.transpose(1, 2).unflatten(2, default_grid)
    resized = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([extra, resized.flatten(2).transpose(1, 2)], dim=1)


def position_table(num_positions: int, width: int) -> nn.Parameter:
    """A fresh learned table (1, num_positions, width)."""
    return nn.Parameter(0.02 * torch.randn(1, num_positions, width))


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer, as MAR is initialised."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
