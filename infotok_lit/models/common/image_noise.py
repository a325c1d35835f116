"""The randomness of a drawn image."""

import torch
from torch import Tensor


class ImageNoise:
    """One generator per image, so that an image depends on its own seed alone and not on the rest of the batch."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        # Drawn on the CPU: the same seed gives the same picture on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(self.device)
