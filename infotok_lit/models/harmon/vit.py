"""The transformer block of MAR and its position tables.

Parameter names are those of timm's ViT block, which official checkpoints use. Shapes: B batch, N tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-6


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
        for block in self.blocks:
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.norm(x)


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
