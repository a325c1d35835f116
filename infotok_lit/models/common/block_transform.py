"""A stand-in for an image autoencoder without weights: the transform of the embedded sizes of every family.

Images are (B, 3, height, width) in [-1, 1]; latents are (B, C, h, w).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockTransform(nn.Module):
    """Orthonormal discrete cosine transform of square blocks: no weights, nothing to train.

    Keeping fewer frequencies than pixels projects each block on its lowest ones.

    Args:
        block_size: pixels per side of a block.
        kept: how many of the lowest frequencies per axis are kept; block_size keeps everything.
    """

    def __init__(self, block_size: int, kept: int) -> None:
        super().__init__()
        if not 1 <= kept <= block_size:
            raise ValueError(f"autoencoder.kept must be in [1, {block_size}], the block size; got {kept}")
        frequency, pixel = torch.arange(kept).unsqueeze(1), torch.arange(block_size)
        basis = torch.cos(math.pi * (2 * pixel + 1) * frequency / (2 * block_size)) * math.sqrt(2 / block_size)
        basis[0] = math.sqrt(1 / block_size)
        atoms = torch.einsum("ai,bj->abij", basis, basis).reshape(kept**2, 1, block_size, block_size)
        self.stride = block_size
        self.channels = 3 * kept**2
        # One group per colour, so channels are (colour, vertical frequency, horizontal frequency).
        self.register_buffer("atoms", atoms.repeat(3, 1, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, 3 kept^2, height / block_size, width / block_size)."""
        return F.conv2d(images, self.atoms, stride=self.stride, groups=3)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 kept^2, h, w) -> (B, 3, h block_size, w block_size), not clamped."""
        return F.conv_transpose2d(latents, self.atoms, stride=self.stride, groups=3)
