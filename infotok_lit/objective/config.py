"""What the objective is made of, in primitives: the signature of these classes is the command line and its help.

The settings of a single term stand with the term.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from infotok_lit.batch import Branch
from infotok_lit.errors import SettingsError
from infotok_lit.objective.alignment import TEMPERATURE_RANGE, NegativesConfig
from infotok_lit.objective.balance import BalanceConfig
from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.constraint import DualConfig
from infotok_lit.objective.hsic import HSICConfig
from infotok_lit.objective.sufficiency import DecoderConfig
from infotok_lit.objective.term import FACTORS, RIVALS, Reduction, Term
from infotok_lit.objective.token_budget import TokenBudgetConfig


@dataclass(frozen=True)
class BranchWeights:
    """What the terms of one branch weigh (Eq. 10 and 11), where `balance` does not find it.

    Args:
        lambda_: Task loss per nat of rate per token (or per unit of each term's own mean).
        alpha: Weight of alignment, in nats of rate per nat of A. 0 switches alignment off in this branch.
        beta: Weight of sufficiency, in nats of rate per nat of S. 0 switches sufficiency off in this branch. Below 1 a
            token pays more for what it carries than the target gains, and the posterior collapses.
        gamma: Weight of self-alignment, which acts in generation only, in nats of rate per 1 - cosine.
        delta: Weight of captioning, which acts in generation only, in nats of rate per nat of the caption.
        rate_budget_bits: Bits per token that the posterior may use. Given, the factor of compactness is not 1 but
            found by dual ascent: it starts at 1, rises while the rate is above the budget and falls below it. Acts
            where compactness is on.
        sufficiency_target_nats: Nats per target element that sufficiency must come down to. Given, `beta` is only
            where dual ascent starts from: it rises while sufficiency is above the target and falls below it. Acts
            where sufficiency is on.
    """

    lambda_: float = 0.1
    alpha: float = 10.0
    beta: float = 10.0
    gamma: float = 10.0
    delta: float = 10.0
    rate_budget_bits: float | None = None
    sufficiency_target_nats: float | None = None

    def __post_init__(self) -> None:
        for name in ("lambda_", *FACTORS.values()):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; a weight must be 0 (off) or positive.")
        if self.rate_budget_bits is not None and self.rate_budget_bits <= 0:
            raise SettingsError(f"rate_budget_bits is {self.rate_budget_bits}; set it above 0.")
        if self.rate_budget_bits is not None and self.sufficiency_target_nats is not None:
            raise SettingsError("rate_budget_bits and sufficiency_target_nats exclude each other; keep one per branch.")
        if self.sufficiency_target_nats is not None and self.beta == 0:
            raise SettingsError("sufficiency_target_nats needs a beta above 0 to start from.")

    def factor(self, term: Term) -> float:
        """The factor of a term in Eq. 10: 1 for C, beta for S, alpha for A; gamma and delta for the rivals."""
        return getattr(self, FACTORS[term]) if term in FACTORS else 1.0

    @property
    def constrained(self) -> Term | None:
        """The term whose factor dual ascent finds."""
        if self.rate_budget_bits is not None:
            return "compactness"
        return None if self.sufficiency_target_nats is None else "sufficiency"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The InfoTok objective: L = L_i2t + L_t2i + sum over branches of lambda (C + beta S + alpha A).

    Args:
        terms: Which terms are on. The paper's whole objective is `[compactness, sufficiency, alignment]`; the default
            is the one of them that helped wherever any did (docs/results). `[]` is plain fine-tuning: no heads, no
            cost. Two are rivals of the paper's three, and act in generation: `self_alignment`, whose tokens are to
            resemble the model's own of the clean images, and `captioning`, where the language model is to read the
            caption off them.
        branches: Which branches are regularised.
        balance: How strongly each term may pull on the shared tokens, as a share of the task's own pull; takes the
            place of lambda, alpha and beta for the terms that it names.
        understanding: lambda, alpha and beta of the understanding branch; its target is the answer text.
        generation: lambda, alpha and beta of the generation branch; its target is the image latents, thousands of
            numbers where an answer has a few words, hence the smaller default beta.
        warmup_steps: Optimiser steps over which all terms rise linearly from 0; fresh heads send noise into a trained
            encoder, so they may start quietly.
        compactness_warmup_steps: The same for compactness alone, so that decoders learn to use the tokens before the
            rate has its price.
        free_bits: Bits that a token may carry before compactness counts them.
        placebo: A control: everything is measured and all heads train, but no gradient of a term reaches the model, so
            its weights end bit-equal to those of plain fine-tuning.
        estimator: `variational` (the paper) bounds the three informations in nats with heads of their own; `hsic`
            measures the same three dependencies by normalised HSIC with Gaussian kernels, each dimensionless in [0, 1],
            on the mean token and without any head. It reads `terms`, `branches`, `balance`, the weights, `placebo`,
            `warmup_steps`, `compactness_warmup_steps` and `hsic`; the rest belongs to `variational`.
        hsic: Settings of the estimator `hsic`.
        bottleneck: `projected` (the paper) puts the noise on a projection that only training sees; `inline` puts it on
            the tokens that the model itself consumes, whose own losses then are the sufficiency term.
        projection: The task projections f_u, f_g.
        decoder: The decoders of sufficiency.
        temperature: tau of the alignment term: cosine similarities are divided by it.
        learn_temperature: Learn tau, from `temperature` on, within [0.01, 1].
        negatives: The texts that alignment contrasts an image with.
        shuffled_texts: A control: alignment pairs each image with the text of another image of its batch, at the same
            share or weight, so whatever it then gains does not come from what the texts say.
        reduction: `tokens` divides every term, in nats per image, by the token count N of the full canvas, so that
            alpha and beta are exchange rates; `mean` takes each term's mean over its own elements.
        dual: Dual ascent, for branches that ask for a budget or a target.
        token_budget: Train to read images with fewer tokens, those with the highest rates; null for no such training.
    """

    terms: tuple[Term, ...] = ("alignment",)
    branches: tuple[Branch, ...] = ("understanding", "generation")
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    understanding: BranchWeights = field(default_factory=BranchWeights)
    generation: BranchWeights = field(default_factory=lambda: BranchWeights(beta=2.0))
    warmup_steps: int = 0
    compactness_warmup_steps: int = 0
    free_bits: float = 0.0
    placebo: bool = False
    estimator: Literal["variational", "hsic"] = "variational"
    hsic: HSICConfig = field(default_factory=HSICConfig)
    bottleneck: Literal["projected", "inline"] = "projected"
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    temperature: float = 0.1
    learn_temperature: bool = False
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    shuffled_texts: bool = False
    reduction: Reduction = "tokens"
    dual: DualConfig = field(default_factory=DualConfig)
    token_budget: TokenBudgetConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _checked_choices("terms", self.terms, get_args(Term)))
        object.__setattr__(self, "branches", _checked_choices("branches", self.branches, get_args(Branch)))
        _refuse_unknown("bottleneck", self.bottleneck, ("projected", "inline"))
        _refuse_unknown("estimator", self.estimator, ("variational", "hsic"))
        _refuse_unknown("reduction", self.reduction, get_args(Reduction))
        low, high = TEMPERATURE_RANGE
        if self.temperature <= 0:
            raise SettingsError(f"temperature is {self.temperature}; set it above 0 (0.1 is usual).")
        if self.learn_temperature and not low <= self.temperature <= high:
            raise SettingsError(
                f"temperature is {self.temperature}; where it is learned, start between {low} and {high}."
            )
        for name in ("warmup_steps", "compactness_warmup_steps", "free_bits"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; set it to 0 (off) or more.")
        self._check_estimator()
        if self.terms:
            self._check_something_acts()
        if self.token_budget is not None and not self.has_rates("understanding"):
            raise SettingsError(
                "token_budget ranks tokens by the rates of understanding, which nothing measures: set compactness or "
                "sufficiency on in that branch, with estimator variational."
            )

    def _check_estimator(self) -> None:
        inline = self.bottleneck == "inline"
        if self.estimator == "hsic" and inline:
            raise SettingsError("estimator hsic has no noise to put on the tokens; set bottleneck to projected.")
        for term in RIVALS if self.estimator == "hsic" else ():
            if term in self.terms:
                raise SettingsError(f"estimator hsic does not measure {term}; take it out of terms.")
        if self.shuffled_texts and (self.estimator == "hsic" or "alignment" not in self.terms):
            raise SettingsError(
                "shuffled_texts is a control of alignment by InfoNCE; set it with that term, or remove it."
            )
        if self.placebo and inline:
            raise SettingsError("bottleneck inline changes the model's own loss; a placebo needs bottleneck projected.")
        for branch in get_args(Branch):
            constrained = self.weights(branch).constrained
            if self.estimator == "hsic" and constrained:
                raise SettingsError("estimator hsic measures no bits or nats to limit; remove the budget or target.")
            if inline and constrained == "sufficiency":
                raise SettingsError(
                    f"{branch}.sufficiency_target_nats: with bottleneck inline sufficiency is the model's own loss and "
                    "is not measured; set rate_budget_bits instead."
                )
            if constrained and self.balance.share(branch, constrained):
                raise SettingsError(
                    f"{branch}: dual ascent finds the factor of {constrained}, so balance cannot set it as well; set "
                    f"balance.{branch}.{constrained} to null, or remove the budget or target."
                )

    def _check_something_acts(self) -> None:
        if not self.branches:
            raise SettingsError("branches is empty while terms are on; name a branch, or set terms to [].")
        if self.bottleneck == "inline" and "compactness" not in self.terms:
            raise SettingsError("bottleneck inline is noise priced by its rate; add compactness to terms.")
        for branch in self.branches if self.bottleneck == "inline" else ():
            acting = self.active_terms(branch)
            if acting and "compactness" not in acting:
                raise SettingsError(
                    f"{branch}: bottleneck inline is noise priced by its rate, and compactness is off in this branch; "
                    f"raise balance.{branch}.compactness, or take {branch} out of branches."
                )
        if {*self.terms} <= {*RIVALS} and "generation" not in self.branches:
            raise SettingsError(f"{', '.join(self.terms)}: this acts in generation only; add generation to branches.")
        if not any(self.active_terms(branch) for branch in self.branches):
            raise SettingsError(
                "every term that is on has weight 0; raise lambda_, alpha, beta or a share of balance, or set terms "
                "to [] for plain fine-tuning."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ObjectiveConfig":
        """The inverse of dataclasses.asdict, also for older runs; what is missing keeps its default."""
        return _built(cls, _with_current_names(values))

    def weights(self, branch: Branch) -> BranchWeights:
        """lambda, alpha, beta and what else one branch has of its own."""
        return self.understanding if branch == "understanding" else self.generation

    def warmup(self, term: Term, step: int) -> float:
        """The factor in [0, 1] by which a term has risen at a global step."""
        lengths = [self.warmup_steps, self.compactness_warmup_steps if term == "compactness" else 0]
        return min([1.0, *(step / length for length in lengths if length)])

    def negatives_from_data(self, branch: Branch) -> int:
        """How many texts per image alignment asks the data for in a branch."""
        aligned = self.estimator == "variational" and "alignment" in self.active_terms(branch)
        return self.negatives.from_data if aligned else 0

    def active_terms(self, branch: Branch) -> tuple[Term, ...]:
        """The terms that act in a branch: listed, the branch listed, and their weight (or share) not 0."""
        if branch not in self.branches:
            return ()

        def acts(term: Term) -> bool:
            if term in RIVALS and branch == "understanding":
                return False
            share, weights = self.balance.share(branch, term), self.weights(branch)
            return weights.lambda_ * weights.factor(term) > 0 if share is None else share > 0

        return tuple(term for term in self.terms if acts(term))

    def has_rates(self, branch: Branch) -> bool:
        """Whether a branch has a posterior with a variance, so that its tokens have rates."""
        return self.estimator == "variational" and bool({"compactness", "sufficiency"} & {*self.active_terms(branch)})

    def balanced_terms(self, branch: Branch) -> tuple[Term, ...]:
        """The terms of a branch whose weight `balance` finds. Inline, sufficiency is the model's own loss: no term."""
        terms = [term for term in self.active_terms(branch) if self.balance.share(branch, term) is not None]
        return tuple(term for term in terms if self.bottleneck == "projected" or term != "sufficiency")


def _with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an older run under today's names.

    There was one `weight` for both branches, now `lambda_` of each; and `multiplier` said what a `warmup_steps` above 0
    says.
    """
    current = dict(values)
    weight = current.pop("weight", None)
    if weight is not None:
        for branch in get_args(Branch):
            current[branch] = {**current.get(branch, {}), "lambda_": weight}
    current.pop("multiplier", None)
    return current


def _built(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of dataclasses from nested dicts."""
    types = get_type_hints(cls)
    known = {name: kind for name, hint in types.items() for kind in (hint, *get_args(hint)) if is_dataclass(kind)}
    parts = {name: _built(known[name], part) for name, part in values.items() if name in known and part is not None}
    return cls(**{**values, **parts})


def _checked_choices(name: str, given: object, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise SettingsError(f"{name} is {given!r}; give a list out of {list(known)}.")
    for choice in given:
        _refuse_unknown(name, choice, known)
    if len(set(given)) < len(given):
        raise SettingsError(f"{name} names something twice: {list(given)}; name each once.")
    return tuple(given)


def _refuse_unknown(name: str, choice: object, known: tuple[str, ...]) -> None:
    if choice not in known:
        raise SettingsError(f"{name}: {choice!r} is not known; choose out of {list(known)}.")
