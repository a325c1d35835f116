"""Compactness C_b (Eq. 7): shared tokens -> a Gaussian posterior, and its rate, an upper bound on I(Z~; I).

Shapes: B images, N tokens, D token width, d latent width. Everything is float32, whatever autocast says.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.errors import SettingsError
from infotok_lit.objective.term import TermNats

INITIAL_STD_RANGE = (0.005, 1.0)
LOG_VARIANCE_RANGE = (-12.0, 6.0)
"""Standard deviations from 0.0025 to 20: below, exp and the KL lose digits; above, a sample is noise alone."""


@dataclass(frozen=True)
class ProjectionConfig:
    """The task projection f_b (Eq. 4). The inline bottleneck uses `initial_std` only.

    Args:
        kind: `mlp` and `linear` map tokens to means and log variances; `identity` keeps the tokens as means and learns
            the log variances only, so that the rate binds the shared tokens themselves.
        hidden_width: Width h of the hidden layer; `mlp` only.
        latent_width: Width d of the projected tokens; `mlp` and `linear` only (`identity` keeps the token width).
        initial_std: Standard deviation of the posterior at the start, in units of the prior's. Narrow, so that the
            decoders see the tokens before the noise: one that starts at the prior teaches them to ignore the tokens.
    """

    kind: Literal["mlp", "linear", "identity"] = "mlp"
    hidden_width: int = 256
    latent_width: int = 64
    initial_std: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "linear", "identity"):
            raise SettingsError(f"projection.kind: {self.kind!r} is not known; choose out of mlp, linear, identity.")
        for name in ("hidden_width", "latent_width"):
            if getattr(self, name) < 1:
                raise SettingsError(f"projection.{name} is {getattr(self, name)}; set it to 1 or more.")
        low, high = INITIAL_STD_RANGE
        if not low <= self.initial_std <= high:
            raise SettingsError(f"projection.initial_std is {self.initial_std}; set it between {low} and {high}.")


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(log_variance)) per token and dimension; both (B, N, d) float32 (section 3.2.3).

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


class Projection(nn.Module):
    """f_b: (B, N, D) -> posterior over (B, N, d). Light, deterministic, training-only.

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
        self.config = config
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


class InlineBottleneck:
    """Z -> Z + std(Z) * noise on the tokens that the model itself consumes, for one forward pass of one branch.

    Args:
        projection: an `identity` projection with variance.
        noise: (B, N, D) standard normal; drawn if not given.

    Attributes:
        posterior: that of the tokens it was called with; None before.
        tokens: these in float32, from which terms are computed; None before.
    """

    def __init__(self, projection: Projection, noise: Tensor | None = None) -> None:
        self.projection = projection
        self.noise = noise
        self.posterior: Posterior | None = None
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), same dtype."""
        with torch.autocast(tokens.device.type, enabled=False):
            self.tokens = tokens.float()
            self.posterior = self.projection(self.tokens)
            return self.posterior.rsample(self.noise).to(tokens.dtype)


def compactness(kl: Tensor, free_nats: float = 0.0) -> TermNats:
    """(B, N, d) nats per token and dimension -> nats per image, summed over the tokens that are present and d.

    Args:
        free_nats: what a token may carry before it costs anything (free bits, Kingma et al. 2016, per token); a token
            below costs this much and has no gradient.
    """
    elements = torch.full_like(kl[:, 0, 0], kl[0].numel(), dtype=torch.int64)
    return TermNats(kl.sum(2).clamp(min=free_nats).sum(1), elements)


def soft_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Values kept within [low, high], nearly unchanged inside, with a gradient that fades but never stops outside."""
    below_high = high - F.softplus(high - value)
    return low + F.softplus(below_high - low)


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
