"""How many bits about what no caption speaks of can be read off features of an image: the texture of a scene.

Its parts, in the order of the chain rule: which photograph of its kind each object is (given the structure), the
colours and places of distractors, the frequencies of the background's waves, their phases given the frequencies, and
the noise given the waves. Each is a lower bound; `probe.py` says why their sum is one too.

Why the background is not -1/2 log2(1 - R^2) summed over its DCT components: that is a lower bound for Gaussian
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
from torch.nn import functional as F

from infotok_lit.errors import SettingsError
from infotok_lit.metrics.probes import Split, calibrate, coordinates, ridge
from infotok_lit.scenes.garments import photograph, photographs_of
from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.prior import ScenePrior
from infotok_lit.scenes.render import (
    MAX_FREQUENCY,
    NUM_WAVES,
    Texture,
    distractor_shares,
    draw_distractors,
    draw_texture,
)
from infotok_lit.scenes.spec import COLOURS, GARMENTS, SceneSpec

NOISE_VARIANCE = 1 / 3
"""Of a number uniform in [-1, 1]."""
DESCRIPTOR = 24
"""Principal components of photographs that tell one from another."""
PLACES = 8
"""Distractors are looked for on a grid of so many places per axis."""


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


def texture_parts(spec: SceneSpec) -> tuple[str, ...]:
    """The parts that the texture of a family has."""
    own = (("photograph", spec.vocabulary is GARMENTS), ("distractors", spec.distractors > 0))
    return (*(name for name, there in own if there), "frequency", "phase", "noise")


def texture_bits(inputs: Tensor, features: Features, truth: Truth, split: Split) -> Tensor:
    """(test scenes, parts) bits: frequencies and phases are read off a linear reconstruction of the waves.

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
    spec = truth.prior.spec
    parts = (
        *([photograph_nats(inputs, truth, split)] if spec.vocabulary is GARMENTS else []),
        *([distractor_nats(inputs, truth, split)] if spec.distractors else []),
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
        SettingsError: the grid of the features does not divide the image.
    """
    count, height, width, depth = features.local.shape
    side = images.shape[1]
    if side % height or side % width:
        raise SettingsError(f"features on a grid of {height} x {width} share no patches of {side} x {side} pixels")
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


def photograph_nats(inputs: Tensor, truth: Truth, split: Split) -> Tensor:
    """(test scenes,): log q - log p of which photograph of its kind each object is; all are equally likely.

    q: a softmax over the photographs of the kind, of a <d, d_i> - b |d_i|^2 for the descriptor d_i of each and the
    linear prediction d of the shown one's. Descriptors are principal components of how photographs of a kind differ.
    """
    kinds = truth.prior.spec.vocabulary.kinds
    pools = {kind: _differences(kind) for kind in kinds}
    axes = torch.linalg.svd(torch.cat(list(pools.values())), full_matrices=False)[2][:DESCRIPTOR]
    pools = {kind: pool @ axes.T for kind, pool in pools.items()}
    rows, cells = len(truth.scenes), truth.prior.spec.cells
    target = torch.zeros(rows, cells**2, DESCRIPTOR)
    shown: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in kinds}
    for row, scene in enumerate(truth.scenes):
        for item in scene.objects:
            place, number = item.cell[0] * cells + item.cell[1], photographs_of(item.kind, "val").index(item.photograph)
            shown[item.kind].append((row, place, number))
            target[row, place] = pools[item.kind][number]
    predicted = ridge(inputs, target.flatten(1), split).view_as(target)
    where = {kind: torch.tensor(found).view(-1, 3) for kind, found in shown.items()}

    def log_ratio(parameters: Tensor, chosen: slice) -> Tensor:
        nats = torch.zeros(rows)
        for kind, pool in pools.items():
            row, place, number = where[kind][(where[kind][:, 0] >= chosen.start) & (where[kind][:, 0] < chosen.stop)].T
            logits = parameters[0] * predicted[row, place] @ pool.T - parameters[1] * pool.square().sum(1)
            ratio = logits.log_softmax(1).gather(1, number[:, None]).squeeze(1) + math.log(len(pool))
            nats = nats.index_add(0, row, ratio)
        return nats[chosen]

    found = calibrate(lambda parameters: log_ratio(parameters.float(), split.tune), (0.0, 0.0)).float()
    return log_ratio(found, split.test)


def _differences(kind: str) -> Tensor:
    """(m, pixels): the photographs of a kind that are never trained on, less their mean."""
    pool = np.stack([photograph(kind, number).reshape(-1) for number in photographs_of(kind, "val")]) / 255
    return torch.from_numpy(pool - pool.mean(0)).float()


def distractor_nats(inputs: Tensor, truth: Truth, split: Split) -> Tensor:
    """(test scenes,): log q - log p of the colours and places of all distractors, which are uniform.

    q: each is drawn on its own from a softmax over colours and a grid of places, of a M + b M^2 for the linear
    prediction M of how much of each colour lies at each place. That it cannot say which one is which costs
    count log count nats at most.
    """
    spec = truth.prior.spec
    drawn = [draw_distractors(spec.distractors, scene.texture_seed) for scene in truth.scenes]
    maps = torch.zeros(len(drawn), len(COLOURS), spec.image_size, spec.image_size)
    for row, blobs in enumerate(drawn):
        maps[row].index_add_(
            0, torch.from_numpy(blobs.colour), torch.from_numpy(distractor_shares(blobs, spec)).float()
        )
    maps = F.adaptive_avg_pool2d(maps, PLACES).flatten(1)
    predicted = ridge(inputs, maps - maps[split.train].mean(0), split)
    places = np.stack([np.minimum((blobs.centre * PLACES).astype(int), PLACES - 1) for blobs in drawn])
    colours = np.stack([blobs.colour for blobs in drawn])
    true = torch.from_numpy((colours * PLACES + places[..., 0]) * PLACES + places[..., 1])

    def log_ratio(parameters: Tensor, chosen: slice) -> Tensor:
        logits = parameters[0] * predicted[chosen] + parameters[1] * predicted[chosen].square()
        return (logits.log_softmax(1).gather(1, true[chosen]) + math.log(maps.shape[1])).sum(1)

    found = calibrate(lambda parameters: log_ratio(parameters, split.tune), (0.0, 0.0))
    return log_ratio(found, split.test)


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
