"""How many bits about what a scene shows, and about its background, can be read off features of its image.

Structure is the objects: which places are taken, then shapes, colours and sizes. Texture is the background: the
frequencies of its waves, their phases, and the noise. Both are sums by the chain rule of mutual information over parts
whose distribution the generator fixes, so each sum is a lower bound on what the features hold; and as structure and
texture are independent, their total is a lower bound on I(Z; image).

Why texture is not -1/2 log2(1 - R^2) summed over the background's DCT components: that is a lower bound for Gaussian
components only. A few waves are far from Gaussian (12 numbers move hundreds of components together), and the formula
counts them many times over. It is used where it holds, for the noise.

Shapes: n scenes, k coordinates, C cells, W waves, s pixels per side.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from infotok_lit.metrics.probes import Bits, Split, calibrate, classify, coordinates, ridge
from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.prior import FACTORS, ScenePrior
from infotok_lit.scenes.render import MAX_FREQUENCY, NUM_WAVES, Texture, draw_texture
from infotok_lit.scenes.spec import COLOURS, SHAPES, SceneSpec

TEXTURE_PARTS = ("frequency", "phase", "noise")
"""In the order of the chain rule: phases given the frequencies, noise given the waves."""
NOISE_VARIANCE = 1 / 3
"""Of a number uniform in [-1, 1]."""
IMPOSSIBLE = -1e9


@dataclass(frozen=True)
class Truth:
    """What probes are asked about scenes of one family."""

    prior: ScenePrior
    scenes: list[Scene]
    textures: list[Texture]

    @classmethod
    def of(cls, scenes: list[Scene], spec: SceneSpec) -> "Truth":
        """The truth about scenes."""
        return cls(ScenePrior(spec), scenes, [draw_texture(spec.image_size, item.texture_seed) for item in scenes])


@dataclass(frozen=True)
class Features:
    """What is probed, in the order of the scenes."""

    values: Tensor
    """(n, F)."""
    local: Tensor | None = None
    """(n, h, w, d): those of the values that have a place in the image; None if none has."""
    present: Tensor | None = None
    """(n, h, w) bool: where there are any; None if everywhere."""


@dataclass(frozen=True)
class SceneInformation:
    """Bits per image, of FACTORS and of TEXTURE_PARTS, and their sums."""

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
        name: Bits.of(texture[:, i]) for i, name in enumerate(TEXTURE_PARTS)
    }
    total = Bits.of(structure.sum(1), surprise.sum(1), sum(entropies.values()))
    return SceneInformation(parts, total, Bits.of(texture.sum(1)))


# Structure


class StructureRatio:
    """log q(factor | Z) - log p(factor) of every factor, given those before it.

    Each cell has a logit for being taken, and logits for shapes, colours and sizes; the prior is added to all of them,
    so what a family never shows has no share.
    """

    def __init__(self, truth: Truth) -> None:
        prior = truth.prior
        factors = prior.factors(truth.scenes)
        self.place, self.shape, self.colour, self.size = (
            torch.from_numpy(getattr(factors, factor)) for factor in FACTORS
        )
        self.places = torch.from_numpy(prior.places).float()
        self.place_prior = torch.from_numpy(prior.place_log2).float() * math.log(2)
        allowed = torch.from_numpy(prior.allowed)
        self.shape_prior = _log(allowed.sum(2) / allowed.sum((1, 2))[:, None])
        self.colour_prior = _log(allowed / allowed.sum(2, keepdim=True).clamp(min=1))
        self.widths = (1, len(SHAPES), len(COLOURS), len(prior.spec.sizes))
        self.num_logits = self.places.shape[1] * sum(self.widths)

    def __call__(self, logits: Tensor, chosen: slice | Tensor) -> Tensor:
        """(m, num_logits) -> (m, FACTORS) nats."""
        per_cell = logits.unflatten(1, (self.places.shape[1], -1))
        taken, shape, colour, size = per_cell.split(self.widths, dim=2)
        true_shape = self.shape[chosen]
        present = true_shape >= 0
        cells = torch.arange(present.shape[1])
        colour_prior = self.colour_prior[cells, true_shape.clamp(min=0)]
        # An empty cell has no shape, and no colours that fit it; what is computed for it is not counted.
        colour_prior = torch.where(present[..., None], colour_prior, 0.0)
        per_object = [
            _log_ratio(shape, self.shape_prior, true_shape),
            _log_ratio(colour, colour_prior, self.colour[chosen]),
            _log_ratio(size, torch.zeros(size.shape[-1]), self.size[chosen]),
        ]
        place = _log_ratio(taken.squeeze(2) @ self.places.T, self.place_prior, self.place[chosen])
        return torch.stack([place, *((ratio * present).sum(1) for ratio in per_object)], dim=1)

    def surprise(self, chosen: slice) -> Tensor:
        """(m, FACTORS) nats: -log p(factor), given those before it, of the true ones."""
        shape, colour = self.shape[chosen], self.colour[chosen]
        present = shape >= 0
        cells = torch.arange(present.shape[1])
        per_object = [
            self.shape_prior[cells, shape.clamp(min=0)],
            self.colour_prior[cells, shape.clamp(min=0), colour.clamp(min=0)],
            torch.full(shape.shape, -math.log(self.widths[-1])),
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


# Texture


def texture_bits(inputs: Tensor, features: Features, truth: Truth, split: Split) -> Tensor:
    """(test scenes, TEXTURE_PARTS) bits: frequencies and phases are read off a linear reconstruction of the waves.

    Args:
        inputs: (n, k) coordinates of the features.
    """
    side = truth.prior.spec.image_size
    waves, noise = (
        torch.from_numpy(np.stack(images)).float()
        for images in ([item.waves() for item in truth.textures], [item.noise for item in truth.textures])
    )
    frequency, phase = (
        torch.from_numpy(np.stack(numbers))
        for numbers in ([item.frequency for item in truth.textures], [item.phase for item in truth.textures])
    )
    drawn = reconstruct(waves, side // 2, inputs, features, split)
    images = _from_spectrum(drawn, side)
    kept = side // 4
    predicted = reconstruct(noise, kept, inputs, features, split)
    parts = (
        frequency_nats(images, frequency, split),
        phase_nats(images, frequency, phase, split),
        noise_nats(predicted, _low(drawn, kept), _spectrum(waves, kept), _spectrum(noise, kept), split),
    )
    return torch.stack([part.float() for part in parts], dim=1) / math.log(2)


def reconstruct(images: Tensor, kept: int, inputs: Tensor, features: Features, split: Split) -> Tensor:
    """Images (n, s, s) -> linear predictions of their lowest DCT components, (n, kept^2).

    First each patch from the features at its place, by one map for all places, which a few scenes suffice to fit; then
    what is left from all features.
    """
    target = _spectrum(images, kept)
    near = torch.zeros_like(target) if features.local is None else _spectrum(patchwise(images, features, split), kept)
    return near + ridge(inputs, target - near, split)


def patchwise(images: Tensor, features: Features, split: Split) -> Tensor:
    """Images (n, s, s) -> predictions of every patch from the local features there; 0 where there are none.

    Raises:
        ValueError: the grid of the features does not divide the image.
    """
    count, height, width, depth = features.local.shape
    side = images.shape[1]
    if side % height or side % width:
        raise ValueError(f"features on a grid of {height} x {width} share no patches of {side} x {side} pixels")
    patch = (side // height, side // width)
    present = torch.ones(count, height, width, dtype=torch.bool) if features.present is None else features.present
    known = features.local[split.train][present[split.train]]
    # Where nothing is there is 0, also after centring: it is the mean of what is there.
    centred = torch.where(present[..., None], features.local - known.mean(0), 0.0)
    blocks = images.unflatten(2, (width, patch[1])).unflatten(1, (height, patch[0])).transpose(2, 3)
    places = height * width
    rows = coordinates(centred.flatten(0, 2), _scaled(split, places))
    predicted = ridge(rows, blocks.flatten(3).flatten(0, 2), _scaled(split, places))
    return predicted.unflatten(1, patch).unflatten(0, (count, height, width)).transpose(2, 3).reshape(images.shape)


def _scaled(split: Split, factor: int) -> Split:
    """The split of rows of which each sample has `factor`, one after another."""
    return Split(*(slice(factor * part.start, factor * part.stop) for part in split))


def frequency_nats(images: Tensor, frequency: Tensor, split: Split) -> Tensor:
    """(test scenes,): log q - log p of all W frequencies, which are uniform.

    q: each frequency is drawn on its own from a softmax over a grid of 2 s x 2 s cells, of a P + b log P for the power
    P of the reconstruction in a cell. That it cannot say which wave is which costs W log W nats at most.

    Args:
        images: (n, s, s) reconstructions of the waves.
        frequency: (n, 2, W) radians per pixel.
    """
    count = 2 * images.shape[1]
    edges = torch.linspace(-MAX_FREQUENCY, MAX_FREQUENCY, count + 1, dtype=torch.float64)
    centres = ((edges[1:] + edges[:-1]) / 2)[None, :]
    rows, columns = ((frequency[:, axis] - edges[0]) / (2 * MAX_FREQUENCY) * count for axis in (0, 1))
    cell = rows.long().clamp(0, count - 1) * count + columns.long().clamp(0, count - 1)
    spectrum = partial(_amplitude, rows=centres, columns=centres)

    def log_ratio(parameters: Tensor, power: Tensor, cells: Tensor) -> Tensor:
        logits = parameters[0] * power + parameters[1] * power.clamp(min=1e-6).log()
        return logits.log_softmax(1).gather(1, cells) + 2 * math.log(count)

    tune = spectrum(images[split.tune]).abs().square().flatten(1)
    found = calibrate(lambda parameters: log_ratio(parameters, tune, cell[split.tune]), (0.0, 0.0))
    pieces = zip(images[split.test].split(100), cell[split.test].split(100), strict=True)
    return torch.cat([log_ratio(found, spectrum(i).abs().square().flatten(1), c).sum(1) for i, c in pieces])


def phase_nats(images: Tensor, frequency: Tensor, phase: Tensor, split: Split) -> Tensor:
    """(test scenes,): log q - log p of all W phases given the frequencies; the phases are uniform.

    q: a von Mises distribution around the phase of the reconstruction at the wave's frequency, whose concentration is
    exp(a) m^b for the magnitude m there.

    Args:
        images: (n, s, s) reconstructions of the waves.
        frequency: (n, 2, W) radians per pixel.
        phase: (n, W) radians.
    """
    amplitude = _amplitude_at(images, frequency)
    magnitude, error = amplitude.abs().clamp(min=1e-6).log(), phase - amplitude.angle()

    def log_ratio(parameters: Tensor, chosen: slice) -> Tensor:
        concentration = torch.exp(parameters[0] + parameters[1] * magnitude[chosen])
        return concentration * (error[chosen].cos() - 1) - torch.special.i0e(concentration).log()

    found = calibrate(lambda parameters: log_ratio(parameters, split.tune), (0.0, 1.0))
    return log_ratio(found, split.test).sum(1)


def noise_nats(predicted: Tensor, drawn: Tensor, waves: Tensor, noise: Tensor, split: Split) -> Tensor:
    """(test scenes,): log q - log p of the noise's lowest DCT components given the waves, all (n, K).

    The components of independent uniform pixels are uncorrelated with equal variance, and Gaussian to a few thousandths
    of a bit in all for a sixteenth of them. q: Gaussians around one linear combination, the same for all components, of
    what is predicted from Z, of the reconstructed waves and of the true waves.
    """
    sources = torch.stack([predicted, drawn, waves], dim=-1).double()
    known, target = sources[split.tune].flatten(0, 1), noise[split.tune].flatten().double()
    weights = torch.linalg.lstsq(known.T @ known + 1e-9 * torch.eye(3), known.T @ target[:, None]).solution
    variance = (target - (known @ weights).squeeze(1)).square().mean()
    if variance >= NOISE_VARIANCE:
        return noise.new_zeros(len(noise[split.test]))
    error = noise[split.test] - (sources[split.test] @ weights).squeeze(-1)
    prior = noise[split.test].double().square() / NOISE_VARIANCE + math.log(NOISE_VARIANCE)
    return 0.5 * (prior - error.square() / variance - variance.log()).sum(1)


def _spectrum(images: Tensor, kept: int) -> Tensor:
    """(n, s, s) -> (n, kept^2): the lowest components of the orthonormal DCT."""
    return torch.from_numpy(dctn(images.numpy(), axes=(1, 2), norm="ortho")[:, :kept, :kept]).flatten(1)


def _from_spectrum(components: Tensor, side: int) -> Tensor:
    """(n, kept^2) -> (n, s, s) float64: the inverse of _spectrum."""
    kept = math.isqrt(components.shape[1])
    padded = np.zeros((len(components), side, side))
    padded[:, :kept, :kept] = components.unflatten(1, (kept, kept)).numpy()
    return torch.from_numpy(idctn(padded, axes=(1, 2), norm="ortho"))


def _low(components: Tensor, kept: int) -> Tensor:
    """(n, more^2) -> (n, kept^2): the lowest of the components."""
    return components.unflatten(1, (math.isqrt(components.shape[1]), -1))[:, :kept, :kept].flatten(1)


def _amplitude(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(n, s, s) -> (n, a, b) complex: amplitude and phase at each pair of frequencies (1 or n, a), (1 or n, b).

    A lone wave of the background has amplitude 1 at its own frequency, and its phase.
    """
    waves = [torch.exp(-1j * at[..., None] * (torch.arange(images.shape[1]) + 0.5)) for at in (rows, columns)]
    scale = 2j * NUM_WAVES**0.5 / images.shape[1] ** 2
    return scale * (waves[0] @ images.to(torch.complex128) @ waves[1].mT)


def _amplitude_at(images: Tensor, frequency: Tensor) -> Tensor:
    """(n, s, s), (n, 2, W) -> (n, W) complex: amplitude and phase at each wave's own frequency."""
    return _amplitude(images, frequency[:, 0], frequency[:, 1]).diagonal(dim1=1, dim2=2)
