"""A visual encoder's last step, where its tokens are to carry so many bits and no more."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.errors import SettingsError


class Channel(nn.Module):
    """Shared tokens through a Gaussian channel of a known capacity; without a number of bits, as they are.

    Each token is divided by its root mean square, without a gain, and in training noise of one fixed variance s^2 is
    added to each of its numbers. Their mean square is 1, so whatever the encoder does, an image's tokens carry at most
    tokens x width x 1/2 log2(1 + 1 / s^2) bits (Shannon 1948), and s is what makes this the number given. Inference
    reads the tokens without noise, as it does after dropout. It has no weights.

    Args:
        bits: per image with all its tokens; None for no channel.
        tokens: N of a whole image.
        width: D.
    """

    def __init__(self, bits: float | None, tokens: int, width: int) -> None:
        super().__init__()
        if bits is not None and bits <= 0:
            raise SettingsError(f"capacity_bits is {bits}; set it above 0, or to null for no limit")
        self.width = width
        try:
            self.noise_std = None if bits is None else math.expm1(2 * math.log(2) * bits / (tokens * width)) ** -0.5
        except OverflowError:
            raise SettingsError(f"capacity_bits is {bits}, which is no limit; set it lower, or to null") from None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), same dtype."""
        if self.noise_std is None:
            return tokens
        sent = F.rms_norm(tokens.float(), (self.width,), eps=1e-6)
        received = sent + self.noise_std * torch.randn_like(sent) if self.training else sent
        return received.to(tokens.dtype)
