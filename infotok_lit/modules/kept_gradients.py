"""One branch's backward pass before the next one's forward pass, so that only one branch's activations are held.

Clipping, accumulation, DDP and a GradScaler know one backward pass a step, and that stays so. Every pass over a branch
but the last is differentiated as soon as it is made, and its gradients are kept aside. In the one backward pass, which
is through the last branch's graph, a zero in the loss hands them out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infotok_lit.errors import SettingsError


class KeptGradients:
    """The gradients of one step's passes so far: 4 bytes for each trained weight that they reach.

    Args:
        parameters: where gradients are asked for; those that are not trained are left out.
        scale: of `backward_scale`: what reads gradients in a backward pass is to meet them scaled as ever, and without
            a GradScaler's scale small ones of a float16 model would be rounded to zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
        self.scale = scale
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._kept: dict[nn.Parameter, Tensor] = {}

    def take(self, parts: Mapping[str, Tensor], units: Iterable[Tensor]) -> dict[str, Tensor]:
        """Differentiate the sum of some summands of the loss, which frees its graph.

        Args:
            parts: name -> scalar with its graph.
            units: further leaves, which are given their gradients at once.

        Returns:
            name -> the value, without a graph.
        """
        total, units = torch.stack(list(parts.values())).sum(), list(units)
        if total.requires_grad:
            # A training step is under autocast, which would differentiate in 16 bits what was computed in 32.
            with torch.autocast(total.device.type, enabled=False):
                leaves = [*units, *self._parameters]
                gradients = torch.autograd.grad(total, leaves, self.scale, allow_unused=True)
            for unit, gradient in zip(units, gradients, strict=False):
                unit.grad = gradient
            for parameter, gradient in zip(self._parameters, gradients[len(units) :], strict=True):
                if gradient is not None:
                    # Not in place: two parameters that are added up have one gradient.
                    before = self._kept.get(parameter)
                    self._kept[parameter] = gradient if before is None else before + gradient
        return {name: value.detach() for name, value in parts.items()}

    def rest(self) -> dict[str, Tensor]:
        """What is still to be added to the loss: a scalar 0 whose gradients are all that was taken, forgotten here.

        Ask for it after the last forward pass: what is made last is differentiated first, so the kept gradients lie
        where others are added to them before any of these exists. Empty where nothing was taken.
        """
        kept, self._kept = self._kept, {}
        return {"kept": _HandOut.apply(list(kept.values()), self.scale, *kept)} if kept else {}


class _HandOut(torch.autograd.Function):
    """Zero, with given gradients; differentiable once."""

    @staticmethod
    def forward(ctx: Any, kept: list[Tensor], scale: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kept, ctx.scale = kept, scale
        return torch.zeros_like(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, found = gradient / ctx.scale, []
        while ctx.kept:
            # One after another, so that no two copies of all are held.
            found.append(ctx.kept.pop() * factor)
        return None, None, *reversed(found)


def backward_scale(trainer: pl.Trainer) -> Tensor:
    """What Lightning makes of a loss's gradient 1, a scalar: a GradScaler's scale over the accumulated batches.

    Nothing is read from the device.
    """
    one = torch.ones((), device=trainer.strategy.root_device)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return (one if scaler is None else scaler.scale(one)) / trainer.accumulate_grad_batches


def refuse_sharding(strategy: Strategy) -> None:
    """SettingsError for a strategy whose parameters are gathered only while a module computes."""
    if isinstance(strategy, ModelParallelStrategy):
        raise SettingsError(
            "model.backward_per_branch cannot work with trainer/fsdp, which hands gradients on in the one backward "
            "pass of a step: take one of the two out; model.activation_checkpointing saves memory with trainer/fsdp"
        )
