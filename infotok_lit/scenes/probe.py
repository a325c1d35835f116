"""What the shared tokens of a model hold about Scenes, by probes: bits of structure and bits of texture.

Structure is the objects: which places are taken, then kinds, colours and sizes. Texture is all the rest that the
generator draws: `texture_information.py` lists its parts. Both are sums by the chain rule of mutual information over
parts whose distribution the generator fixes, so each sum is a lower bound on what the tokens hold; and as every part
of the texture is independent of the structure, or drawn given it, their total is a lower bound on I(Z; image).

Shapes: n scenes, C cells, B images, N tokens, d their width.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from infotok_lit.batch import BRANCHES, Batch, Branch, BranchOutput, GenerationSample, Processor, TokenLayout
from infotok_lit.errors import SettingsError
from infotok_lit.metrics.probes import Bits, Split, classify, coordinates
from infotok_lit.scenes.prior import FACTORS
from infotok_lit.scenes.source import Scenes
from infotok_lit.scenes.spec import COLOURS, SpecName
from infotok_lit.scenes.texture_information import Features, Truth, texture_bits, texture_parts
from infotok_lit.seeding import isolated_rng, seed_of

TOKENS, MEAN_TOKEN, POSTERIOR_MEAN, POSTERIOR_SAMPLE = "tokens", "mean token", "posterior mean", "posterior sample"
FEATURES = (TOKENS, MEAN_TOKEN, POSTERIOR_MEAN, POSTERIOR_SAMPLE)
SCENES_SEED = 20_000
"""Added to the seed, so that the probes' scenes are none that a validation has seen."""

IMPOSSIBLE = -1e9
"""The logarithm of no chance at all."""

Progress = Callable[[float, str], None]
"""(share done, what is being done) -> None."""


# From features to bits


@dataclass(frozen=True)
class SceneInformation:
    """Bits per image, of FACTORS and of the family's `texture_parts`, and their sums."""

    parts: dict[str, Bits]
    structure: Bits
    texture: Bits


def scene_information(
    features: Features, truth: Truth, split: Split, hidden: int = 0, seed: int = 0
) -> SceneInformation:
    """Lower bounds on I(features; part of the scene), measured on the test scenes.

    Args:
        hidden: width of the structure probe's hidden layer; 0 for a linear one.
    """
    inputs = coordinates(features.values, split)
    ratio = StructureRatio(truth)
    structure = classify(inputs, ratio, ratio.num_logits, split, hidden, seed) / math.log(2)
    surprise, entropies = ratio.surprise(split.test) / math.log(2), truth.prior.entropy_bits()
    texture = texture_bits(inputs, features, truth, split)
    parts = {name: Bits.of(structure[:, i], surprise[:, i], entropies[name]) for i, name in enumerate(FACTORS)} | {
        name: Bits.of(texture[:, i]) for i, name in enumerate(texture_parts(truth.prior.spec))
    }
    total = Bits.of(structure.sum(1), surprise.sum(1), sum(entropies.values()))
    return SceneInformation(parts, total, Bits.of(texture.sum(1)))


class StructureRatio:
    """log q(factor | Z) - log p(factor) of every factor, given those before it.

    Each cell has a logit for being taken, and logits for kinds, colours and sizes; the prior is added to all of them,
    so what a family never shows has no share.
    """

    def __init__(self, truth: Truth) -> None:
        prior = truth.prior
        factors = prior.factors(truth.scenes)
        self.place, self.kind, self.colour, self.size = (
            torch.from_numpy(getattr(factors, factor)) for factor in FACTORS
        )
        self.places = torch.from_numpy(prior.places).float()
        self.place_prior = torch.from_numpy(prior.place_log2).float() * math.log(2)
        allowed = torch.from_numpy(prior.allowed)
        self.kind_prior = _log(allowed.sum(2) / allowed.sum((1, 2))[:, None])
        self.colour_prior = _log(allowed / allowed.sum(2, keepdim=True).clamp(min=1))
        self.widths = (1, len(prior.spec.vocabulary.kinds), len(COLOURS), len(prior.spec.sizes))
        self.num_logits = self.places.shape[1] * sum(self.widths)

    def __call__(self, logits: Tensor, chosen: slice | Tensor) -> Tensor:
        """(m, num_logits) -> (m, FACTORS) nats."""
        per_cell = logits.unflatten(1, (self.places.shape[1], -1))
        taken, kind, colour, size = per_cell.split(self.widths, dim=2)
        true_kind = self.kind[chosen]
        present = true_kind >= 0
        cells = torch.arange(present.shape[1])
        colour_prior = self.colour_prior[cells, true_kind.clamp(min=0)]
        # An empty cell has no kind, and no colours that fit it; what is computed for it is not counted.
        colour_prior = torch.where(present[..., None], colour_prior, 0.0)
        per_object = [
            _log_ratio(kind, self.kind_prior, true_kind),
            _log_ratio(colour, colour_prior, self.colour[chosen]),
            _log_ratio(size, torch.zeros(size.shape[-1]), self.size[chosen]),
        ]
        place = _log_ratio(taken.squeeze(2) @ self.places.T, self.place_prior, self.place[chosen])
        return torch.stack([place, *((ratio * present).sum(1) for ratio in per_object)], dim=1)

    def surprise(self, chosen: slice) -> Tensor:
        """(m, FACTORS) nats: -log p(factor), given those before it, of the true ones."""
        kind, colour = self.kind[chosen], self.colour[chosen]
        present = kind >= 0
        cells = torch.arange(present.shape[1])
        per_object = [
            self.kind_prior[cells, kind.clamp(min=0)],
            self.colour_prior[cells, kind.clamp(min=0), colour.clamp(min=0)],
            torch.full(kind.shape, -math.log(self.widths[-1])),
        ]
        place = self.place_prior[self.place[chosen]]
        return -torch.stack([place, *(torch.where(present, log, 0.0).sum(1) for log in per_object)], dim=1)


def _log_ratio(logits: Tensor, log_prior: Tensor, truth: Tensor) -> Tensor:
    """log softmax(logits + log prior)[truth] - log prior[truth]; classes are last, and -1 reads the first of them."""
    log_prior = log_prior.expand_as(logits).log_softmax(-1)
    ratio = (logits + log_prior).log_softmax(-1) - log_prior
    return ratio.gather(-1, truth.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _log(chance: Tensor) -> Tensor:
    return torch.where(chance > 0, chance.clamp(min=1e-9).log(), IMPOSSIBLE).float()


# From a model to features


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe.

    Args:
        scenes: The family of scenes: `scenes32`, `scenes64`, `scenes32_hard` or `garments32`.
        train: How many scenes fit the probes.
        test: How many other scenes measure them.
        hidden: Width of the hidden layer of the probes of the objects; 0 for linear ones.
        batch_size: Scenes that the model sees at a time. Harmon hides the same share of all images of a batch, so few
            large batches see few shares, and the standard errors leave that out.
        seed: Decides the scenes and all random numbers.
        texture: Strength of the scenes' background; None for the family's own. It should be that of the data which the
            model was trained on: what tokens hold of a background depends on how faint it is.
        jitter: The most pixels that an object moves from its cell's centre; None for the family's own.

    Raises:
        SettingsError: too few scenes, or a number that Scenes refuses.
    """

    scenes: SpecName = "scenes32"
    train: int = 1500
    test: int = 500
    hidden: int = 0
    batch_size: int = 50
    seed: int = 0
    texture: float | None = None
    jitter: float | None = None

    def __post_init__(self) -> None:
        if self.train < 50 or self.test < 2:
            raise SettingsError(f"probes need 50 scenes to train and 2 to test, not {self.train} and {self.test}")
        if self.hidden < 0 or self.batch_size < 1 or self.seed < 0:
            raise SettingsError("probes: batch_size must be at least 1, and hidden and seed not negative")
        self.source()

    def source(self) -> Scenes:
        """The scenes to probe with, of the split `val`, whose distribution is known exactly."""
        return Scenes(
            self.scenes,
            "val",
            self.train + self.test,
            SCENES_SEED + self.seed,
            self.texture,
            self.jitter,
            question_kinds=("description",),
        )


@dataclass(frozen=True)
class ProbeRow:
    """What one kind of features of one branch holds."""

    branch: Branch
    features: str
    """One of FEATURES."""
    rate_bits: float | None
    """Bits per image: what a posterior sample cannot exceed; None for features without noise."""
    information: SceneInformation

    def to_dict(self) -> dict[str, Any]:
        """In primitives."""
        named = {"branch": self.branch, "features": self.features, "rate_bits": self.rate_bits}
        return named | asdict(self.information)


class Posterior(Protocol):
    """A distribution of tokens, (B, N, d)."""

    mean: Tensor

    def rsample(self) -> Tensor:
        """(B, N, d): one draw."""

    def kl(self) -> Tensor:
        """(B, N, d): its rate in nats."""


@dataclass(frozen=True)
class ProbedModel:
    """What probes need of a model, which is in evaluation mode.

    Args:
        processor: makes its batches.
        device: where it is.
        forward: one forward pass of a branch, of a batch that lies on the CPU, without gradients.
        posterior: of the shared tokens (B, N, D) of a branch; None where there is none.
    """

    processor: Processor
    device: torch.device
    forward: Callable[[Branch, Batch], BranchOutput]
    posterior: Callable[[Branch, Tensor], Posterior | None] = lambda branch, tokens: None


def collect(
    model: ProbedModel, branch: Branch, source: Scenes, options: ProbeOptions, progress: Progress
) -> tuple[dict[str, Features], float | None]:
    """One branch's features of all scenes by name, and the rate of its posterior in bits per image."""
    found: dict[str, list[Tensor]] = {}
    rates = []
    for number, batch in enumerate(batches(model.processor, branch, source, options.batch_size)):
        progress(number * options.batch_size / len(source), f"{branch}: tokens")
        with torch.no_grad(), isolated_rng(seed_of(options.seed, number), model.device):
            output = model.forward(branch, batch)
            mean_token = output.tokens.float().mean(1, keepdim=True)
            features = {TOKENS: on_canvas(output, output.tokens), MEAN_TOKEN: mean_token}
            posterior = model.posterior(branch, output.tokens)
            if posterior is not None:
                features[POSTERIOR_MEAN] = on_canvas(output, posterior.mean)
                features[POSTERIOR_SAMPLE] = on_canvas(output, posterior.rsample())
                rates.append(posterior.kl().sum((1, 2)) / math.log(2))
        for name, values in features.items():
            # A tensor of inference mode could not train a probe; a copy from outside of it can.
            found.setdefault(name, []).append(values.cpu().clone())
    rate = torch.cat(rates).mean().item() if rates else None
    side = source.spec.image_size
    return {name: _features(torch.cat(values), output.layout, side) for name, values in found.items()}, rate


def measure(
    model: ProbedModel,
    options: ProbeOptions = ProbeOptions(),
    progress: Progress = lambda done, what: None,
    kinds: Collection[str] = FEATURES,
) -> list[ProbeRow]:
    """Probe both branches of a model.

    To be called where gradients are computed, for the probes are trained.

    Args:
        progress: told how far it is.
        kinds: which of FEATURES to probe; those of a posterior are there if the model has one.
    """
    source = options.source()
    truth = Truth.of([source.draw("understanding", index)[0] for index in range(len(source))], source.spec)
    split = Split.of(options.train, options.test)
    rows = []
    for start, branch in enumerate(BRANCHES):
        found, rate = collect(model, branch, source, options, _part(progress, start / 2, 1 / 4))
        collected = {name: features for name, features in found.items() if name in kinds}
        for number, (name, features) in enumerate(collected.items()):
            progress(start / 2 + (1 + number / len(collected)) / 4, f"{branch}: {name}")
            information = scene_information(features, truth, split, options.hidden, options.seed)
            rows.append(ProbeRow(branch, name, rate if name == POSTERIOR_SAMPLE else None, information))
    progress(1.0, "")
    return rows


def on_canvas(output: BranchOutput, values: Tensor) -> Tensor:
    """(B, N, d) of the present tokens -> (B, places, d + 1) float32: 0 at hidden places; last, which are present."""
    width = values.shape[2] + 1
    present = torch.cat([values, torch.ones_like(values[..., :1])], dim=2).float()
    canvas = present.new_zeros(len(values), output.layout.num_tokens, width)
    return canvas.scatter(1, output.token_index.unsqueeze(2).expand(-1, -1, width), present)


def _features(values: Tensor, layout: TokenLayout, side: int) -> Features:
    """(n, places, d + 1) as on_canvas gives them, or (n, 1, d) of a mean token -> features.

    Local features are those of a grid whose places are whole patches of the image, as in every model made for Scenes.
    """
    height, width = layout.grid
    if values.shape[1] != layout.num_tokens or not height * width or side % height or side % width:
        return Features(values.flatten(1))
    placed = values[:, layout.num_extra :].unflatten(1, layout.grid)
    return Features(values.flatten(1), placed[..., :-1], placed[..., -1] > 0)


def batches(processor: Processor, branch: Branch, source: Scenes, size: int) -> Iterator[Batch]:
    """The same scenes for both branches: to read, with their description as answer; to draw, with it as caption."""
    for first in range(0, len(source), size):
        samples = [source.sample("understanding", index) for index in range(first, min(first + size, len(source)))]
        if branch == "understanding":
            yield processor.understanding(samples)
        else:
            yield processor.generation([GenerationSample(s.image, s.answer, s.name) for s in samples])


def _part(progress: Progress, start: float, share: float) -> Progress:
    return lambda done, what: progress(start + share * done, what)
