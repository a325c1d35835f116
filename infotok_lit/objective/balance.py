"""Balance: the strength of a term said as a share rho of the task's own pull on the shared tokens.

rho_t = |d term_t / d Z_b| / |d L_task / d Z_b|, so a term's weight is rho_t times the ratio of the two norms, measured
while training runs. Precedents: the adaptive weight of VQGAN (arXiv 2012.09841, section 3) and GradNorm
(arXiv 1711.02257).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch
from infotok_lit.errors import SettingsError
from infotok_lit.objective.distributed import global_sum
from infotok_lit.objective.term import Term


@dataclass(frozen=True)
class Shares:
    """How strongly each term of one branch may pull on the shared tokens, as a share rho of the task's pull.

    Args:
        compactness: rho of C. null leaves it to lambda, or to dual ascent; 0 switches the term off in this branch.
        sufficiency: rho of S; null leaves it to lambda and beta.
        alignment: rho of A; null leaves it to lambda and alpha.
        self_alignment: rho of self-alignment, in generation; null leaves it to lambda and gamma.
        captioning: rho of captioning, in generation; null leaves it to lambda and delta.
    """

    compactness: float | None = None
    sufficiency: float | None = None
    alignment: float | None = None
    self_alignment: float | None = None
    captioning: float | None = None

    def __post_init__(self) -> None:
        for term, share in vars(self).items():
            if share is not None and share < 0:
                raise SettingsError(f"balance: the share of {term} is {share}; set it to 0 (off) or more, or to null.")


@dataclass(frozen=True)
class BalanceConfig:
    """Weights that follow from shares of the task's pull, instead of lambda, alpha and beta.

    Args:
        understanding: Shares of the understanding branch.
        generation: Shares of the generation branch.
        decay: What one measurement leaves of the running mean squares, which are corrected for their start.
        every: The pulls are measured at every so many-th optimiser step, and in each of the first 20.
        lowest: No weight falls below.
        highest: No weight rises above; what a term pulls that has nearly no gradient left is noise.
    """

    understanding: Shares = field(default_factory=Shares)
    generation: Shares = field(default_factory=Shares)
    decay: float = 0.9
    every: int = 4
    lowest: float = 1e-6
    highest: float = 1e3

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise SettingsError(f"balance.decay is {self.decay}; set it in [0, 1).")
        if self.every < 1:
            raise SettingsError(f"balance.every is {self.every}; set it to 1 or more.")
        if not 0 < self.lowest < self.highest:
            raise SettingsError(
                f"balance.lowest is {self.lowest} and highest {self.highest}; set 0 < lowest < highest."
            )

    def share(self, branch: Branch, term: Term) -> float | None:
        """rho of a term; None where balance leaves it alone."""
        return getattr(self.understanding if branch == "understanding" else self.generation, term)


FIRST_STEPS = 20


class Balance(nn.Module):
    """The measured pulls of one branch, and the weights that follow; its state is in buffers, hence in the checkpoint.

    A pull is the norm of a gradient over all tokens of the global batch. The terms' are taken in the forward pass, the
    task's in the backward pass, by a hook on the tokens where they go into the model; both are squared and summed over
    the passes and ranks of an optimiser step, and enter the running means when it ends (`finish_step`). A step whose
    numbers are not finite does not. Nothing is read from the device.

    Args:
        shares: rho of each balanced term.
        config: decay, rhythm and bounds.
    """

    mean_squares: Tensor
    """(1 + terms,): running sums of squared pulls, the task's first; not yet corrected for their start."""
    certainty: Tensor
    """1 - decay^measurements: what they are to be divided by."""

    def __init__(self, shares: Mapping[Term, float], config: BalanceConfig) -> None:
        super().__init__()
        self.shares = dict(shares)
        self.config = config
        self.register_buffer("mean_squares", torch.zeros(1 + len(shares)))
        self.register_buffer("certainty", torch.zeros(()))
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._task: list[Tensor] = []

    def measures(self, step: int) -> bool:
        """Whether the pulls are measured at a global step."""
        return self.training and torch.is_grad_enabled() and (step < FIRST_STEPS or step % self.config.every == 0)

    def watch_task(self, tokens: Tensor) -> Tensor:
        """The tokens for the model alone, whose gradient is then the task's; as they were, bit for bit."""
        if not tokens.requires_grad:
            return tokens
        tokens = tokens.view_as(tokens)
        tokens.register_hook(lambda gradient: self._task.append(_square(gradient)))
        return tokens

    def watch_terms(self, terms: Mapping[Term, Tensor], tokens: Tensor) -> Tensor:
        """Measure the unweighted terms' pulls on the tokens that they were computed from.

        Returns:
            Zero, to be added to the loss: its gradient is by how much the backward pass is scaled (a GradScaler,
            accumulation), which the task's pull is divided by.
        """
        unit = torch.ones((), device=tokens.device, requires_grad=True)
        squares = []
        for term in self.shares:
            (gradient,) = torch.autograd.grad(terms[term], tokens, retain_graph=True, allow_unused=True)
            squares.append(tokens.new_zeros((), dtype=torch.float32) if gradient is None else _square(gradient))
        self._pending.append((torch.stack(squares), unit))
        return unit - unit.detach()

    def units(self) -> list[Tensor]:
        """What must be among the leaves of a backward pass that leaves gradients at named leaves only."""
        return [unit for _, unit in self._pending if unit.grad is None]

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside, backward passes are not measured: they are not the step's own."""
        task, units = list(self._task), [(unit, unit.grad) for _, unit in self._pending]
        yield
        self._task = task
        for unit, gradient in units:
            unit.grad = gradient

    def factors(self) -> dict[Term, Tensor]:
        """The weight of each term for a share as configured; 0 until something was measured."""
        task, *terms = self.mean_squares
        known = self.certainty > 0
        found = {}
        for (term, share), square in zip(self.shares.items(), terms, strict=True):
            ratio = (task / square.clamp(min=torch.finfo(square.dtype).tiny)).sqrt()
            found[term] = torch.where(known, (share * ratio).clamp(self.config.lowest, self.config.highest), 0.0)
        return found

    def pulls(self) -> Tensor:
        """(1 + terms,): root mean squares of the pulls, the task's first."""
        return (self.mean_squares / self.certainty.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()

    def silent_task_message(self, branch: Branch) -> str | None:
        """Says that the task pulls on no token, and what to do; None while it does. Reads from the device."""
        if not bool((self.certainty > 0) & (self.mean_squares[0] == 0)):
            return None
        return (
            f"{branch}: the task sends no gradient into the shared tokens, so balance has nothing to measure the terms "
            f"by, and they stay at the lowest weight. Set the shares of balance.{branch} to null, which leaves them to "
            f"lambda_, alpha and beta, or leave {branch} out of objective.branches."
        )

    def squares_of_step(self) -> Tensor:
        """(2 + terms,): what this rank's passes have measured - how many, the task's square, the terms'."""
        passes = [(squares, unit.grad) for squares, unit in self._pending if unit.grad is not None]
        task, self._pending, self._task = self._task, [], []
        total = torch.zeros(1 + len(self.mean_squares), device=self.mean_squares.device)
        for squares, _ in passes:
            total = total + torch.cat([total.new_ones(1), total.new_zeros(1), squares])
        if passes and task:
            # All passes of a step are scaled alike.
            total[1] = torch.stack(task).sum() / passes[-1][1].square()
        return total

    def take(self, squares: Tensor) -> None:
        """Let the global sums of a step, in the order of `squares_of_step`, into the running means."""
        measured = (squares[0] > 0) & squares.isfinite().all()
        keep = torch.where(measured, self.config.decay, 1.0)
        # The step's loss is the mean over its passes on all ranks, so each one's gradient counts that much less.
        values = torch.where(measured, squares[1:] / squares[0].square(), 0.0)
        self.mean_squares.copy_(keep * self.mean_squares + (1 - keep) * values)
        self.certainty.copy_(keep * self.certainty + (1 - keep))


def finish_step(balances: Iterable[Balance]) -> None:
    """Bring what an optimiser step has measured into the running means; collective, one call for all branches."""
    balances = list(balances)
    local = [balance.squares_of_step() for balance in balances]
    if not local:
        return
    total = global_sum(torch.cat(local))
    for balance, squares in zip(balances, total.split([len(part) for part in local]), strict=True):
        balance.take(squares)


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()
