"""Dual ascent: a budget for the rate, or a target for sufficiency, instead of a fixed exchange rate.

Minimise the other terms subject to measured <= limit. The constrained term's factor is the Lagrange multiplier: it
rises while the limit is exceeded and falls while it is not, in the log, so that it stays positive.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infotok_lit.errors import SettingsError
from infotok_lit.objective.term import Term

RATE, SUFFICIENCY = "rate_bits_per_token", "sufficiency_nats_per_element"
"""Report names of the two quantities that can be constrained."""


@dataclass(frozen=True)
class DualConfig:
    """Dual ascent on `rate_budget_bits` or `sufficiency_target_nats`.

    Args:
        step_size: How far the log of the multiplier moves per optimiser step and unit of the gap, which is clipped to
            [-1, 1]. The gap is (rate - budget) / budget, or sufficiency - target in nats.
        lowest: The multiplier does not fall below.
        highest: The multiplier does not rise above.
    """

    step_size: float = 0.01
    lowest: float = 1e-3
    highest: float = 1e3

    def __post_init__(self) -> None:
        if self.step_size <= 0:
            raise SettingsError(f"dual.step_size is {self.step_size}; set it above 0.")
        if not 0 < self.lowest < self.highest:
            raise SettingsError(
                f"dual.lowest is {self.lowest} and dual.highest {self.highest}; set 0 < lowest < highest."
            )


class Constraint(nn.Module):
    """One constraint of one branch and its multiplier; all state is in buffers, hence in the checkpoint.

    The multiplier moves once per optimiser step, at the first training pass of the next step, by the mean over the
    step's passes (more than one where gradients are accumulated). The measured numbers are global, so all ranks move
    alike. Evaluation changes nothing.

    Args:
        term: the term whose factor is the multiplier.
        quantity: report name of what is limited.
        limit: in the unit of the quantity.
        start: the multiplier at the beginning.
        config: step size and range.
    """

    log_multiplier: Tensor
    gap_sum: Tensor
    passes: Tensor
    last_step: Tensor

    def __init__(self, term: Term, quantity: str, limit: float, start: float, config: DualConfig) -> None:
        super().__init__()
        self.term = term
        self.quantity = quantity
        self.limit = limit
        # A rate is a positive quantity whose size says little, so its gap is relative; nats may be negative.
        self.unit = limit if quantity == RATE else 1.0
        self.config = config
        self.register_buffer("log_multiplier", torch.tensor(math.log(start)))
        self.register_buffer("gap_sum", torch.tensor(0.0))
        self.register_buffer("passes", torch.tensor(0.0))
        self.register_buffer("last_step", torch.tensor(-1))

    def multiplier(self, step: int) -> Tensor:
        """The factor of the term at a step; training moves it first if the step is a new one."""
        if self.training:
            self._finish_step(step)
        return self.log_multiplier.exp()

    def observe(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reads what was measured, remembers it in training, and reports the gap in the quantity's own unit.

        A gap that is not finite does not count: the multiplier would never be finite again, in no checkpoint either.
        """
        gap = report[self.quantity] - self.limit
        if self.training:
            counts = gap.isfinite()
            self.gap_sum += torch.where(counts, (gap / self.unit).clamp(-1, 1), 0.0)
            self.passes += counts
        return {"constraint_gap": gap, "constraint_multiplier": self.log_multiplier.exp()}

    def _finish_step(self, step: int) -> None:
        new = self.last_step != step
        mean_gap = self.gap_sum / self.passes.clamp(min=1)
        low, high = math.log(self.config.lowest), math.log(self.config.highest)
        moved = (self.log_multiplier + self.config.step_size * mean_gap).clamp(low, high)
        self.log_multiplier.copy_(torch.where(new, moved, self.log_multiplier))
        self.gap_sum.mul_(~new)
        self.passes.mul_(~new)
        self.last_step.fill_(step)
