"""What the objective is made of, in primitives: the signature of these classes is the command line and its help."""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from infotok_lit.batch import Branch

Term = Literal["compactness", "sufficiency", "alignment"]
Reduction = Literal["tokens", "mean"]

INITIAL_STD_RANGE = (0.005, 1.0)


@dataclass(frozen=True)
class BranchWeights:
    """Exchange rates of one branch, against one nat of rate (Eq. 10).

    Args:
        alpha: Weight of alignment, in nats of rate per nat of A. 0 switches alignment off in this branch.
        beta: Weight of sufficiency, in nats of rate per nat of S. 0 switches sufficiency off in this branch. Below 1 a
            token pays more for what it carries than the target gains, and the posterior collapses.
        rate_budget_bits: Bits per token that the posterior may use. Given, the factor of compactness is not 1 but
            found by dual ascent: it starts at 1, rises while the rate is above the budget and falls below it. Acts
            where compactness is on.
        sufficiency_target_nats: Nats per target element that sufficiency must come down to. Given, `beta` is only
            where dual ascent starts from: it rises while sufficiency is above the target and falls below it. Acts
            where sufficiency is on.
    """

    alpha: float = 10.0
    beta: float = 10.0
    rate_budget_bits: float | None = None
    sufficiency_target_nats: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be 0 (off) or positive.")
        if self.rate_budget_bits is not None and self.rate_budget_bits <= 0:
            raise ValueError(f"rate_budget_bits is {self.rate_budget_bits}; set it above 0.")
        if self.rate_budget_bits is not None and self.sufficiency_target_nats is not None:
            raise ValueError("rate_budget_bits and sufficiency_target_nats exclude each other; keep one per branch.")
        if self.sufficiency_target_nats is not None and self.beta == 0:
            raise ValueError("sufficiency_target_nats needs a beta above 0 to start from.")

    @property
    def constrained(self) -> bool:
        """Whether dual ascent finds one of the factors."""
        return self.rate_budget_bits is not None or self.sufficiency_target_nats is not None


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
            raise ValueError(f"dual.step_size is {self.step_size}; set it above 0.")
        if not 0 < self.lowest < self.highest:
            raise ValueError(f"dual.lowest is {self.lowest} and dual.highest {self.highest}; set 0 < lowest < highest.")


@dataclass(frozen=True)
class ProjectionConfig:
    """The task projection f_b (Eq. 4). The inline bottleneck uses `initial_std` only.

    Args:
        kind: `mlp` and `linear` map tokens to means and log variances; `identity` keeps the tokens as means and learns
            the log variances only, so that the rate binds the shared tokens themselves.
        hidden_width: Width h of the hidden layer; `mlp` only.
        latent_width: Width d of the projected tokens; `mlp` and `linear` only (`identity` keeps the token width).
        initial_std: Standard deviation of the posterior at the start, in units of the prior's. Narrow, so that the
            decoders see the tokens before the noise: one that starts at the prior teaches them to ignore the tokens.
    """

    kind: Literal["mlp", "linear", "identity"] = "mlp"
    hidden_width: int = 256
    latent_width: int = 64
    initial_std: float = 0.05

    def __post_init__(self) -> None:
        _refuse_unknown("projection.kind", self.kind, ("mlp", "linear", "identity"))
        for name in ("hidden_width", "latent_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"projection.{name} is {getattr(self, name)}; set it to 1 or more.")
        low, high = INITIAL_STD_RANGE
        if not low <= self.initial_std <= high:
            raise ValueError(f"projection.initial_std is {self.initial_std}; set it between {low} and {high}.")


@dataclass(frozen=True)
class DecoderConfig:
    """The variational decoders p(Y | Z~) of sufficiency (Eq. 8), both small transformers.

    Args:
        width: Width of the residual stream; a multiple of 4 (two axes, sine and cosine) and of `heads`.
        depth: Number of layers.
        heads: Number of attention heads.
    """

    width: int = 128
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name} is {getattr(self, name)}; set it to 1 or more.")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"decoder.width {self.width} must be a multiple of 4 and of decoder.heads {self.heads}.")


@dataclass(frozen=True)
class NegativesConfig:
    """The texts that alignment contrasts an image with. Identical texts never are each other's negatives.

    Args:
        queue_size: So many texts of past batches are negatives too; 0 takes those of the global batch alone.
        limit: At most so many negatives per image; null takes all.
        kept: Which ones a limit keeps: `random`, drawn anew for every image and step, or `nearest` (hard negatives),
            those whose mean embeddings have the largest cosine with the true text's.
        from_data: So many texts that the data knows to be nearly true of an image, and false, are its negatives beside
            all others; 0 asks for none. Scenes has them: its own texts with one attribute changed.
    """

    queue_size: int = 0
    limit: int | None = None
    kept: Literal["random", "nearest"] = "random"
    from_data: int = 0

    def __post_init__(self) -> None:
        _refuse_unknown("negatives.kept", self.kept, ("random", "nearest"))
        if self.queue_size < 0:
            raise ValueError(f"negatives.queue_size is {self.queue_size}; set it to 0 (off) or more.")
        if self.from_data < 0:
            raise ValueError(f"negatives.from_data is {self.from_data}; set it to 0 (off) or more.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"negatives.limit is {self.limit}; set it to 1 or more, or to null for all.")
        if self.limit is None and self.kept == "nearest":
            raise ValueError("negatives.kept is nearest, but all negatives are taken; set negatives.limit.")


@dataclass(frozen=True)
class HSICConfig:
    """Settings of `estimator: hsic`.

    Args:
        unbiased: Use the unbiased form, whose value does not depend on the batch size (at least 4 images). The biased
            form is smoother and never negative, but far from 0 for small batches of independent samples.
    """

    unbiased: bool = True


@dataclass(frozen=True)
class ObjectiveConfig:
    """The InfoTok objective: L = L_i2t + L_t2i + weight * sum over branches of (C + beta S + alpha A).

    Args:
        terms: Which terms are on. `[]` is plain fine-tuning: no heads, no cost.
        branches: Which branches are regularised.
        estimator: `variational` (the paper) bounds the three informations in nats with heads of their own; `hsic`
            measures the same three dependencies by normalised HSIC with Gaussian kernels, each dimensionless in [0, 1],
            on the mean token and without any head. It reads `terms`, `branches`, `weight`, alpha, beta, `multiplier`
            and `hsic`; the rest belongs to `variational`.
        hsic: Settings of the estimator `hsic`.
        bottleneck: `projected` (the paper) puts the noise on a projection that only training sees; `inline` puts it on
            the tokens that the model itself consumes, whose own losses then are the sufficiency term.
        projection: The task projections f_u, f_g.
        decoder: The decoders of sufficiency.
        weight: lambda of Eq. 11: task loss per nat per token (or per unit of each term's own mean).
        understanding: alpha and beta of the understanding branch; its target is the answer text.
        generation: alpha and beta of the generation branch; its target is the image latents, thousands of numbers
            where an answer has a few words, hence the smaller default beta.
        temperature: tau of the alignment term: cosine similarities are divided by it.
        negatives: The texts that alignment contrasts an image with.
        reduction: `tokens` divides every term, in nats per image, by the token count N of the full canvas, so that
            alpha and beta are exchange rates; `mean` takes each term's mean over its own elements.
        multiplier: How `weight` moves with the global step: `constant`, or `warmup` linearly from 0.
        warmup_steps: Length of the warm-up in optimiser steps; 0 unless `multiplier` is `warmup`.
        dual: Dual ascent, for branches that ask for a budget or a target.
    """

    terms: tuple[Term, ...] = ("compactness", "sufficiency", "alignment")
    branches: tuple[Branch, ...] = ("understanding", "generation")
    estimator: Literal["variational", "hsic"] = "variational"
    hsic: HSICConfig = field(default_factory=HSICConfig)
    bottleneck: Literal["projected", "inline"] = "projected"
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    weight: float = 0.1
    understanding: BranchWeights = field(default_factory=BranchWeights)
    generation: BranchWeights = field(default_factory=lambda: BranchWeights(alpha=10.0, beta=2.0))
    temperature: float = 0.1
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    reduction: Reduction = "tokens"
    multiplier: Literal["constant", "warmup"] = "constant"
    warmup_steps: int = 0
    dual: DualConfig = field(default_factory=DualConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _checked_choices("terms", self.terms, get_args(Term)))
        object.__setattr__(self, "branches", _checked_choices("branches", self.branches, get_args(Branch)))
        _refuse_unknown("bottleneck", self.bottleneck, ("projected", "inline"))
        _refuse_unknown("estimator", self.estimator, ("variational", "hsic"))
        _refuse_unknown("reduction", self.reduction, get_args(Reduction))
        _refuse_unknown("multiplier", self.multiplier, ("constant", "warmup"))
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; set it above 0 (0.1 is usual).")
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}; set it above 0, or terms to [] for plain fine-tuning.")
        self._check_warmup()
        self._check_estimator()
        if self.terms:
            self._check_something_acts()

    def _check_warmup(self) -> None:
        if self.multiplier == "warmup" and self.warmup_steps < 1:
            raise ValueError(f"multiplier is warmup over {self.warmup_steps} steps; set warmup_steps to 1 or more.")
        if self.multiplier == "constant" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} but multiplier is constant; set multiplier to warmup."
            )

    def _check_estimator(self) -> None:
        if self.estimator == "hsic" and self.bottleneck == "inline":
            raise ValueError("estimator hsic has no noise to put on the tokens; set bottleneck to projected.")
        if self.estimator == "hsic" and (self.understanding.constrained or self.generation.constrained):
            raise ValueError("estimator hsic measures no bits or nats to limit; remove the budget or target.")
        for branch in get_args(Branch):
            if self.bottleneck == "inline" and self.weights(branch).sufficiency_target_nats is not None:
                raise ValueError(
                    f"{branch}.sufficiency_target_nats: with bottleneck inline sufficiency is the model's own loss and "
                    "is not measured; set rate_budget_bits instead."
                )

    def _check_something_acts(self) -> None:
        if self.weight == 0:
            raise ValueError("weight is 0 while terms are on; set terms to [] for plain fine-tuning.")
        if not self.branches:
            raise ValueError("branches is empty while terms are on; name a branch, or set terms to [].")
        if self.bottleneck == "inline" and "compactness" not in self.terms:
            raise ValueError("bottleneck inline is noise priced by its rate; add compactness to terms.")
        if not any(self.active_terms(branch) for branch in self.branches):
            raise ValueError("every term that is on has weight 0; raise alpha or beta, or set terms to [].")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ObjectiveConfig":
        """The inverse of dataclasses.asdict; what is missing keeps its default."""
        parts = {name: part for name, part in get_type_hints(cls).items() if is_dataclass(part) and name in values}
        return cls(**{**values, **{name: part(**values[name]) for name, part in parts.items()}})

    def weights(self, branch: Branch) -> BranchWeights:
        """alpha, beta and what else one branch has of its own."""
        return self.understanding if branch == "understanding" else self.generation

    def negatives_from_data(self, branch: Branch) -> int:
        """How many texts per image alignment asks the data for in a branch."""
        aligned = self.estimator == "variational" and "alignment" in self.active_terms(branch)
        return self.negatives.from_data if aligned else 0

    def coefficient(self, branch: Branch, term: Term) -> float:
        """The factor of a term in Eq. 10: 1 for C, beta for S, alpha for A."""
        weights = self.weights(branch)
        return {"compactness": 1.0, "sufficiency": weights.beta, "alignment": weights.alpha}[term]

    def active_terms(self, branch: Branch) -> tuple[Term, ...]:
        """The terms that act in a branch: listed, the branch listed, and their coefficient not 0."""
        if branch not in self.branches:
            return ()
        return tuple(term for term in self.terms if self.coefficient(branch, term) > 0)


def _checked_choices(name: str, given: object, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} is {given!r}; give a list out of {list(known)}.")
    for choice in given:
        _refuse_unknown(name, choice, known)
    if len(set(given)) < len(given):
        raise ValueError(f"{name} names something twice: {list(given)}; name each once.")
    return tuple(given)


def _refuse_unknown(name: str, choice: object, known: tuple[str, ...]) -> None:
    if choice not in known:
        raise ValueError(f"{name}: {choice!r} is not known; choose out of {list(known)}.")
