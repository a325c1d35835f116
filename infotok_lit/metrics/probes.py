"""How many bits about a known quantity Y can be read off features Z: a lower bound on I(Z; Y).

For any q(Y | Z) that was fitted on other samples, I(Z; Y) >= E log2 q(Y | Z) / p(Y) (Barber and Agakov, 2003): H(Y)
minus the cross entropy of q. Where p(Y) is known exactly, the mean of the log ratio over unseen samples estimates the
bound without bias. Every q here contains p, so it starts at 0 bits and stays there if Z says nothing.

Shapes: n samples, F features, k coordinates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEARNING_RATE, BATCH, EPOCHS, PATIENCE = 1e-2, 100, 150, 15
RIDGE_STRENGTHS = tuple(10.0**power for power in range(-2, 7))


class Split(NamedTuple):
    """Which samples serve what; nothing of a later part is seen by an earlier one."""

    train: slice
    """Fits weights."""
    tune: slice
    """Stops training, chooses the ridge, and calibrates."""
    test: slice
    """Measures."""

    @classmethod
    def of(cls, train: int, test: int) -> "Split":
        """The first `train` samples to fit, a fifth of them to tune; the next `test` to measure."""
        fitted = train - train // 5
        return cls(slice(0, fitted), slice(fitted, train), slice(train, train + test))


@dataclass(frozen=True)
class Bits:
    """A mean over unseen samples."""

    mean: float
    error: float
    """Standard error of the mean."""

    @classmethod
    def of(cls, per_sample: Tensor, surprise: Tensor | None = None, entropy: float = 0.0) -> "Bits":
        """(n,) bits -> their mean.

        Args:
            surprise: (n,) -log2 p(Y), whose exact mean is `entropy`: a control variate. Without it the number of
                objects that the unseen scenes happen to have would be most of the error.
        """
        if surprise is not None:
            luck = surprise - entropy
            slope = torch.cov(torch.stack([per_sample, luck]))[0, 1] / luck.var().clamp(min=1e-9)
            per_sample = per_sample - slope * luck
        return cls(per_sample.mean().item(), per_sample.std().item() / math.sqrt(len(per_sample)))


def coordinates(features: Tensor, split: Split) -> Tensor:
    """(n, F) -> (n, k) float32: standardised features along the principal axes of the training samples.

    All axes are kept, so a linear probe of the coordinates is a linear probe of the features; features that never
    change in training are left out.
    """
    features = features.float()
    train = features[split.train]
    spread = train.std(0)
    varying = spread > 1e-6 * spread.max()
    standard = (features[:, varying] - train[:, varying].mean(0)) / spread[varying]
    if not varying.any():
        return features.new_zeros(len(features), 1)
    turned = standard @ _principal_axes(standard[split.train])
    return turned / turned[split.train].std()


def _principal_axes(rows: Tensor) -> Tensor:
    """(m, F) -> (F, min(m, F)), orthonormal columns."""
    if len(rows) > rows.shape[1]:
        return torch.linalg.eigh(rows.T.double() @ rows.double()).eigenvectors.to(rows.dtype)
    return torch.linalg.svd(rows, full_matrices=False)[2].T


def ridge(inputs: Tensor, targets: Tensor, split: Split) -> Tensor:
    """Linear predictions (n, K) of targets with a known mean of 0; all 0 if nothing helps on the tuning samples.

    Args:
        inputs: (n, k) from `coordinates`, which are uncorrelated in training, so that each has its own weight.
        targets: (n, K); only those of training and tuning samples are looked at.
    """
    train = inputs[split.train]
    energy, shares = train.square().sum(0)[:, None], train.T @ targets[split.train]
    best = torch.zeros_like(targets)
    least = targets[split.tune].square().mean()
    for strength in RIDGE_STRENGTHS:
        predicted = inputs @ (shares / (energy + strength))
        error = (predicted - targets)[split.tune].square().mean()
        if error < least:
            best, least = predicted, error
    return best


def classify(
    inputs: Tensor,
    log_ratio: Callable[[Tensor, slice | Tensor], Tensor],
    num_logits: int,
    split: Split,
    hidden: int = 0,
    seed: int = 0,
) -> Tensor:
    """Train a probe by Adam, keep for each part what is best on the tuning samples, and measure.

    Args:
        inputs: (n, k) coordinates.
        log_ratio: (logits (m, num_logits), which samples) -> (m, parts): log q(Y | Z) - log p(Y) in nats of each part
            of Y; 0 for logits of 0.
        hidden: width of one hidden layer; 0 for a linear probe.

    Returns:
        (test samples, parts) nats.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = _probe(inputs.shape[1], hidden, num_logits, generator)
    optimiser = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE / (10 if hidden else 1))
    train = torch.arange(len(inputs))[split.train]
    best = log_ratio(probe(inputs[split.test]).detach(), split.test)
    most, since = torch.zeros_like(best[0]), 0
    for _ in range(EPOCHS):
        for chosen in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            optimiser.zero_grad()
            (-log_ratio(probe(inputs[chosen]), chosen).sum(1).mean()).backward()
            optimiser.step()
        with torch.no_grad():
            tuned = log_ratio(probe(inputs[split.tune]), split.tune).mean(0)
            better = tuned > most
            since += 1
            if better.any():
                best = torch.where(better, log_ratio(probe(inputs[split.test]), split.test), best)
                most, since = torch.maximum(tuned, most), 0
        if since == PATIENCE:
            break
    return best


def calibrate(log_ratio: Callable[[Tensor], Tensor], start: tuple[float, ...]) -> Tensor:
    """The few parameters that maximise the mean of a log ratio, in float64; `start`, if they do no better.

    Args:
        log_ratio: parameters -> log q(Y | Z) - log p(Y) of the tuning samples, any shape.
    """
    first = torch.tensor(start, dtype=torch.float64)
    parameters = first.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -log_ratio(parameters).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = parameters.detach()
    better = found.isfinite().all() and log_ratio(found).mean() > log_ratio(first).mean()
    return found if better else first


def _probe(width: int, hidden: int, num_logits: int, generator: torch.Generator) -> nn.Module:
    last = nn.Linear(hidden or width, num_logits)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if not hidden:
        return last
    first = nn.Linear(width, hidden)
    nn.init.normal_(first.weight, std=width**-0.5, generator=generator)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.GELU(), last)
