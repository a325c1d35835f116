"""How far the losses reach: norms and cosines of gradients, for the steps that log.

Everything keeps the graph for the step's own backward pass. What is at the tokens, and at parameters that processes
share out, is over all processes' batches; what is at other parameters is over this process's. Alignment is collective:
with several processes, all of them must call these at the same step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.losses import BranchResult
from infotok_lit.modules.sharding import gradients_aside, is_sharded, own_share, reshard, sum_of_shares, total_norm
from infotok_lit.objective.distributed import global_sum, world_size
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.report import gradient_norms
from infotok_lit.objective.term import BranchObjective

TINY = torch.finfo(torch.float32).tiny
ENCODER_EVERY = 10
"""Of the steps that log, every so many-th measures what the terms ask of the encoder."""


class GradientWatch:
    """Collects what a step that logs is to say of gradients; some of it is known only after the backward pass."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def watch(self, branch: Branch, base: UnifiedModel, heads: InfoTok, result: BranchResult, scale: Tensor) -> None:
        """Norms of d loss / d Z, of each term and of all; and norms at the parts of the model.

        Args:
            scale: scalar that the step's own backward pass multiplies gradients by, of `backward_scale`.
        """
        objective, tokens, found = result.objective, result.output.tokens, self._found
        if objective.terms:
            for term, norm in gradient_norms(objective.terms, objective.tokens).items():
                found[f"train/{branch}/token_gradient/{term}"] = norm
            for part, norm in part_gradient_norms(objective.loss, base, heads, base.parts).items():
                found[f"train/{branch}/part_gradient/{part}"] = norm
        if tokens.requires_grad:
            total = f"train/{branch}/token_gradient/total"
            tokens.register_hook(lambda gradient: found.update({total: gradient.float().norm() / scale}))

    def watch_encoder(
        self, branch: Branch, base: UnifiedModel, heads: InfoTok, result: BranchResult, task: Tensor
    ) -> None:
        """What the terms ask of the encoder against the task's weighted loss; costs a backward pass of the task."""
        if result.objective.terms:
            encoder = tuple(prefix for part in base.token_parts[branch] for prefix in base.parts[part])
            for name, value in encoder_pulls(
                task, result.output.tokens, result.objective, base, heads, encoder
            ).items():
                self._found[f"train/{branch}/encoder_{name}"] = value

    def take(self) -> dict[str, Tensor]:
        """What was found, by the name to log it under; forgotten here; a collective call."""
        found, self._found = self._found, {}
        names = sorted(name for name in found if "/token_gradient/" in name)
        if names:
            # Each process has its own images' tokens, and its share of the loss, over which gradients are averaged.
            squares = global_sum(torch.stack([found[name] for name in names]).square())
            found |= zip(names, squares.sqrt() / world_size(), strict=True)
        return found


def frozen_tokens_message(branch: Branch, base: UnifiedModel, result: BranchResult) -> str | None:
    """Says that the terms of a branch cannot move the model, and what to do about it; None where they can."""
    if not result.objective.terms or result.output.tokens.requires_grad:
        return None
    unweighted = ""
    if "pull_task" in result.objective.report:
        unweighted = " (not those of terms that balance weighs: it finds no pull to measure, so their weights stay 0)"
    makers = [prefix for part in base.token_parts[branch] for prefix in base.parts[part]]
    return (
        f"The tokens of the {branch} branch require no gradient, because all that makes them is frozen; so its terms "
        f"({', '.join(result.objective.terms)}) train only the heads{unweighted} and move no weight of the model. "
        f"Ways out: train one of the parts that make the tokens ({', '.join(makers)}) by taking it out of model.freeze "
        "or naming it in model.unfreeze; give one of them adapters with model.lora; or leave the branch out of "
        "objective.branches."
    )


def part_gradient_norms(
    loss: Tensor, base: nn.Module, heads: InfoTok, parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """|| d loss / d part ||: one more backward pass through what lies before the loss.

    Args:
        loss: scalar with its graph.
        heads: what else lies before it.
        parts: name -> prefixes of parameter names.

    Returns:
        part -> scalar, for the parts that the loss reaches: none for one that is frozen, or that lies elsewhere.
    """
    if not loss.requires_grad:
        return {}
    found = _gradients(loss, base, heads, prefixes=("",))
    reached = {
        part: [gradient for name, gradient in found.items() if name.startswith(prefixes)]
        for part, prefixes in parts.items()
    }
    return {part: total_norm(gradients).to(loss.device) for part, gradients in reached.items() if gradients}


def encoder_pulls(
    task: Tensor,
    tokens: Tensor,
    objective: BranchObjective,
    base: nn.Module,
    heads: InfoTok,
    encoder: tuple[str, ...],
) -> dict[str, Tensor]:
    """What each term asks of the visual encoder, against what the task asks, at the encoder's parameters.

    One backward pass of the task through the whole model, and one of each term through the encoder. It also says what
    a placebo's terms would ask, if they were allowed to.

    Args:
        task: the task's loss, weighted, with its graph.
        tokens: (B, N, D), as the encoder gave them.
        encoder: prefixes of the names in `base` of what makes the tokens.

    Returns:
        `rho/<term>`: |d term| / |d task|; `cosine/<term>`: of the two; nothing where the encoder is frozen, or the task
        asks nothing of it.
    """
    if not tokens.requires_grad or not task.requires_grad:
        return {}
    wanted = _gradients(task, base, heads, encoder)
    if not wanted:
        return {}
    wanted_norm = _inner(wanted, wanted).sqrt()
    if wanted_norm == 0:
        return {}
    found = {}
    for term, value in objective.terms.items():
        (pull,) = torch.autograd.grad(value, objective.tokens, retain_graph=True, allow_unused=True)
        if pull is None:
            continue
        # At tokens of 16 bits small gradients would be rounded to zero: they pass the encoder at a size of 1.
        size = pull.new_ones(()) if tokens.dtype == pull.dtype else global_sum(pull.abs().amax()).clamp(min=TINY)
        asked = _gradients(tokens, base, heads, encoder, (pull / size).to(tokens.dtype))
        if not asked:
            continue
        asked_norm = _inner(asked, asked).sqrt()
        found[f"rho/{term}"] = asked_norm * size / wanted_norm
        found[f"cosine/{term}"] = _inner(asked, wanted) / (asked_norm * wanted_norm).clamp(min=TINY)
    return found


def _gradients(
    value: Tensor, base: nn.Module, heads: InfoTok, prefixes: tuple[str, ...], pull: Tensor | None = None
) -> dict[str, Tensor]:
    """d value / d parameter for the trained parameters of `base` that begin so and are reached; keeps the graph.

    Of parameters that processes share out it is the mean over processes, and each has its share of it.

    Args:
        heads: what else lies before the value.
        pull: the gradient of the value, where it is no scalar.
    """
    if is_sharded(base):
        # The graph knows the gathered parameters only, whose gradients are handed on where they are shared out.
        with heads.unheard(), gradients_aside(base, heads):
            value.backward(pull, retain_graph=True)
            reshard(base, heads)
            found = {name: parameter.grad for name, parameter in base.named_parameters()}
    else:
        named = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
        named = {name: parameter for name, parameter in named.items() if name.startswith(prefixes)}
        if not named:
            return {}
        with heads.unheard():
            gradients = torch.autograd.grad(value, list(named.values()), pull, retain_graph=True, allow_unused=True)
        found = dict(zip(named, gradients, strict=True))
    return {name: value for name, value in found.items() if value is not None and name.startswith(prefixes)}


def _inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """The sum of products of what both have, a scalar; a collective call where parameters are shared out."""
    pairs = [(own_share(first[name]).float(), own_share(second[name]).float()) for name in first.keys() & second.keys()]
    total = torch.stack([(one * other).sum() for one, other in pairs]).sum()
    return sum_of_shares(total, next(iter(second.values())))
