"""MAR (Li et al. 2024, arXiv 2406.11838): its encoder sees only visible tokens, its decoder fills a canvas.

The encoder is the visual tokenizer that understanding and generation share. Shapes: B batch, L = h*w grid places,
R buffers, K visible tokens, C token channels, D encoder width, E decoder width.
"""

import torch
from torch import Tensor, nn

from infotok_lit.models.common.token_grid import Grid
from infotok_lit.models.harmon.config import MARConfig
from infotok_lit.models.harmon.vit import (
    LAYER_NORM_EPS,
    Transformer,
    init_linears,
    position_table,
    resize_positions,
)


class MAREncoder(nn.Module):
    """Visible latent tokens and buffers -> shared tokens."""

    def __init__(self, config: MARConfig, channels: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.num_buffers = config.num_buffers
        self.default_grid = config.default_grid
        self.token_embed = nn.Linear(channels, width)
        self.buffer_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.positions = position_table(config.num_buffers + _area(config.default_grid), width)
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = Transformer(
            width, config.encoder_depth, config.encoder_heads, config.mlp_ratio, config.dropout
        )
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
            canvas = gather_rows(canvas, with_buffers(visible, self.num_buffers))
        return self.transformer(canvas)


class MARDecoder(nn.Module):
    """Visible shared tokens -> one condition vector for every place of the grid."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        width, area = config.decoder_width, _area(config.default_grid)
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
        length = self.num_buffers + _area(grid)
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


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of x (B, N, D): (B, K, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def places_where(mask: Tensor) -> Tensor:
    """Places (B, K) where mask (B, L) is true, in raster order; every row must have the same number K."""
    return mask.nonzero()[:, 1].view(mask.shape[0], -1)


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]
