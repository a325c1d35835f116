"""An optional quantiser of the shared tokens.

The InfoTok paper calls Show-o2's tokenizer discrete; the official code feeds it continuous latents, and has none of
this. With a quantiser, everything behind the encoder, the objective's Gaussian posterior included, sees the quantised
embeddings; gradients pass straight through.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

from infotok_lit.models.showo2.config import QuantiserConfig


class SharedTokens(NamedTuple):
    """What leaves the visual encoder."""

    tokens: Tensor
    """(n, N, D)."""
    codes: Tensor | None = None
    """(n, N) int64: the code of each token, None for continuous tokens."""
    loss: Tensor | None = None
    """Scalar: what the quantiser itself asks to be minimised, already weighted."""


class TokenQuantiser(nn.Module):
    """Continuous tokens -> the nearest of a finite number of embeddings."""

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
        return SharedTokens(quantised.to(tokens.dtype), codes.long(), loss[0].sum() if loss else None)


def build_codebook(config: QuantiserConfig, width: int) -> nn.Module:
    """The library's quantiser of a configuration."""
    if config.kind == "fsq":
        return FSQ(levels=list(config.levels), dim=width)
    if config.kind == "lfq":
        return LFQ(
            dim=width,
            codebook_size=config.codebook_size,
            entropy_loss_weight=config.entropy_weight,
            commitment_loss_weight=config.commitment_weight,
        )
    return VectorQuantize(
        dim=width,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_width,
        commitment_weight=config.commitment_weight,
        kmeans_init=True,
    )
