"""InfoTok: the information bottleneck on the shared tokens of one unified model (Eq. 10 and its share of Eq. 11).

The heads live here and nowhere else, and they exist exactly for the terms that are on: delete this module and what is
left is the model as it was.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from infotok_lit.batch import Branch, BranchOutput
from infotok_lit.objective.balance import Balance, finish_step
from infotok_lit.objective.captioning import CaptionReader, captioning
from infotok_lit.objective.compactness import InlineBottleneck, Posterior
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.constraint import RATE, SUFFICIENCY, Constraint
from infotok_lit.objective.heads import BranchHeads
from infotok_lit.objective.hsic import DependenceTerms
from infotok_lit.objective.report import balance_report, equivalent_weights, weight_report
from infotok_lit.objective.term import BranchObjective, Term, TermNats, Widths
from infotok_lit.objective.token_budget import TokenBudget


@dataclass(frozen=True)
class TokenPath:
    """What happens to a branch's shared tokens on their way into the model, in one forward pass."""

    inline: InlineBottleneck | None
    """The noise, where the bottleneck is inline."""
    balance: Balance | None
    """An ear for the gradient that comes back, where terms are balanced."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), same dtype."""
        tokens = tokens if self.inline is None else self.inline(tokens)
        return tokens if self.balance is None else self.balance.watch_task(tokens)


class InfoTok(nn.Module):
    """The objective of both branches.

    Why there are two bottlenecks. `projected`, the paper's: noise and rate live on f_b(Z), which only the heads see.
    f_b is free, and I(f_b(Z); I) <= I(Z; I): pressing on the smaller does not press on the larger, and with compactness
    alone f_b just forgets. What moves Z then is sufficiency and alignment; the rate sets the scale of the noise that
    they must survive. `inline`: noise and rate are on Z as the model consumes it, a true variational bottleneck. The
    model's own losses are its sufficiency term, so there is no decoder, `sufficiency` in `terms` changes nothing, and
    beta is 1 / lambda. Its only head is the variance; at inference the tokens go without noise.

    All terms are computed in float32, also under autocast; keep these heads in float32.

    Args:
        config: what is on, and how strongly.
        widths: what the heads must know of each branch of the model.
    """

    def __init__(self, config: ObjectiveConfig, widths: Mapping[Branch, Widths]) -> None:
        super().__init__()
        self.config = config
        self.widths = dict(widths)
        self.heads = nn.ModuleDict()
        self.constraints = nn.ModuleDict()
        self.balances = nn.ModuleDict()
        for branch in config.branches:
            terms = config.active_terms(branch)
            if not terms:
                continue
            if config.estimator == "hsic":
                self.heads[branch] = DependenceTerms(branch, terms, config.hsic.unbiased)
            else:
                self.heads[branch] = BranchHeads(
                    branch, config, widths[branch], widths.get("understanding", widths[branch]).tokens
                )
            balanced = config.balanced_terms(branch)
            if balanced:
                shares = {term: config.balance.share(branch, term) for term in balanced}
                self.balances[branch] = Balance(shares, config.balance)
            constraint = _constraint(branch, config)
            if constraint is not None:
                self.constraints[branch] = constraint
        reading = config.token_budget
        self.budget = None if reading is None else TokenBudget(widths["understanding"].num_extra, reading)

    def path(self, branch: Branch, step: int, noise: Tensor | None = None, priced: bool = True) -> TokenPath | None:
        """What the model must apply to the branch's shared tokens in one forward pass; None for nothing.

        Give it to `forward` with what the model returned; make one anew for every pass, in validation too, where the
        bounds hold for noisy tokens.

        Args:
            branch: whose tokens.
            step: global step.
            noise: (B, N, D) standard normal for an inline bottleneck; drawn if not given.
            priced: False for a further pass over a branch's tokens, which meets the same noise and no `forward`.
        """
        if branch not in self.heads:
            return None
        inline = InlineBottleneck(self.heads[branch].projection, noise) if self.config.bottleneck == "inline" else None
        measured = priced and branch in self.balances and self.balances[branch].measures(step)
        balance = self.balances[branch] if measured else None
        return TokenPath(inline, balance) if inline or balance else None

    def forward(
        self,
        branch: Branch,
        output: BranchOutput,
        step: int,
        *,
        path: TokenPath | None = None,
        pixel_values: Tensor | None = None,
        understood: Tensor | None = None,
        read_caption: CaptionReader | None = None,
        noise: Tensor | None = None,
    ) -> BranchObjective:
        """The weighted terms and the report of one branch; collective where several ranks train together.

        Args:
            branch: which heads to use; one without active terms costs nothing and has none.
            output: what the branch's one forward pass gave.
            step: global step, for warm-up, dual ascent and balance.
            path: what that pass was given, of `path`.
            pixel_values: (B, 3, height, width), for `estimator: hsic`.
            understood: (B, N', D'): the understanding tokens of the same images, where `needs_understood` says so.
            read_caption: the model as the reader of the captions, for captioning.
            noise: (B, N, d) standard normal for the posterior sample; drawn if not given. Projected bottleneck only.

        Raises:
            ValueError: an output of another layout or shape; an inline bottleneck that the model was not given.
        """
        if branch not in self.heads:
            return BranchObjective()
        _check_shapes(output, self.widths[branch])
        tokens = _in_float32(output, path)
        if self.config.placebo:
            tokens = tokens.detach().requires_grad_(torch.is_grad_enabled())
        # Outside the block below: the model reads at the precision that it trains with.
        caption = self._caption(branch, tokens, output.tokens.dtype, read_caption)
        with torch.autocast(tokens.device.type, enabled=False):
            measured = self._measure(branch, tokens, output, path, pixel_values, understood, caption, noise)
            weights = self._weights(branch, step)
            weights = {term: weights[term] for term in measured.terms}
            terms = {term: weights[term] * cost for term, cost in measured.terms.items()}
            report = measured.report | weight_report(terms)
            if branch in self.balances:
                balance = self.balances[branch]
                if balance.measures(step) and tokens.requires_grad:
                    first = next(iter(terms))
                    terms[first] = terms[first] + balance.watch_terms(measured.terms, tokens)
                report |= balance_report(balance, weights, self.config.weights(branch).lambda_)
        if branch in self.constraints:
            report |= self.constraints[branch].observe(report)
        return replace(measured, terms=terms, report=report, tokens=tokens)

    def needs_understood(self, branch: Branch) -> bool:
        """Whether a term compares the branch's tokens with those of understanding the same images."""
        return "self_alignment" in self.config.active_terms(branch)

    def finish_step(self) -> None:
        """Take in what balance has measured in an optimiser step, after its last backward pass; a collective call."""
        finish_step(self.balances.values())

    def units(self) -> list[Tensor]:
        """Leaves of the terms beside parameters, at which balance is to find gradients; see `Balance.units`."""
        return [unit for balance in self.balances.values() for unit in balance.units()]

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside, backward passes are not what balance measures."""
        with ExitStack() as stack:
            for balance in self.balances.values():
                stack.enter_context(balance.unheard())
            yield

    def posterior(self, branch: Branch, tokens: Tensor) -> Posterior | None:
        """What the branch's heads make of shared tokens (B, N, D); None where it has no posterior with a variance."""
        if not self.config.has_rates(branch):
            return None
        with torch.autocast(tokens.device.type, enabled=False):
            return self.heads[branch].projection(tokens)

    def rates(self, branch: Branch, tokens: Tensor) -> Tensor | None:
        """k_i (B, N): what each shared token carries, in nats, without a graph; None where nothing measures it."""
        posterior = self.posterior(branch, tokens.detach())
        return None if posterior is None else posterior.kl().detach().sum(-1)

    def equivalents(self) -> dict[Branch, dict[str, float]]:
        """lambda, alpha and beta of each branch as things stand, for people; reads from the device."""
        found = {}
        for branch in self.heads:
            values = equivalent_weights(self._full_weights(branch), self.config.weights(branch).lambda_)
            found[branch] = {name: float(value) for name, value in values.items()}
        return found

    def _measure(
        self,
        branch: Branch,
        tokens: Tensor,
        output: BranchOutput,
        path: TokenPath | None,
        pixel_values: Tensor | None,
        understood: Tensor | None,
        caption: TermNats | None,
        noise: Tensor | None,
    ) -> BranchObjective:
        head = self.heads[branch]
        if self.config.estimator == "hsic":
            return head(tokens, output, pixel_values)
        if self.config.bottleneck == "projected":
            posterior = None if head.projection is None else head.projection(tokens)
            return head(tokens, posterior, output, noise, understood, caption)
        if noise is not None:
            raise ValueError("The inline bottleneck draws its noise in the model; give noise to path() instead.")
        return head(tokens, _inline_posterior(branch, output, path), output, None, understood, caption)

    def _caption(
        self, branch: Branch, tokens: Tensor, dtype: torch.dtype, read: CaptionReader | None
    ) -> TermNats | None:
        if "captioning" not in self.config.active_terms(branch):
            return None
        if read is None:
            raise ValueError("captioning asks the model for its captions; give read_caption.")
        return captioning(tokens, lambda seen: read(seen.to(dtype)))

    def _weights(self, branch: Branch, step: int) -> dict[Term, Tensor | float]:
        """The factor of each active term in the total loss at a step, which may move a constraint's."""
        if branch in self.constraints:
            self.constraints[branch].multiplier(step)
        return {term: self.config.warmup(term, step) * value for term, value in self._full_weights(branch).items()}

    def _full_weights(self, branch: Branch) -> dict[Term, Tensor | float]:
        """The same without warm-up, as things stand: configured, or found by dual ascent or balance."""
        own = self.config.weights(branch)
        weights: dict[Term, Tensor | float] = {
            term: own.lambda_ * own.factor(term) for term in self.config.active_terms(branch)
        }
        if branch in self.constraints:
            constraint = self.constraints[branch]
            weights[constraint.term] = own.lambda_ * constraint.log_multiplier.exp()
        return weights | (self.balances[branch].factors() if branch in self.balances else {})


def _constraint(branch: Branch, config: ObjectiveConfig) -> Constraint | None:
    """The constraint that a branch asks for; None without one, or where its term is off."""
    weights = config.weights(branch)
    if weights.constrained not in config.active_terms(branch):
        return None
    if weights.constrained == "compactness":
        return Constraint("compactness", RATE, weights.rate_budget_bits, 1.0, config.dual)
    return Constraint("sufficiency", SUFFICIENCY, weights.sufficiency_target_nats, weights.beta, config.dual)


def _in_float32(output: BranchOutput, path: TokenPath | None) -> Tensor:
    """The shared tokens, of which terms are made and at which their gradients are measured.

    At tokens of 16 bits these would be rounded, in float16 often to zero.
    """
    seen = None if path is None or path.inline is None else path.inline.tokens
    return output.tokens.float() if seen is None else seen


def _inline_posterior(branch: Branch, output: BranchOutput, path: TokenPath | None) -> Posterior:
    """That of the tokens which the model consumed in the pass that gave `output`."""
    if path is None or path.inline is None or path.inline.posterior is None:
        raise ValueError(f"bottleneck inline: pass path({branch!r}) to the model, and then to the objective.")
    posterior = path.inline.posterior
    if posterior.mean.shape != output.tokens.shape:
        raise ValueError(
            f"bottleneck inline: the path saw tokens {tuple(posterior.mean.shape)}, "
            f"the objective got {tuple(output.tokens.shape)}; both must be of one forward pass."
        )
    return posterior


def _check_shapes(output: BranchOutput, widths: Widths) -> None:
    """Refuse what does not belong together, in words."""
    if output.layout.num_extra != widths.num_extra:
        raise ValueError(
            f"the tokens have {output.layout.num_extra} extra places; the heads were built for {widths.num_extra}."
        )
    if output.layout.num_tokens == 0:
        raise ValueError("the canvas has no place at all: num_extra is 0 and grid is (0, 0).")
    if output.tokens.ndim != 3 or output.tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (B, N, D) with N >= 1, not {tuple(output.tokens.shape)}.")
    images, text = output.tokens.shape[0], output.text
    texts = (images, *text.ids.shape[1:])
    expected = [("token_index", output.token_index, output.tokens.shape[:2]), ("text.key", text.key, (images,))]
    expected += [(f"text.{name}", getattr(text, name), texts) for name in ("ids", "mask", "target_mask")]
    if output.noise_level is not None:
        expected.append(("noise_level", output.noise_level, (images,)))
    if text.negatives is not None:
        negatives = (images, *text.negatives.ids.shape[1:3])
        expected += [(f"text.negatives.{name}", getattr(text.negatives, name), negatives) for name in ("ids", "mask")]
    for name, found, shape in expected:
        if found.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(found.shape)}.")
