"""How much of a loss reaches each part of a model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def part_gradient_norms(loss: Tensor, model: nn.Module, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """|| d loss / d part ||, over this process's batch; it keeps the graph for the step's own backward pass.

    One more backward pass through what lies before the loss, so meant for the steps that log. A loss that is
    collective (alignment) needs all ranks to call this at the same step.

    Args:
        loss: scalar with its graph.
        parts: name -> prefixes of parameter names.

    Returns:
        part -> scalar; 0 where the loss does not reach the part, or the part is frozen.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: list[Tensor | None] = [None] * len(named)
    if named and loss.requires_grad:
        found = list(torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True))
    norms = {}
    for part, prefixes in parts.items():
        reached = [
            gradient
            for name, gradient in zip(named, found, strict=True)
            if gradient is not None and name.startswith(prefixes)
        ]
        norms[part] = torch.nn.utils.get_total_norm(reached).to(loss.device) if reached else loss.new_zeros(())
    return norms
