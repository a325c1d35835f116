"""How many bits about what a scene shows, and about what no caption speaks of, can be read off features of its image.

Structure is the objects: which places are taken, then kinds, colours and sizes. Texture is all the rest that the
generator draws: `texture_information.py` lists its parts. Both are sums by the chain rule of mutual information over
parts whose distribution the generator fixes, so each sum is a lower bound on what the features hold; and as every part
of the texture is independent of the structure, or drawn given it, their total is a lower bound on I(Z; image).

Shapes: n scenes, C cells.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infotok_lit.metrics.probes import Bits, Split, classify, coordinates
from infotok_lit.scenes.prior import FACTORS
from infotok_lit.scenes.spec import COLOURS
from infotok_lit.scenes.texture_information import Features, Truth, texture_bits, texture_parts

IMPOSSIBLE = -1e9


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


# Structure


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
