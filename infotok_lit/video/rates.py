"""Which share of its tokens each training clip keeps."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infotok_lit.budgets import (
    FLEX_BASES,
    MIN_RATE,
    RunningMean,
    block_rates,
    budget_rate,
    draw_bases,
    rates_with_mean,
)
from infotok_lit.errors import SettingsError
from infotok_lit.video.tokenizer import MaskKind

Strategy = Literal["elboema", "elbo", "uniform", "static"]


@dataclass(frozen=True)
class RateConfig:
    """How the rates of training clips are drawn, by the official names.

    Args:
        strategy: `elboema` is the paper's rule: a base rate times the clip's error over the running mean of errors.
            `elbo`, of the released configuration, comes down to the base rate alone, whatever the clip. `uniform` draws
            from [0, 1), and takes 1/16 at least. `static` keeps everything.
        bases: the base rates that are drawn from, evenly: the paper's Flex set; a single one for a fixed budget.
        mean_factor: what the running mean keeps of itself at each step: 0.99 in the paper, 0.95 in the official code.
        bias_correction: start the running mean without bias. The official code does not, so that its first clips all
            have rate 1.
        mask: which tokens are kept: the `map` of errors chooses; `first`, `jump` and `random` are controls.
    """

    strategy: Strategy = "elboema"
    bases: tuple[float, ...] = FLEX_BASES
    mean_factor: float = 0.99
    bias_correction: bool = True
    mask: MaskKind = "map"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", tuple(self.bases))
        if not self.bases or not all(MIN_RATE <= base <= 1 for base in self.bases):
            raise SettingsError(f"rates.bases must be between 1/16 and 1, got {list(self.bases)}")
        if not 0 <= self.mean_factor < 1:
            raise SettingsError(f"rates.mean_factor must be in [0, 1), got {self.mean_factor}")

    def running_mean(self) -> RunningMean:
        """A fresh running mean of the clips' errors."""
        return RunningMean(self.mean_factor, self.bias_correction)

    def draw(self, token_map: Tensor, complexity: RunningMean) -> Tensor:
        """Rates (B,) of clips with token maps (B, t, h, w), drawn with torch's global generator."""
        if self.strategy == "uniform":
            return torch.rand(len(token_map), device=token_map.device).clamp(min=MIN_RATE)
        if self.strategy == "static":
            return torch.ones(len(token_map), device=token_map.device)
        return self.at_base(token_map, draw_bases(self.bases, len(token_map), token_map.device), complexity)

    def at_mean(self, errors: Tensor, mean_rate: float) -> Tensor:
        """Rates (B,) of an evaluation set's clips with errors (B,), whose mean is `mean_rate` under every strategy."""
        if self.strategy == "elboema":
            return rates_with_mean(errors, mean_rate)
        return torch.full_like(errors, mean_rate)

    def at_base(self, token_map: Tensor, base: Tensor, complexity: RunningMean) -> Tensor:
        """Rates (B,) at base rates (B,) by `elbo` or `elboema`; `complexity` has taken in these clips already."""
        if self.strategy == "elbo":
            return block_rates(token_map, base).mean(-1)
        return budget_rate(token_map.flatten(1).mean(-1), complexity.mean, base)
