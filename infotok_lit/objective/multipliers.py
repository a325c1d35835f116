"""How the weight lambda of the objective moves during training: a function of the global (optimiser) step.

A new schedule is a callable step -> factor and one line in `build_multiplier`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from infotok_lit.objective.config import ObjectiveConfig

Multiplier = Callable[[int], float]
"""Global step -> factor on lambda, and so on every term of both branches."""


@dataclass(frozen=True)
class Constant:
    """Lambda as configured, from the first step."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Warmup:
    """Linear from 0 at step 0 to 1 at `steps`: fresh heads send noise into a trained encoder, so they start quietly."""

    steps: int

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.steps)


def build_multiplier(config: ObjectiveConfig) -> Multiplier:
    """The schedule that the config names."""
    return Warmup(config.warmup_steps) if config.multiplier == "warmup" else Constant()
