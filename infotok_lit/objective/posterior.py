"""The diagonal Gaussian posterior q(Z~ | Z) of the tokens (section 3.2.3), in float32 whatever autocast says.

Shapes: B images, N tokens, d latent width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_VARIANCE_RANGE = (-12.0, 6.0)
"""Standard deviations from 0.0025 to 20: below, exp and the KL lose digits; above, a sample is noise alone."""


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(log_variance)) per token and dimension; both (B, N, d) float32.

    `log_variance` is None where only the mean is read (alignment alone); such a posterior has no sample and no rate.
    """

    mean: Tensor
    log_variance: Tensor | None

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """(B, N, d): mean + std * noise, with gradients into both; `noise` is standard normal, drawn if not given."""
        assert self.log_variance is not None, "a posterior without variance has no sample"
        noise = torch.randn_like(self.mean) if noise is None else noise.float()
        return self.mean + torch.exp(self.log_variance / 2) * noise

    def kl(self) -> Tensor:
        """(B, N, d): KL(q || N(0, 1)) in nats per token and dimension (the summand of Eq. 7)."""
        assert self.log_variance is not None, "a posterior without variance has no rate"
        # expm1(v) - v instead of exp(v) - 1 - v: near the prior the difference of large parts loses the small KL.
        return 0.5 * (self.mean.square() + torch.expm1(self.log_variance) - self.log_variance)


def soft_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Values kept within [low, high], nearly unchanged inside, with a gradient that fades but never stops outside."""
    below_high = high - F.softplus(high - value)
    return low + F.softplus(below_high - low)
