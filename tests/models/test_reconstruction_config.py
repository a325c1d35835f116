"""The settings of reconstruction alignment: which copy of an image is understood, and what is asked of it."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from infotok_lit.models.common.reconstruction import (
    DESCRIBE_TEMPLATES,
    RandomTemplates,
    ReconstructionConfig,
    choose_templates,
    condition_pixels,
    random_templates,
)


@pytest.mark.parametrize(
    ("side", "step", "expected"), [(432, 16, 224), (512, 16, 256), (32, 8, 16), (40, 8, 24), (512, 32, 256)]
)
def test_low_res_is_half_the_side_up_to_a_whole_token(side, step, expected) -> None:
    images = torch.rand(1, 3, side, side)
    assert condition_pixels(images, ReconstructionConfig(condition="low_res"), step).shape == (1, 3, expected, expected)
    given = ReconstructionConfig(condition="low_res", condition_size=48)
    assert condition_pixels(images, given, step).shape == (1, 3, 48, 48)


def test_blur_keeps_the_size_and_what_is_large() -> None:
    fine = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 3, 32, 32)
    coarse = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    config = ReconstructionConfig(condition="blur8")
    assert condition_pixels(fine, config, 8).abs()[..., 8:-8, 8:-8].max() < 0.05
    blurred = condition_pixels(coarse, config, 8)
    assert blurred.shape == coarse.shape
    torch.testing.assert_close(blurred[..., 8:-8], coarse[..., 8:-8], rtol=0, atol=0.02)


@pytest.mark.parametrize("condition", ["low_res", "blur8", "same_res"])
def test_one_colour_stays_one_colour(condition) -> None:
    images = torch.full((2, 3, 32, 32), 0.3)
    copies = condition_pixels(images, ReconstructionConfig(condition=condition), 8)
    torch.testing.assert_close(copies, torch.full_like(copies, 0.3))


def test_settings_lie_over_those_of_the_family() -> None:
    family = ReconstructionConfig(condition="low_res", gradient_scale=0.1, template_swap=0.1)
    assert ReconstructionConfig().over(family) == family
    given = ReconstructionConfig(gradient_scale=0.0, templates=["x"])
    assert given.over(family) == ReconstructionConfig("low_res", None, 0.0, 0.1, ("x",))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"condition": "small"}, "condition: 'small' is not one of"),
        ({"condition_size": 0}, "condition_size is 0"),
        ({"gradient_scale": 1.5}, "gradient_scale is 1.5; set it between 0 and 1"),
        ({"template_swap": -0.1}, "template_swap is -0.1"),
        ({"templates": []}, "at least one text"),
        ({"templates": ["a", ""]}, "none of them empty"),
    ],
)
def test_a_wrong_setting_is_refused(given, said) -> None:
    with pytest.raises(ValueError, match=said):
        ReconstructionConfig(**given)


def test_templates_are_many_and_none_is_repeated() -> None:
    assert len(set(DESCRIBE_TEMPLATES)) == len(DESCRIBE_TEMPLATES) >= 40
    lengths = [len(text) for text in DESCRIBE_TEMPLATES]
    assert min(lengths) < 20 and max(lengths) > 200
    assert all(text == text.strip() for text in DESCRIBE_TEMPLATES)


def test_draws_choose_templates() -> None:
    config = ReconstructionConfig(template_swap=0.1, templates=("a", "b", "c", "d"))
    draws = RandomTemplates(torch.tensor([0.0, 0.26, 0.5, 0.999, 0.3]), torch.tensor([0.1, 0.5, 0.9, 0.2, 0.09]))
    assert choose_templates(draws, config) == ["a", "b", "c", "d", ""]
    torch.manual_seed(0)
    chosen = choose_templates(random_templates(4000), config)
    for text, share in {"": 0.1, "a": 0.225, "b": 0.225, "c": 0.225, "d": 0.225}.items():
        assert abs(chosen.count(text) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_the_published_rate_of_harmon_ends_where_its_schedule_stands_after_a_tenth() -> None:
    """50,000 batches, 500 of them warm-up and the others a cosine to 0; four make an update, and 5,000 were taken."""
    configs = Path(__file__).parents[2] / "configs" / "harmon"
    config = yaml.safe_load((configs / "reca_official.yaml").read_text())
    optimiser, updates = config["model"]["init_args"]["optimiser"], config["trainer"]["max_steps"]
    assert (updates, optimiser["warmup_steps"]) == (5_000 // 4, 500 // 4)
    reached = 0.5 * (1 + math.cos(math.pi * (5_000 - 500) / (50_000 - 500)))
    assert optimiser["final_factor"] == pytest.approx(reached, abs=5e-4)
