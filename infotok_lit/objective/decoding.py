"""What the two decoders of sufficiency share: tokens as a memory with places, and layers that attend to it."""

import torch
from torch import Tensor, nn

from infotok_lit.objective.config import DecoderConfig
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.positions import grid_positions


class TokenMemory(nn.Module):
    """Z~ (B, N, d) -> (B, N, width), each token marked with its place in the canvas.

    Grid places are sine-cosine vectors, hence any grid; places without a position are learned.

    Args:
        latent_width: d.
        width: decoder width.
        num_extra: places without a position.
    """

    def __init__(self, latent_width: int, width: int, num_extra: int) -> None:
        super().__init__()
        self.width = width
        self.content = nn.Linear(latent_width, width)
        # As long as a sine-cosine vector, whose entries have a mean square of 1/2.
        self.extra_places = nn.Parameter(torch.randn(num_extra, width) / 2**0.5) if num_extra else None
        self.norm = nn.LayerNorm(width)

    def forward(self, sample: Tensor, inputs: BranchInputs) -> Tensor:
        places = grid_positions(inputs.grid, self.width, sample.device)
        if self.extra_places is not None:
            places = torch.cat([self.extra_places, places])
        return self.norm(self.content(sample) + places[inputs.token_index])


class MemoryReader(nn.Module):
    """Pre-norm transformer layers over (B, S, width) queries that also attend to a memory (B, N, width)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                config.width,
                config.heads,
                dim_feedforward=4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, queries: Tensor, memory: Tensor, causal: bool) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(queries.shape[1], queries.device) if causal else None
        for layer in self.layers:
            queries = layer(queries, memory, tgt_mask=mask, tgt_is_causal=causal)
        return self.norm(queries)
