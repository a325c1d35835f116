"""How far the losses reach: norms and cosines of gradients, for the steps that log.

Everything keeps the graph for the step's own backward pass and is over this process's batch. Alignment is collective:
with several processes, all of them must call these at the same step.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.report import gradient_norms
from infotok_lit.objective.term import BranchObjective


class GradientWatch:
    """Collects what a step that logs is to say of gradients; some of it is known only after the backward pass."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def watch(self, branch: Branch, base: UnifiedModel, result: BranchResult, scale: float) -> None:
        """Norms of d loss / d Z, of each term and of all; and norms at the parts of the model.

        Args:
            scale: what the gradient of the backward pass is to be multiplied by: the accumulated batches.
        """
        objective, tokens, found = result.objective, result.output.tokens, self._found
        if objective.terms:
            for term, norm in gradient_norms(objective.terms, objective.tokens).items():
                found[f"train/{branch}/token_gradient/{term}"] = norm
            for part, norm in part_gradient_norms(objective.loss, base, base.parts).items():
                found[f"train/{branch}/part_gradient/{part}"] = norm
        if tokens.requires_grad:
            total = f"train/{branch}/token_gradient/total"
            tokens.register_hook(lambda gradient: found.update({total: scale * gradient.float().norm()}))

    def watch_encoder(self, branch: Branch, base: UnifiedModel, result: BranchResult, task: Tensor) -> None:
        """What the terms ask of the encoder against the task's weighted loss; costs a backward pass of the task."""
        if result.objective.terms:
            prefixes = tuple(prefix for part in base.token_parts[branch] for prefix in base.parts[part])
            encoder = [parameter for name, parameter in base.named_parameters() if name.startswith(prefixes)]
            for name, value in encoder_pulls(task, result.output.tokens, result.objective, encoder).items():
                self._found[f"train/{branch}/encoder_{name}"] = value

    def take(self) -> dict[str, Tensor]:
        """What was found, by the name to log it under; forgotten here."""
        found, self._found = self._found, {}
        return found


def frozen_tokens_message(branch: Branch, base: UnifiedModel, result: BranchResult) -> str | None:
    """Says that the terms of a branch cannot move the model, and what to do about it; None where they can."""
    if not result.objective.terms or result.output.tokens.requires_grad:
        return None
    makers = [prefix for part in base.token_parts[branch] for prefix in base.parts[part]]
    return (
        f"The tokens of the {branch} branch require no gradient, because all that makes them is frozen; so its "
        f"terms ({', '.join(result.objective.terms)}) train only the heads and move no weight of the model. Ways "
        f"out: train one of the parts that make the tokens ({', '.join(makers)}) by taking it out of model.freeze "
        "or naming it in model.unfreeze; give one of them adapters with model.lora; or leave the branch out of "
        "objective.branches."
    )


def part_gradient_norms(loss: Tensor, model: nn.Module, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """|| d loss / d part ||: one more backward pass through what lies before the loss.

    Args:
        loss: scalar with its graph.
        parts: name -> prefixes of parameter names.

    Returns:
        part -> scalar, for the parts that the loss reaches: none for one that is frozen, or that lies elsewhere.
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
        if reached:
            norms[part] = torch.nn.utils.get_total_norm(reached).to(loss.device)
    return norms


def encoder_pulls(
    task: Tensor, tokens: Tensor, objective: BranchObjective, encoder: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """What each term asks of the visual encoder, against what the task asks, at the encoder's parameters.

    One backward pass of the task through the whole model, and one of each term through the encoder. It also says what
    a placebo's terms would ask, if they were allowed to.

    Args:
        task: the task's loss, weighted, with its graph.
        tokens: (B, N, D), as the encoder gave them.
        encoder: what makes the tokens.

    Returns:
        `rho/<term>`: |d term| / |d task|; `cosine/<term>`: of the two; nothing where the encoder is frozen.
    """
    encoder = [parameter for parameter in encoder if parameter.requires_grad]
    if not encoder or not tokens.requires_grad or not task.requires_grad:
        return {}
    wanted = _flat(torch.autograd.grad(task, encoder, retain_graph=True, allow_unused=True), encoder)
    found = {}
    for term, value in objective.terms.items():
        (pull,) = torch.autograd.grad(value, objective.tokens, retain_graph=True, allow_unused=True)
        if pull is None:
            continue
        asked = torch.autograd.grad(tokens, encoder, pull.to(tokens.dtype), retain_graph=True, allow_unused=True)
        asked = _flat(asked, encoder)
        found[f"rho/{term}"] = asked.norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny)
        found[f"cosine/{term}"] = torch.cosine_similarity(asked, wanted, dim=0)
    return found


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for g, p in pairs])
