"""The inline bottleneck: noise on the tokens that the model itself consumes."""

import torch
from torch import Tensor

from infotok_lit.objective.posterior import Posterior
from infotok_lit.objective.projection import Projection


class InlineBottleneck:
    """Z -> Z + std(Z) * noise, for one forward pass of one branch; it keeps the posterior for the objective.

    Args:
        projection: an `identity` projection with variance.
        noise: (B, N, D) standard normal; drawn if not given.
    """

    def __init__(self, projection: Projection, noise: Tensor | None = None) -> None:
        self.projection = projection
        self.noise = noise
        self.posterior: Posterior | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), same dtype."""
        with torch.autocast(tokens.device.type, enabled=False):
            self.posterior = self.projection(tokens)
            return self.posterior.rsample(self.noise).to(tokens.dtype)
