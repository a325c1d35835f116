"""Garments: which photographs a split shows, how they are drawn, and how often their judge is right."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from infotok_lit.assets import GARMENT_JUDGE, GARMENT_PHOTOGRAPHS
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.garments import cut_out, photograph, photographs_of
from infotok_lit.scenes.generator import Scene, SceneObject
from infotok_lit.scenes.judge import GarmentJudge, shipped_judge
from infotok_lit.scenes.metrics import SceneScore, drawing_chance, parser_accuracy
from infotok_lit.scenes.parser import parse_image
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import GARMENTS, PALETTE, SPECS
from infotok_lit.scenes.train_judge import train_judge

SPEC = SPECS["garments32"]
ROUND_TRIPS = {"harmon": (8, 4), "showo2": (8, 4), "openuni": (4, 2)}
"""Block size and kept frequencies of the autoencoder of each family's scenes32."""


def lose_frequencies(block: int, kept: int, images: torch.Tensor) -> torch.Tensor:
    """What is left of images (B, 3, height, width) when their blocks keep the lowest frequencies alone."""
    count, colours, height, width = images.shape
    blocks = images.reshape(count, colours, height // block, block, width // block, block).numpy()
    spectrum = dctn(blocks, axes=(3, 5), norm="ortho")
    spectrum[:, :, :, kept:] = spectrum[..., kept:] = 0
    return torch.from_numpy(idctn(spectrum, axes=(3, 5), norm="ortho").reshape(images.shape))


def shown(split: str, count: int = 150) -> Iterator[tuple[str, bytes]]:
    """The photographs in scenes of a split."""
    source = Scenes("garments32", split)
    for index in range(count):
        for branch in ("understanding", "generation"):
            for item in source.draw(branch, index)[0].objects:
                yield item.kind, photograph(item.kind, item.photograph).tobytes()


def test_garments_of_the_test_set_are_never_trained_on():
    with np.load(GARMENT_PHOTOGRAPHS, allow_pickle=False) as file:
        train = {image.tobytes() for image in file["train_images"]}
        test = {image.tobytes() for image in file["test_images"]} - train
    assert {image for _, image in shown("train")} <= train
    for split in ("val", "held_out"):
        assert {image for _, image in shown(split)} <= test


def test_every_photograph_of_a_kind_may_be_shown():
    sizes = {kind: (len(photographs_of(kind, "train")), len(photographs_of(kind, "val"))) for kind in GARMENTS.kinds}
    one, two, four = (400, 100), (800, 200), (1600, 400)
    assert sizes == {"shirt": four, "trouser": one, "dress": one, "shoe": two, "boot": one, "bag": one}
    assert len({image for kind, image in shown("val", 800) if kind == "dress"}) > 80


def test_a_garment_is_its_tint_by_the_light_of_its_photograph():
    grey = photograph("dress", 3)
    covered, bright = cut_out(grey, 28, (14, 14), (28, 28))
    assert np.array_equal(covered > 0, grey > 0.06 * 255)
    expected = 0.35 + 0.65 * grey / 255
    assert np.abs(bright - expected)[covered > 0].max() < 1e-5
    # Half the size, and moved by whole pixels: each pixel is about the mean of four.
    small, _ = cut_out(grey, 14, (9, 8), (16, 16))
    means = covered.reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(small[2:16, 1:15] - means).mean() < 0.06
    assert np.abs(small.sum() - means.sum()) < 0.01 * means.sum()
    assert small[:2].sum() == 0 or np.abs(small[0]).max() < 0.05


@pytest.mark.parametrize("colour", PALETTE)
def test_a_garment_keeps_to_its_cell_and_its_hue(colour):
    item = SceneObject("shirt", colour, "large", (0, 1), (8.3, 23.7), photograph=0)
    image, empty = (render(Scene(items, 4), SPEC).astype(float) for items in ((item,), ()))
    changed = np.abs(image - empty).max(2)
    assert changed[:16, 16:].mean() > 20
    # Anti-aliasing may reach over the edge by a fraction of a pixel.
    assert changed.sum() - changed[:16, 16:].sum() < 0.01 * changed.sum()
    chroma = image - image.mean(2, keepdims=True)
    tint = np.array(PALETTE[colour]) - np.mean(PALETTE[colour])
    inside = np.linalg.norm(chroma, axis=2) > 40
    cosine = chroma[inside] @ tint / np.linalg.norm(chroma[inside], axis=1) / np.linalg.norm(tint)
    assert inside.sum() > 50 and cosine.min() > 0.99


# The judge


@pytest.mark.parametrize("family", [None, *ROUND_TRIPS])
def test_the_judge_is_right_about_nine_in_ten_unseen_garments(family):
    """Kind and colour of garments as they stand in scenes, after the family's autoencoder; the mean of the kinds."""
    round_trip = None if family is None else partial(lose_frequencies, *ROUND_TRIPS[family])
    assert parser_accuracy("garments32", round_trip, num_scenes=400) >= 0.9


def test_the_parser_of_shapes_is_right_about_nearly_all():
    for name in ("scenes32", "scenes32_hard"):
        assert parser_accuracy(name, num_scenes=100) > 0.99
    assert parser_accuracy("scenes32", torch.zeros_like, num_scenes=5) == 0


def test_no_garment_is_seen_where_none_is():
    for seed in range(30):
        assert parse_image(render(Scene((), seed), SPEC), SPEC) == []


def test_what_has_no_outlines_is_no_garment():
    """A model that has learnt colours alone draws such images: flat ones, cells of flat colours, noise."""
    rng = np.random.default_rng(0)
    tints = np.array([*PALETTE.values(), (0, 0, 0), (255, 255, 255), (127, 127, 127)])
    cells = tints[rng.integers(len(tints), size=(100, 2, 2))].repeat(16, 1).repeat(16, 2)
    flat = np.broadcast_to(rng.integers(256, size=(100, 1, 1, 3)), (100, 32, 32, 3))
    noise = rng.normal(127, 80, (100, 32, 32, 3)).clip(0, 255)
    for images in (cells, flat, noise):
        assert not any(parse_image(image.astype(np.uint8), SPEC) for image in images)


def test_the_judge_is_small_and_holds_numbers_only():
    assert GARMENT_JUDGE.stat().st_size <= 400_000
    assert sum(value.numel() for value in shipped_judge().parameters()) * 4 < 400_000


def test_training_the_judge_learns_colours_at_once():
    """A few steps of the command's training: the shipped weights need thousands."""
    judge = train_judge(steps=40, scenes=8)
    assert judge.state_dict().keys() == shipped_judge().state_dict().keys()
    scenes = Scenes("garments32", "val", question_kinds=("description",))
    found = {}
    for name, one in (("trained", judge), ("fresh", GarmentJudge().eval())):
        right = []
        for index in range(60):
            scene, _, _ = scenes.draw("understanding", index)
            cells = torch.from_numpy(render(scene, SPEC)).permute(2, 0, 1).float() / 127.5 - 1
            for item in scene.objects:
                top, left = 16 * item.cell[0], 16 * item.cell[1]
                _, colour = one(cells[None, :, top : top + 16, left : left + 16])
                right.append(list(PALETTE)[int(colour.argmax())] == item.colour)
        found[name] = np.mean(right)
    assert found["trained"] > 0.6 > found["fresh"]


# Scores


def test_true_images_score_as_their_judge_allows_and_other_captions_are_not_judged():
    source = Scenes("garments32", "val")
    samples = [source.sample("generation", index) for index in range(120)]
    images = torch.from_numpy(np.stack([np.asarray(sample.image) for sample in samples])).permute(0, 3, 1, 2)
    metric = SceneScore("garments32")
    metric.update(images / 127.5 - 1, [sample.caption for sample in samples])
    # Several garments must be right at once: 0.92^2 for two of them.
    assert metric.compute()["overall"] > 0.75
    assert metric.knows("a red shirt") and not metric.knows("a red circle") and not metric.knows("a photo")
    assert not SceneScore("scenes32").knows("a red shirt")
    with pytest.raises(ValueError, match="grammar of garments"):
        metric.update(images[:1] / 127.5 - 1, ["a red circle"])
    assert drawing_chance("garments32", num_scenes=60)["overall"] < 0.35
