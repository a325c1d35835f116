"""The block-causal transformer that gathers a clip's information into the tokens to be kept, and spreads it again.

A token attends to all tokens of its own and of earlier latent frames. Positions are two-dimensional rotary ones within
a frame. Queries, keys and values pass the same projection twice, with the rotation in between: that is how the official
code came to use a stock attention layer, and its weights ask for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]
"""Latent frames, rows and columns of a clip's tokens."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + gated MLP(norm(x))."""

    def __init__(self, width: int, mlp_width: int, num_heads: int, rotary_base: float, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = DoubleProjectionAttention(width, num_heads, rotary_base)
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = GatedMlp(width, mlp_width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, t h w, width) -> the same."""
        tokens = tokens + self.attention(self.attention_norm(tokens), grid)
        return tokens + self.mlp(self.mlp_norm(tokens))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), without bias."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))


class DoubleProjectionAttention(nn.Module):
    """Block-causal attention whose projection is applied before and after the rotation."""

    def __init__(self, width: int, num_heads: int, rotary_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rotary_base = rotary_base
        self.in_projection = nn.Linear(width, 3 * width)
        self.out_projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, t h w, width) -> the same."""
        frames, height, width = grid
        query, key, value = self.in_projection(tokens).chunk(3, dim=-1)
        angles = rotary_angles(height, width, tokens.shape[-1] // self.num_heads, self.rotary_base, tokens.device)
        angles = angles.repeat(frames, 1)
        query, key = self._rotated(query, angles), self._rotated(key, angles)
        weights, biases = self.in_projection.weight.chunk(3), self.in_projection.bias.chunk(3)
        query, key, value = (
            self._split(F.linear(*inputs)) for inputs in zip((query, key, value), weights, biases, strict=True)
        )
        # A frame at a time: no mask has to be held, which for a clip of 33 x 256 x 256 pixels has 85 million entries.
        per_frame = height * width
        attended = [
            F.scaled_dot_product_attention(query[:, :, end - per_frame : end], key[:, :, :end], value[:, :, :end])
            for end in range(per_frame, frames * per_frame + 1, per_frame)
        ]
        return self.out_projection(torch.cat(attended, dim=2).transpose(1, 2).flatten(2))

    def _rotated(self, tokens: Tensor, angles: Tensor) -> Tensor:
        return rotate(self._split(tokens), angles).transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, width) -> (B, heads, N, head width)."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def rotary_angles(height: int, width: int, head_width: int, base: float, device: torch.device) -> Tensor:
    """The angles (h w, head_width / 2) by which pairs of channels turn at each place of a frame, in float32.

    Of the frequencies base^(-2i / head_width), the even-numbered ones turn with the row and come first, the
    odd-numbered ones turn with the column.
    """
    frequencies = base ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    by_row = torch.outer(torch.arange(height, device=device).float(), frequencies[0::2])
    by_column = torch.outer(torch.arange(width, device=device).float(), frequencies[1::2])
    rows = by_row[:, None].expand(-1, width, -1)
    columns = by_column[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of (..., N, head width) by (N, head width / 2)."""
    even, odd = heads[..., 0::2], heads[..., 1::2]
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
