"""Probes on synthetic features whose information is known: near it from below, and never above it beyond chance."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.special import i0e
from torch import Tensor

from infotok_lit.metrics.probes import Bits, Split, classify, coordinates, ridge
from infotok_lit.scenes.garments import photograph, photographs_of
from infotok_lit.scenes.prior import ScenePrior
from infotok_lit.scenes.probe import SceneInformation, scene_information
from infotok_lit.scenes.render import background, distractor_shares, draw_distractors
from infotok_lit.scenes.source import Scenes
from infotok_lit.scenes.spec import SPECS
from infotok_lit.scenes.texture_information import (
    Features,
    Truth,
    distractor_nats,
    frequency_nats,
    patchwise,
    phase_nats,
    photograph_nats,
)

TRAIN, TEST = 800, 600
SPLIT = Split.of(TRAIN, TEST)
COUNT = TRAIN + TEST


@pytest.fixture(scope="module")
def truth() -> Truth:
    source = Scenes("scenes32", "val", COUNT, seed=7, question_kinds=("description",))
    return Truth.of([source.draw("understanding", index)[0] for index in range(COUNT)], source.spec)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_hot(truth: Truth, *names: str) -> Tensor:
    """(n, F): the named factors of each cell as they are; 0 for an empty cell."""
    factors = truth.prior.factors(truth.scenes)
    values = [torch.from_numpy(getattr(factors, name)) for name in names]
    return torch.cat([torch.nn.functional.one_hot(value + 1, 7)[..., 1:].flatten(1) for value in values], 1).float()


def measured(features: Tensor, truth: Truth) -> SceneInformation:
    return scene_information(Features(features), truth, SPLIT)


def assert_bound(found: Bits, information: float, slack: float) -> None:
    assert information - slack <= found.mean <= information + 4 * found.error + 1e-3


# Probes


@pytest.mark.parametrize("hidden", [0, 16])
def test_an_erasure_channel_keeps_its_share_of_the_entropy(hidden):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (COUNT,), generator=random)
    kept = torch.rand(COUNT, generator=random) < 0.7
    features = torch.nn.functional.one_hot(labels, 4).float() * kept[:, None]

    def ratio(logits: Tensor, chosen: slice | Tensor) -> Tensor:
        return logits.log_softmax(1).gather(1, labels[chosen][:, None]) + math.log(4)

    nats = classify(coordinates(features, SPLIT), ratio, 4, SPLIT, hidden)
    assert_bound(Bits.of(nats[:, 0] / math.log(2)), 0.7 * 2, slack=0.15)


def test_ridge_recovers_a_linear_map_and_gives_up_on_noise():
    features = noise(COUNT, 5)
    target = features @ noise(5, 3, seed=1)
    predicted = ridge(coordinates(features, SPLIT), target - target[SPLIT.train].mean(0), SPLIT)
    torch.testing.assert_close(predicted, target - target[SPLIT.train].mean(0), atol=0.01, rtol=0.01)
    unrelated = ridge(coordinates(features, SPLIT), noise(COUNT, 40, seed=2), SPLIT)
    assert unrelated.square().mean() < 0.01


def test_a_control_variate_takes_out_luck_and_keeps_the_mean():
    luck = noise(500) + 3
    with_luck, without = Bits.of(luck + 1), Bits.of(luck + 1, luck, entropy=3.0)
    assert without.mean == pytest.approx(4.0, abs=1e-4) and without.error < 1e-3 < with_luck.error


def test_constant_features_are_left_out():
    features = torch.cat([torch.full((COUNT, 3), 7.0), noise(COUNT, 2)], 1)
    assert coordinates(features, SPLIT).shape == (COUNT, 2)
    assert coordinates(features[:, :3], SPLIT).abs().max() == 0


# Structure


def test_features_that_hold_all_factors_hold_the_entropy_of_the_scene(truth):
    found = measured(one_hot(truth, "kind", "colour", "size"), truth)
    entropies = truth.prior.entropy_bits()
    assert_bound(found.structure, sum(entropies.values()), slack=0.2)
    for name, bits in entropies.items():
        assert_bound(found.parts[name], bits, slack=0.1)
    assert abs(found.texture.mean) < 4 * found.texture.error + 0.02


def test_features_that_hold_colours_hold_places_and_what_colours_say_of_shapes(truth):
    """I = H(places) + H(colours | places), by counting; colours and shapes depend on each other by what is held out."""
    prior = ScenePrior(SPECS["scenes32"])
    occupied = np.exp2(prior.place_log2) @ prior.places
    colours = prior.allowed.sum(1) / prior.allowed.sum((1, 2))[:, None]
    information = prior.entropy_bits()["place"] + occupied @ -(colours * np.log2(colours)).sum(1)
    found = measured(one_hot(truth, "colour"), truth)
    assert_bound(found.structure, information, slack=0.4)
    assert found.parts["size"].mean < 0.05


def test_features_of_noise_hold_nothing(truth):
    found = measured(noise(COUNT, 30), truth)
    for bits in (*found.parts.values(), found.structure, found.texture):
        assert abs(bits.mean) <= 4 * bits.error + 0.02


# Texture


def test_a_gaussian_channel_of_the_noise_carries_its_capacity(truth):
    kept, ratio = 8, 2.0
    images = np.stack([texture.noise for texture in truth.textures])
    components = torch.from_numpy(dctn(images, axes=(1, 2), norm="ortho")[:, :kept, :kept]).float().flatten(1)
    features = components + (1 / 3 / ratio) ** 0.5 * noise(COUNT, kept**2)
    found = measured(features, truth)
    # A linear map of 64 features from 640 scenes errs by about a tenth more than the best one.
    assert_bound(found.parts["noise"], kept**2 / 2 * math.log2(1 + ratio), slack=kept**2 / 2 * math.log2(1.12))
    assert abs(found.structure.mean) < 0.1 and abs(found.parts["phase"].mean) < 0.1


@pytest.mark.parametrize("texture", [0.0, 0.1, 0.6])
def test_the_strength_of_the_texture_decides_what_a_noisy_camera_sees_of_it(texture, truth):
    """Backgrounds as rendered, in Gaussian noise; given the waves, each component of theirs is a Gaussian channel."""
    kept, camera = 8, 15.0
    images = np.stack([background(32, texture, scene.texture_seed) for scene in truth.scenes])
    components = torch.from_numpy(dctn(images, axes=(1, 2), norm="ortho")[:, :kept, :kept]).float().flatten(1)
    found = measured(components + camera * noise(COUNT, kept**2), truth)
    capacity = kept**2 / 2 * math.log2(1 + (127.5 * texture * 0.4 / camera) ** 2 / 3)
    # A map from so few scenes finds most of it, not all.
    assert_bound(found.parts["noise"], capacity, slack=0.4 * capacity)
    if texture == 0:
        assert abs(found.texture.mean) < 0.05


def test_knowing_the_waves_uncovers_the_noise_beneath_them(truth):
    """Features are the background itself: the chain rule subtracts the true waves, and what is left is the noise."""
    images = np.stack([0.6 * texture.waves() + 0.4 * texture.noise for texture in truth.textures])
    components = torch.from_numpy(dctn(images, axes=(1, 2), norm="ortho")[:, :16, :16]).float().flatten(1)
    assert measured(components, truth).parts["noise"].mean > 64


def test_local_features_are_read_by_one_map_for_all_places(truth):
    """Too many features for so few scenes as a whole, and easy place by place."""
    images = torch.from_numpy(np.stack([texture.waves() for texture in truth.textures])).float()
    patches = images.unflatten(2, (4, 8)).unflatten(1, (4, 8)).transpose(2, 3).flatten(3)
    local = torch.cat([patches @ noise(64, 32), noise(COUNT, 4, 4, 96, seed=1)], 3)
    split, rows = Split.of(100, 200), slice(0, 300)
    few = Truth.of(truth.scenes[rows], truth.prior.spec)
    near = scene_information(Features(local[rows].flatten(1), local[rows]), few, split)
    far = scene_information(Features(local[rows].flatten(1)), few, split)
    assert near.texture.mean > 15 and near.texture.mean > 2 * far.texture.mean


def test_patches_without_features_are_predicted_by_nothing(truth):
    images = torch.from_numpy(np.stack([texture.waves() for texture in truth.textures])).float()
    local = images.unflatten(2, (4, 8)).unflatten(1, (4, 8)).transpose(2, 3).flatten(3)
    present = torch.rand(COUNT, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    predicted = patchwise(images, Features(local.flatten(1), local, present), SPLIT)
    seen = present.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(predicted[seen], images[seen], atol=0.05, rtol=0)
    assert predicted[~seen].abs().max() < 1e-6
    with pytest.raises(ValueError, match="3 x 3 share no patches of 32 x 32"):
        patchwise(images, Features(local.flatten(1), local[:, :3, :3]), SPLIT)


def waves_in_noise(sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Single waves (n, 32, 32) in white noise, with their frequencies (n, 2, 1) and phases (n, 1)."""
    random = np.random.default_rng(0)
    frequency = random.uniform(-np.pi / 2, np.pi / 2, (COUNT, 2, 1))
    phase = random.uniform(0, 2 * np.pi, (COUNT, 1))
    grid = np.arange(32) + 0.5
    waves = np.sin(frequency[:, :1] * grid[:, None] + frequency[:, 1:] * grid + phase[:, :, None])
    images = waves + sigma * random.standard_normal(waves.shape)
    return torch.from_numpy(images), torch.from_numpy(frequency), torch.from_numpy(phase)


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_a_phase_in_white_noise_has_its_known_information(sigma):
    """Given the frequency, the sufficient statistic is a complex Gaussian with mean e^(i phase): the posterior is von
    Mises with concentration precision * |statistic|; I = E log q / p over draws of that channel."""
    images, frequency, phase = waves_in_noise(sigma)
    found = Bits.of(phase_nats(images, frequency, phase, SPLIT) / math.log(2))
    random, precision = np.random.default_rng(1), 32**2 / 2 / sigma**2
    draws = 1 + (random.standard_normal(200_000) + 1j * random.standard_normal(200_000)) / precision**0.5
    concentration = precision * np.abs(draws)
    information = np.mean(concentration * (np.cos(np.angle(draws)) - 1) - np.log(i0e(concentration))) / math.log(2)
    assert_bound(found, information, slack=0.1 + 4 * found.error)


def test_a_frequency_in_white_noise_has_at_most_the_information_of_its_exact_posterior():
    """The exact posterior on a fine grid, phases integrated out: exp(-energy / 2 s^2) I0(|correlation| / s^2)."""
    sigma = 6.0
    images, frequency, phase = waves_in_noise(sigma)
    found = Bits.of(frequency_nats(images, frequency, SPLIT) / math.log(2))
    grid, fine = np.arange(32) + 0.5, 128
    centres = (np.arange(fine) + 0.5) / fine * np.pi - np.pi / 2
    waves = np.exp(-1j * centres[:, None] * grid)
    log_ratios = []
    for image, true in zip(images[SPLIT.test].numpy(), frequency[SPLIT.test].numpy(), strict=True):
        at = np.exp(-1j * true[0] * grid) @ image @ np.exp(-1j * true[1] * grid)
        score = _log_i0(np.abs(waves @ image @ waves.T) / sigma**2)
        # The energy of a wave hardly depends on its frequency, and cancels.
        log_ratios.append(_log_i0(np.abs(at) / sigma**2) - np.log(np.mean(np.exp(score - score.max()))) - score.max())
    exact = np.mean(log_ratios) / math.log(2)
    assert exact > 5
    assert 0.7 * exact < found.mean < exact + 4 * found.error


def _log_i0(value: np.ndarray) -> np.ndarray:
    return np.log(i0e(value)) + value


# Photographs and distractors


def truth_of(spec: str) -> Truth:
    source = Scenes(spec, "val", COUNT, seed=7, question_kinds=("description",))
    return Truth.of([source.draw("understanding", index)[0] for index in range(COUNT)], source.spec)


def test_features_that_hold_the_photographs_hold_their_entropy_and_noisy_ones_less():
    """Which of its kind each garment is: log2 of how many there are, summed over the garments."""
    truth = truth_of("garments32")
    pictures = torch.zeros(COUNT, 4, 28 * 28)
    for row, scene in enumerate(truth.scenes):
        for item in scene.objects:
            image = torch.from_numpy(photograph(item.kind, item.photograph)).flatten() / 255.0
            pictures[row, 2 * item.cell[0] + item.cell[1]] = image
    entropy = np.mean(
        [sum(math.log2(len(photographs_of(item.kind, "val"))) for item in scene.objects) for scene in truth.scenes]
    )
    few = torch.linalg.svd(pictures.flatten(0, 1), full_matrices=False)[2][:40].T
    clear = (pictures @ few).flatten(1)

    def found(sigma: float) -> Bits:
        inputs = coordinates(clear + sigma * noise(COUNT, 160), SPLIT)
        return Bits.of(photograph_nats(inputs, truth, SPLIT) / math.log(2))

    assert 0.5 * entropy < found(0.0).mean <= entropy
    assert 0.1 < found(2.0).mean < found(0.0).mean - 1
    assert abs(found(50.0).mean) < 0.2


def test_features_that_hold_the_distractors_hold_bits_of_them_and_never_more_than_there_are():
    truth = truth_of("scenes32_hard")
    spec = truth.prior.spec
    drawn = [draw_distractors(spec.distractors, scene.texture_seed) for scene in truth.scenes]
    maps = torch.zeros(COUNT, 6, 32, 32)
    for row, blobs in enumerate(drawn):
        for colour, share in zip(blobs.colour, distractor_shares(blobs, spec), strict=True):
            maps[row, colour] += torch.from_numpy(share)
    assert maps.min() >= 0 and maps.sum(1).max() <= spec.contrast + 1e-6
    features = maps.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean((3, 5)).flatten(1)
    held, nothing = (
        Bits.of(distractor_nats(coordinates(values, SPLIT), truth, SPLIT) / math.log(2))
        for values in (features, noise(COUNT, 30))
    )
    assert 10 < held.mean < spec.distractors * math.log2(6 * 64)
    assert abs(nothing.mean) < 0.2


def test_the_parts_of_a_family_are_reported_and_summed():
    parts = {"scenes32": (), "scenes32_hard": ("distractors",), "garments32": ("photograph",)}
    for spec, own in parts.items():
        truth = truth_of(spec)
        few = Truth.of(truth.scenes[:120], truth.prior.spec)
        found = scene_information(Features(noise(120, 8)), few, Split.of(100, 20))
        names = (*own, "frequency", "phase", "noise")
        assert tuple(found.parts) == ("place", "kind", "colour", "size", *names)
        assert found.texture.mean == pytest.approx(sum(found.parts[name].mean for name in names), abs=1e-3)
