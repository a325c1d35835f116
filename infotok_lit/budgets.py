"""Token budgets: what share of its tokens each sample keeps, and which ones; for images and for videos.

The number of tokens should be proportional to the information in a sample, relative to what samples hold on average
(arXiv 2512.16975, section 3): rate_x = clip(base * complexity_x / E[complexity], 1/16, 1). The complexity of a video
clip is its reconstruction error with all tokens; that of an image may be the sum of its tokens' KL rates.

A mask is True where a token is kept, and carries no gradient.
"""

import torch
from torch import Tensor, nn

MIN_RATE = 1 / 16
FLEX_BASES = (1.0, 0.75, 0.5, 0.25)
"""The base rates that the paper's Flex training draws from."""
CONVERGED = 1 << 20
"""So many updates that the start of an average no longer counts."""


def budget_rate(
    complexity: Tensor, mean_complexity: Tensor | float, base: Tensor | float, steps: int | None = None
) -> Tensor:
    """The share of tokens that each sample keeps.

    Args:
        complexity: (B,), not negative.
        mean_complexity: what `complexity` is on average, a scalar.
        base: the rate of a sample of average complexity, a scalar or (B,).
        steps: round the rates to multiples of 1 / steps.

    Returns:
        (B,) in [1/16, 1].
    """
    rate = base * complexity / mean_complexity
    return (rate if steps is None else torch.round(rate * steps) / steps).clamp(MIN_RATE, 1.0)


def rates_with_mean(complexity: Tensor, mean_rate: float, steps: int = 60) -> Tensor:
    """Rates proportional to complexity whose mean is `mean_rate` also after they are clipped.

    That compares strategies at equal mean bits; `budget_rate` gives less where many rates are clipped at 1.

    Args:
        complexity: (B,), not negative and not all 0.
        mean_rate: in [1/16, 1].
        steps: of the bisection that finds the factor.

    Returns:
        (B,) in [1/16, 1].
    """
    share = (complexity / complexity.mean()).double()
    low, high = 0.0, 1.0 / float(share[share > 0].min())
    for _ in range(steps):
        middle = (low + high) / 2
        too_low = float(budget_rate(share, 1.0, middle).mean()) < mean_rate
        low, high = (middle, high) if too_low else (low, middle)
    return budget_rate(share, 1.0, high).to(complexity)


def block_rates(scores: Tensor, base: Tensor) -> Tensor:
    """Rates of the blocks of a sample, proportional to their mean score, with mean `base` before they are clipped.

    The spread is scaled down where a block would exceed 1, so that the mean stays.

    Args:
        scores: (B, T, ...), the scores of the tokens of T blocks.
        base: (B,), in (0, 1].

    Returns:
        (B, T) in [1/16, 1].
    """
    block = scores.flatten(2).mean(-1)
    base = base[:, None].to(block)
    weight = block / block.mean(-1, keepdim=True) - 1
    largest = weight.amax(-1, keepdim=True) + 1e-5
    scale = torch.minimum(largest, 1 / base - 1) / largest
    return (base * (1 + scale * weight)).clamp(MIN_RATE, 1.0)


def draw_bases(bases: tuple[float, ...], count: int, device: torch.device) -> Tensor:
    """(count,) base rates, drawn evenly from `bases` with torch's global generator."""
    return torch.tensor(bases, device=device)[torch.randint(len(bases), (count,)).to(device)]


class RunningMean(nn.Module):
    """An exponential average that starts from nothing, and the last values it took.

    The average starts at 0. Without bias correction, as in the official code, the first values of `mean` are far too
    small, so that the first samples all get rate 1.
    """

    value: Tensor
    history: Tensor
    updates: Tensor

    def __init__(self, factor: float = 0.95, bias_correction: bool = True, length: int = 128) -> None:
        """
        Args:
            factor: the share of the old average that each update keeps.
            bias_correction: divide by the weight that the updates so far have, as Adam does.
            length: how many values are remembered, the newest first.
        """
        super().__init__()
        self.factor = factor
        self.bias_correction = bias_correction
        self.register_buffer("value", torch.zeros(1))
        self.register_buffer("history", torch.zeros(length))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, observed: Tensor) -> None:
        """Take in a value (a scalar), the same on all processes; one that is not finite counts as the mean."""
        observed = torch.where(observed.isfinite(), observed, self.mean[0])
        self.value.mul_(self.factor).add_((1 - self.factor) * observed)
        self.history.copy_(self.history.roll(1))
        self.history[0] = observed
        self.updates += 1

    @property
    def mean(self) -> Tensor:
        """(1,): the average; 0 before the first update."""
        if not self.bias_correction:
            return self.value.clone()
        seen = 1 - self.factor**self.updates
        return torch.where(self.updates > 0, self.value / seen, self.value)

    @torch.no_grad()
    def take_over(self) -> None:
        """Go on from a value that came without the number of its updates: as an average that has converged."""
        self.updates.copy_(CONVERGED * (self.value != 0)[0])

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the mean and forget its start, so that another factor reads the same mean out of this state."""
        self.value.copy_(self.mean)
        self.take_over()


# Which tokens are kept


def kept_count(rate: Tensor, length: int) -> Tensor:
    """How many of `length` tokens the official video tokenizer keeps: one less than one might think at rate 1.

    Args:
        rate: (B,) in [0, 1].

    Returns:
        (B,) int64: length - 1 - floor((1 - rate) (length - 1)).
    """
    return length - 1 - torch.floor((1 - rate) * (length - 1)).long()


def nearest_count(share: Tensor, length: int) -> Tensor:
    """How many of `length` tokens are nearest to a share (B,) in (0, 1] of them, at least one: (B,) int64."""
    return torch.round(share * length).long().clamp(min=1)


def keep_top(scores: Tensor, count: Tensor) -> Tensor:
    """Keep the tokens with the highest scores; of equal ones, the first.

    The official code keeps what is strictly above a threshold. That is the same without ties, but drops all of the tied
    tokens at the threshold: on a clip that never changes, nearly everything.

    Args:
        scores: (B, N).
        count: (B,) int64, how many to keep.

    Returns:
        (B, N) bool with exactly `count` True in a row.
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order).contiguous())
    return rank < count[:, None]


def keep_first(rate: Tensor, length: int, stride: int = 1) -> Tensor:
    """Keep the first tokens of each block, whatever they hold: the ablations R2L (stride 1) and Jump of the paper.

    Args:
        rate: (..., T), the rate of each of T blocks.
        length: tokens per block; a multiple of `stride`.
        stride: the kept tokens are dealt out over the block in steps of length / stride.

    Returns:
        (..., T, length) bool: position i of a block is kept if i <= rate * length, before dealing out.
    """
    places = torch.arange(length, device=rate.device)
    kept = places <= rate[..., None] * length
    return kept.unflatten(-1, (stride, -1)).transpose(-1, -2).flatten(-2)


def keep_spread(count: Tensor, length: int) -> Tensor:
    """Keep tokens in equal steps, whatever they hold.

    Args:
        count: (B,) int64, how many of `length` to keep.

    Returns:
        (B, length) bool with exactly `count` True in a row.
    """
    steps = torch.arange(length + 1, device=count.device) * count[:, None] // length
    return steps[:, 1:] > steps[:, :-1]
