"""AdamW with the parameter groups of the official recipes, and warm-up followed by a cosine."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP_START = 1e-5
"""The warm-up begins at this fraction of the learning rate."""


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule.

    Args:
        lr: Learning rate of the base model. The InfoTok paper fine-tunes at a tenth of the official rate, which for
            Harmon is 1e-5.
        heads_lr: Learning rate of the training-only heads, which start from nothing.
        weight_decay: Decoupled weight decay of the parameters that the official recipe decays.
        betas: Decay rates of the two moments.
        warmup_steps: Optimiser steps of linear warm-up.
        final_factor: The cosine ends at this fraction of the learning rate, at `trainer.max_steps`.
    """

    lr: float = 1e-6
    heads_lr: float = 1e-4
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.lr < 0 or self.heads_lr < 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("optimiser: lr, heads_lr, weight_decay and warmup_steps must not be negative")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"optimiser.final_factor must be in [0, 1], got {self.final_factor}")


def build_optimiser(
    config: OptimiserConfig, base: nn.Module, heads: nn.Module, decays: Callable[[str, nn.Parameter], bool]
) -> AdamW:
    """AdamW over the trainable parameters: the base model's in a decayed and an undecayed group, and the heads'.

    Args:
        decays: whether a parameter of `base` decays, by name.

    Raises:
        ValueError: if nothing is trainable.
    """
    named = [(name, parameter) for name, parameter in base.named_parameters() if parameter.requires_grad]
    groups = [
        _group([p for name, p in named if decays(name, p)], config.lr, config.weight_decay),
        _group([p for name, p in named if not decays(name, p)], config.lr, 0.0),
        _group([p for p in heads.parameters() if p.ndim > 1], config.heads_lr, config.weight_decay),
        _group([p for p in heads.parameters() if p.ndim <= 1], config.heads_lr, 0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("nothing is trainable: `freeze` covers the whole model and no term builds a head")
    return AdamW(groups, betas=config.betas)


def warmup_cosine(optimiser: Optimizer, config: OptimiserConfig, max_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine that ends at step `max_steps`."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return WARMUP_START + (1 - WARMUP_START) * step / max(1, config.warmup_steps - 1)
        progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.final_factor + (1 - config.final_factor) * cosine

    return LambdaLR(optimiser, factor)


def freeze(module: nn.Module, prefixes: Iterable[str]) -> None:
    """Stop training every parameter whose name starts with one of the prefixes.

    Raises:
        ValueError: for a prefix that matches nothing.
    """
    for prefix in prefixes:
        matching = [parameter for name, parameter in module.named_parameters() if name.startswith(prefix)]
        if not matching:
            parts = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
            raise ValueError(f"freeze: no parameter starts with {prefix!r}; the model's parts are {', '.join(parts)}")
        for parameter in matching:
            parameter.requires_grad_(False)


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, object]:
    return {"params": parameters, "lr": lr, "weight_decay": weight_decay}
