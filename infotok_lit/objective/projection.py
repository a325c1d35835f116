"""The task projection f_b (Eq. 4): shared tokens -> Gaussian posterior. Light, deterministic, training-only."""

import math

from torch import Tensor, nn

from infotok_lit.objective.config import ProjectionConfig
from infotok_lit.objective.posterior import LOG_VARIANCE_RANGE, Posterior, soft_clamp


class Projection(nn.Module):
    """(B, N, D) -> posterior over (B, N, d).

    `mlp`: LayerNorm, hidden layer, then means and log variances. `linear`: the same without the hidden layer.
    `identity`: the tokens themselves are the means (d = D), and only log variances are learned, from normed tokens.

    The log variance starts at the same narrow value everywhere (`initial_std`): a decoder that first meets tokens
    drowned in noise learns to do without them, the rate then has no counterweight, and the posterior collapses.

    Args:
        config: kind, widths and the initial standard deviation.
        token_width: D.
        with_variance: False builds the means alone, for terms that draw no sample.
    """

    def __init__(self, config: ProjectionConfig, token_width: int, with_variance: bool) -> None:
        super().__init__()
        identity = config.kind == "identity"
        self.latent_width = token_width if identity else config.latent_width
        feature_width = config.hidden_width if config.kind == "mlp" else token_width
        self.features = _features(config, token_width) if with_variance or not identity else None
        self.mean = None if identity else nn.Linear(feature_width, self.latent_width)
        self.log_variance = _constant_linear(feature_width, self.latent_width, config) if with_variance else None

    def forward(self, tokens: Tensor) -> Posterior:
        """(B, N, D) -> posterior (B, N, d); call it with autocast disabled."""
        tokens = tokens.float()
        features = tokens if self.features is None else self.features(tokens)
        mean = tokens if self.mean is None else self.mean(features)
        if self.log_variance is None:
            return Posterior(mean, None)
        return Posterior(mean, soft_clamp(self.log_variance(features), *LOG_VARIANCE_RANGE))


def _features(config: ProjectionConfig, token_width: int) -> nn.Module:
    norm = nn.LayerNorm(token_width)
    if config.kind != "mlp":
        return norm
    return nn.Sequential(norm, nn.Linear(token_width, config.hidden_width), nn.GELU())


def _constant_linear(width_in: int, width_out: int, config: ProjectionConfig) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, 2 * math.log(config.initial_std))
    return linear
