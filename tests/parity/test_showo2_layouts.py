"""The layouts, cleaned images and outputs of a Show-o2 golden."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import Golden
from PIL import Image
from showo2_replay import RecordedTokenizer, config_of
from torch import Tensor

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, GenerationSample, UnderstandingSample
from infotok_lit.models.common.images import centre_crop, fit_on_square, to_pixels
from infotok_lit.models.showo2.family import PromptConfig
from infotok_lit.models.showo2.processor import Showo2Processor
from infotok_lit.models.showo2.sequence import find_regions
from infotok_lit.pictures import to_uint8


@pytest.fixture(scope="module")
def golden(showo2_golden: Golden) -> Golden:
    return showo2_golden


def processor(golden: Golden, **prompts: str) -> Showo2Processor:
    config = config_of(golden)
    arguments = golden.info["meta"]["layout_args"]
    chosen = PromptConfig(max_caption=arguments["max_text_len_gen"], **prompts)
    made = Showo2Processor(replace(config, prompts=chosen), RecordedTokenizer(golden))
    made.num_image_tokens = arguments["num_image_tokens"]
    return made


Layout = tuple[list[int], list[int]]
"""Ids and labels of one sequence."""


def check(golden: Golden, name: str, layout: Layout) -> None:
    """Compare one of our sequences, padded as the official code pads, with the recorded one."""
    case, ids = f"j_layout/{name}", golden.info["config"]["ids"]
    length = len(golden.output(case, "text_tokens"))
    official = torch.full((length,), ids["pad_id"])
    labels = torch.full((length,), IGNORE_INDEX)
    official[: len(layout[0])] = torch.tensor(layout[0])
    labels[: len(layout[1])] = torch.tensor(layout[1])
    is_slot = official == IMAGE_TOKEN_ID
    regions = golden.output(case, "modality_positions")
    found = find_regions(official.unsqueeze(0))[0]
    assert torch.equal(found, regions[: len(found)]) and not regions[len(found) :].any()
    official[is_slot] = ids["img_pad_id"]
    golden.check(case, "text_tokens", official)
    golden.check(case, "text_labels", labels)
    golden.check(case, "image_masks", is_slot.long())
    golden.check(case, "text_masks", (~is_slot & (official != ids["pad_id"])).long())


def row(batch: tuple[Tensor, Tensor]) -> Layout:
    """The only sequence of a batch, without labels."""
    return batch[0][0].tolist(), [IGNORE_INDEX] * batch[0].shape[1]


def test_drawing(golden: Golden) -> None:
    made = processor(golden)
    prompts = golden.info["config"]["t2i_prompts"]
    check(golden, "t2i", row(made.generation_prompts(prompts[:1])))
    check(golden, "t2i_dropped", row(made.generation_prompts([""])))


def test_a_dropped_prompt_of_a_training_sample_is_the_unconditional_one(golden: Golden) -> None:
    image, prompt = Image.new("RGB", (8, 8)), golden.info["config"]["t2i_prompts"][0]
    made = processor(golden)
    made.tokenizer.calls[prompt] = []
    samples = [GenerationSample(image, prompt, "kept"), GenerationSample(image, prompt, "dropped", drop_prompt=True)]
    batch = made.generation(samples)
    expected, _ = made.generation_prompts([prompt, ""])
    assert torch.equal(batch.input_ids, expected)
    assert batch.captions == [prompt, prompt]


def test_generation_prompts(golden: Golden) -> None:
    ids, _ = processor(golden).generation_prompts(golden.info["config"]["t2i_prompts"], negative="")
    img_pad = golden.info["config"]["ids"]["img_pad_id"]
    official = ids.masked_fill(ids == IMAGE_TOKEN_ID, img_pad)
    for half, suffix in zip(official.chunk(2), ("", "_null"), strict=True):
        recorded = golden.output("j_layout/gen_prompt", f"text_tokens{suffix}")
        pad = golden.info["config"]["ids"]["pad_id"]
        assert torch.equal(half, recorded[:, : half.shape[1]]) and (recorded[:, half.shape[1] :] == pad).all()
        regions = golden.output("j_layout/gen_prompt", f"modality_positions{suffix}")
        assert torch.equal(find_regions(half.masked_fill(half == img_pad, IMAGE_TOKEN_ID)), regions)


@pytest.mark.parametrize(
    ("reading", "name", "text"), [("caption", "caption", "cap"), ("pretraining", "mmu_pretraining", "a")]
)
def test_reading_without_a_question(golden: Golden, reading: str, name: str, text: str) -> None:
    sample = UnderstandingSample(Image.new("RGB", (8, 8)), "", golden.info["config"]["mmu"][text], "")
    check(golden, name, processor(golden, reading=reading).example(sample, []))


def test_chat(golden: Golden) -> None:
    made, mmu = processor(golden), golden.info["config"]["mmu"]
    question = made.tokenizer.encode(f"\n{mmu['q']}")
    turns = [
        (question, made.tokenizer.encode(mmu["a"])),
        (made.tokenizer.encode("and why ?"), made.tokenizer.encode(mmu["cap"])),
    ]
    check(golden, "mmu_tuning", made.chat(turns, made.num_image_tokens))
    length = len(golden.output("j_layout/mmu_tuning_truncated", "text_tokens"))
    check(golden, "mmu_tuning_truncated", made.chat(turns, made.num_image_tokens, length))
    alone = [(made.tokenizer.encode(mmu["q"]), turns[0][1])]
    check(golden, "mmu_tuning_noimage", made.chat(alone, slots=0))


def test_a_sample_to_read_is_the_first_turn_of_a_chat(golden: Golden) -> None:
    made, mmu = processor(golden, describing="training"), golden.info["config"]["mmu"]
    found = made.example(UnderstandingSample(Image.new("RGB", (8, 8)), mmu["q"], mmu["a"], ""), [])
    ids, labels = (
        golden.output("j_layout/mmu_tuning", f"text_{name}")[: len(found[0])] for name in ("tokens", "labels")
    )
    official = ids.masked_fill(ids == golden.info["config"]["ids"]["img_pad_id"], IMAGE_TOKEN_ID)
    assert found == (official.tolist(), labels.tolist())
    asked, _ = made.understanding_prompts([mmu["q"]])
    assert asked[0].tolist() == official[: asked.shape[1]].tolist() and (labels[: asked.shape[1]] < 0).all()


def test_the_official_script_asks_so(golden: Golden) -> None:
    made = processor(golden, describing="official")
    ids, _ = made.understanding_prompts([golden.info["config"]["mmu"]["q"]])
    before, after = (golden.output("i_gen", f"text_tokens_{part}")[0].tolist() for part in "ab")
    slots = [IMAGE_TOKEN_ID] * made.num_image_tokens
    assert ids[0].tolist() == [*before, after[0], *slots, *after[1:]]


def test_interleaved(golden: Golden) -> None:
    made, mmu = processor(golden), golden.info["config"]["mmu"]
    img_pad = golden.info["config"]["ids"]["img_pad_id"]
    texts = [made.tokenizer.encode(mmu[name]) for name in ("cap", "a")]
    check(golden, "interleaved", made.interleaved([], texts, made.num_image_tokens, img_pad))
    one = [made.tokenizer.encode(mmu["q"])]
    check(golden, "interleaved_one", made.interleaved([], one, made.num_image_tokens, img_pad))


def test_the_prefix_of_a_story_is_not_predicted(golden: Golden) -> None:
    made = processor(golden)
    ids, labels = made.interleaved([1, 2], [[3], [4]], slots=2, slot_label=9)
    start, end = made.image_start, made.image_end
    image = [start, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, end]
    assert ids == [made.start, 1, 2, 3, *image, 4, *image, made.end_id]
    seen = [start, 9, 9, end]
    assert labels == [made.start, -100, -100, 3, *seen, 4, *seen, made.end_id]


def test_images(golden: Golden) -> None:
    image = Image.fromarray(golden.input("p_image", "rgb_uint8").numpy())
    golden.check("p_image", "t2i_transform_16", to_pixels(centre_crop(image, 16), 16))
    golden.check("p_image", "t2i_transform_24_upscaled", to_pixels(centre_crop(image, 24), 24))
    fitted = fit_on_square(image, 16)
    golden.check("p_image", "resize_pad_16_uint8", torch.from_numpy(np.array(fitted)))
    golden.check("p_image", "resize_pad_16", to_pixels(fitted, 16))


def test_pixels_that_are_written(golden: Golden) -> None:
    """The official code truncates where ours rounds: a difference of at most one."""
    ours = torch.from_numpy(to_uint8(golden.input("p_image", "denorm_in"))).int()
    recorded = golden.output("p_image", "denorm_uint8").int()
    assert ours.shape == recorded.shape and (ours - recorded).abs().max() <= 1
