from collections.abc import Iterator

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from infotok_lit.scenes.generator import Scene, SceneObject, Slot, draw_scene
from infotok_lit.scenes.grammar import parse_caption
from infotok_lit.scenes.parser import parse_image, score
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import SPECS, SceneSpec

SPEC = SPECS["scenes32"]
CORNERS = {"tl": (0, 0), "tr": (0, 1), "bl": (1, 0), "br": (1, 1)}


def draw(*objects: str) -> np.ndarray:
    """An image from words such as "large red circle tl"."""
    items = []
    for words in objects:
        size, colour, shape, corner = words.split()
        row, column = CORNERS[corner]
        items.append(SceneObject(shape, colour, size, (row, column), (8.3 + 16 * row, 7.6 + 16 * column)))
    return render(Scene(tuple(items), texture_seed=1), SPEC)


SHAPE_SPECS = sorted(set(SPECS) - {"garments32"})


def truths(spec: SceneSpec, count: int) -> Iterator[tuple[np.ndarray, list[tuple]]]:
    """Images, each with what it shows."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        scene = draw_scene(rng, spec, "val", [Slot()] * int(rng.integers(1, spec.max_objects + 1)))
        yield render(scene, spec), [(item.kind, item.colour, item.size, item.cell) for item in scene.objects]


@pytest.mark.parametrize("name", SHAPE_SPECS)
def test_error_rate_on_ground_truth_is_below_one_per_cent(name):
    """Whole images: nothing missed, nothing added, nothing mistaken."""
    found = [
        truth == [(item.kind, item.colour, item.size, item.cell) for item in parse_image(image, SPECS[name])]
        for image, truth in truths(SPECS[name], 500)
    ]
    assert np.mean(found) > 0.99


@pytest.mark.parametrize("name", ["scenes32", "scenes64"])
def test_rendered_area_and_colour_agree_with_geometry(name):
    spec = SPECS[name]
    middle = spec.cell_size / 2
    for size, fraction in (("small", 0.27), ("large", 0.39)):
        radius = fraction * spec.cell_size
        areas = {
            "circle": np.pi * radius**2,
            "square": (2 * 0.88 * radius) ** 2,
            "triangle": radius * 1.85 * radius,
            "cross": 2 * (2 * radius) * (0.64 * radius) - (0.64 * radius) ** 2,
        }
        for shape, area in areas.items():
            item = SceneObject(shape, "red", size, (0, 0), (middle + 0.2, middle - 0.3))
            image = render(Scene((item,), texture_seed=0), spec).astype(float)
            share = (image[..., 0] - image[..., 1]) / (225 - 25)  # red minus green vanishes on grey
            assert share.sum() == pytest.approx(area, rel=0.04)
            rows, columns = np.nonzero(share > 0.5)
            assert abs(np.ptp(columns) + 1 - 2 * radius * (0.88 if shape == "square" else 1)) < 2
            assert rows.max() < spec.cell_size and columns.max() < spec.cell_size


def test_parsed_objects_carry_their_truth():
    image = draw("small red triangle tl", "large blue cross br")
    first, second = parse_image(image, SPEC)
    assert (first.kind, first.colour, first.size, first.cell) == ("triangle", "red", "small", (0, 0))
    assert (second.kind, second.colour, second.size, second.cell) == ("cross", "blue", "large", (1, 1))
    assert first.centre == pytest.approx((8.3, 7.6), abs=0.5)
    assert second.centre == pytest.approx((24.3, 23.6), abs=0.5)
    assert min(first.confidence, second.confidence) > 0.8


def test_parser_survives_blur_and_noise():
    truth = ["large red circle tl", "small cyan square tr", "large purple triangle bl", "large yellow cross br"]
    image = gaussian_filter(draw(*truth).astype(float), (0.6, 0.6, 0))
    image += np.random.default_rng(0).normal(0, 15, image.shape)
    parsed = parse_image(np.clip(image, 0, 255).astype(np.uint8), SPEC)
    assert [f"{o.size} {o.colour} {o.kind}" for o in parsed] == [words.rsplit(" ", 1)[0] for words in truth]


def test_texture_alone_holds_no_object():
    assert parse_image(draw(), SPEC) == []
    noise = np.random.default_rng(0).normal(128, 40, (32, 32, 3))
    assert all(item.kind is None for item in parse_image(np.clip(noise, 0, 255).astype(np.uint8), SPEC))


def test_specks_are_dropped_and_strange_forms_not_recognised():
    image = draw()
    image[4:6, 4:6] = (225, 25, 30)
    image[20:23, 1:31] = (30, 60, 235)
    (bar,) = parse_image(image, SPEC)
    assert (bar.colour, bar.kind, bar.size) == ("blue", None, None)


def test_image_of_wrong_size_is_refused():
    with pytest.raises(ValueError, match="32"):
        parse_image(np.zeros((64, 64, 3), dtype=np.uint8), SPEC)


@pytest.mark.parametrize(
    ("caption", "objects", "expected"),
    [
        ("a circle", ["small green circle tr"], True),
        ("a circle", ["small green square tr"], False),
        ("a circle", [], False),
        ("a red circle", ["large red circle bl"], True),
        ("a red circle", ["large purple circle bl"], False),
        ("a red circle", ["large red square bl", "large blue circle tr"], False),
        ("a circle and a square", ["large red circle bl", "small red square tr"], True),
        ("a circle and a square", ["large red circle bl", "small red cross tr"], False),
        ("three circles", ["large red circle tl", "small red circle tr", "large cyan circle br"], True),
        ("two circles", ["large red circle tl", "small red circle tr", "large cyan circle br"], False),
        ("three circles", ["large red circle tl", "small red circle tr"], False),
        ("one circle", ["large red circle tl", "small red square tr"], True),
        ("a red circle left of a blue square", ["large red circle tl", "small blue square tr"], True),
        ("a red circle left of a blue square", ["small blue square tl", "large red circle tr"], False),
        ("a red circle right of a blue square", ["small blue square tl", "large red circle tr"], True),
        ("a red circle above a blue square", ["large red circle tl", "small blue square bl"], True),
        ("a red circle below a blue square", ["large red circle tl", "small blue square bl"], False),
        ("a red circle above a blue square", ["large red circle tl", "small blue square tr"], False),
        ("a red circle and a blue square", ["large red circle tl", "small blue square br"], True),
        ("a red circle and a blue square", ["large blue circle tl", "small red square br"], False),
        ("a red circle and a blue square", ["large red circle tl", "small green square br"], False),
        ("a blue square", ["small green square br"], False),
    ],
)
def test_score_accepts_right_scenes_and_rejects_wrong_ones(caption, objects, expected):
    assert score(draw(*objects), parse_caption(caption), SPEC) is expected
