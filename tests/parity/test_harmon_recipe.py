"""Schedules, images, texts and optimiser groups of a Harmon golden."""

import numpy as np
import pytest
import torch
from golden import SINGLE_PASS, Golden
from harmon_replay import (
    ByteTokenizer,
    build,
    config_of,
)
from PIL import Image
from torch import Tensor

from infotok_lit.batch import GenerationSample, UnderstandingSample
from infotok_lit.models.common.images import crop_to_square, pad_to_square, to_pixels
from infotok_lit.models.harmon.diffusion import make_schedule
from infotok_lit.models.harmon.model import KEYS, Harmon
from infotok_lit.models.harmon.processor import HarmonProcessor


@pytest.fixture(scope="module")
def golden(harmon_golden: Golden) -> Golden:
    return harmon_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> Harmon:
    return build(golden)


@pytest.mark.parametrize(("name", "respacing"), [("train", None), ("gen100", "100"), ("gen5", "5"), ("ddim5", "ddim5")])
def test_schedule(golden: Golden, name: str, respacing: str | None) -> None:
    schedule = make_schedule(respacing)
    assert torch.equal(schedule.timesteps, golden.output("schedule", f"{name}_timestep_map"))
    for table, ours in {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
    }.items():
        torch.testing.assert_close(ours, golden.output("schedule", f"{name}_{table}"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_image_geometry(golden: Golden, shape: str) -> None:
    size = golden.argument("data_image", "image_size")
    image = Image.fromarray(golden.input("data_image", f"{shape}_uint8").numpy().astype(np.uint8))
    golden.check("data_image", f"{shape}_und", to_pixels(pad_to_square(image), size))
    free = abs(image.size[0] - image.size[1])
    offset = (int(golden.input("data_image", f"{shape}_crop_offset")) + 0.5) / (free + 1)
    golden.check("data_image", f"{shape}_gen", to_pixels(crop_to_square(image, offset), size), SINGLE_PASS)


def test_text_to_image_prompts(golden: Golden) -> None:
    case = "data_text"
    image = Image.new("RGB", (16, 16))
    caption = golden.argument(case, "t2i_caption")
    processor = HarmonProcessor(config_of(golden), ByteTokenizer())
    samples = [GenerationSample(image, caption, "a"), GenerationSample(image, caption, "b", drop_prompt=True)]
    batch = processor.generation(samples)
    golden.check(case, "t2i_collated_input_ids", batch.input_ids)
    golden.check(case, "t2i_collated_attention_mask", batch.attention_mask)
    golden.check(case, "t2i_input_ids", batch.input_ids[0, : int(batch.attention_mask[0].sum())])
    golden.check(case, "t2i_uncond_input_ids", batch.input_ids[1, : int(batch.attention_mask[1].sum())])
    # The official code cuts a long prompt behind its template; ours cuts the caption (tests/models/test_long_texts.py).
    golden.check(case, "t2i_trunc_input_ids", batch.input_ids[0, : golden.argument(case, "t2i_max_length")])


def test_image_to_text_prompts(golden: Golden) -> None:
    case = "data_text"
    sample = UnderstandingSample(
        Image.new("RGB", (16, 16)), golden.argument(case, "question"), golden.argument(case, "caption"), "a"
    )
    processor = HarmonProcessor(config_of(golden), ByteTokenizer())
    processor.num_image_tokens = golden.argument(case, "image_length")
    batch = processor.understanding([sample])
    golden.check(case, "i2t_input_ids", batch.input_ids[0])
    golden.check(case, "i2t_labels", batch.labels[0])
    golden.check(case, "i2t_collated_input_ids", torch.stack([batch.input_ids[0], cut_row(golden)]))
    # As above: the official code may cut an answer off, and ours does not.
    length = len(golden.output(case, "i2t_trunc_input_ids"))
    golden.check(case, "i2t_trunc_input_ids", batch.input_ids[0, :length])
    golden.check(case, "i2t_trunc_labels", batch.labels[0, :length])


def cut_row(golden: Golden) -> Tensor:
    """The truncated row as the official collate padded it (right, with the end-of-turn id)."""
    row, length = golden.output("data_text", "i2t_trunc_input_ids"), len(golden.output("data_text", "i2t_input_ids"))
    return torch.cat([row, torch.full((length - len(row),), ByteTokenizer.markers["<|im_end|>"])])


def test_optimiser_groups(golden: Golden, model: Harmon) -> None:
    groups = {"decay": set(), "no_decay": set()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "decay" if model.decays(name, parameter) else "no_decay"
            groups[group].add(KEYS.official_name(name))
    unused = {"mar.class_emb.weight"}
    tied = {"llm.lm_head.weight"}
    assert groups["no_decay"] == set(golden.info["param_groups"]["no_decay"])
    assert groups["decay"] - tied == set(golden.info["param_groups"]["decay"]) - unused - tied
