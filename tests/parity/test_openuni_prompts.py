"""The prompts of an OpenUni golden: training, drawing, redrawing and conversations, token by token."""

from copy import copy

import pytest
import torch
from golden import Golden
from openuni_replay import config_of, processor_of
from PIL import Image

from infotok_lit.batch import IMAGE_TOKEN_ID, GenerationSample, UnderstandingSample
from infotok_lit.models.openuni.processor import KEEP_PROMPT, OpenUniProcessor

IMAGE = Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def golden(openuni_golden: Golden) -> Golden:
    return openuni_golden


@pytest.fixture(scope="module")
def processor(golden: Golden) -> OpenUniProcessor:
    return processor_of(golden, config_of(golden))


def official(golden: Golden, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Our rows without padding, with the official id at image slots."""
    ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, golden.info["tokenizer"]["specials"]["<IMG_CONTEXT>"])
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def test_training_prompts(golden: Golden, processor: OpenUniProcessor) -> None:
    recorded = golden.info["strings"]["caption_dataset"]
    samples = [
        GenerationSample(IMAGE, caption, "", drop_prompt=draw < recorded["unconditional"])
        for caption, draw in zip(recorded["captions"], recorded["uniform_draws"], strict=True)
    ]
    batch = processor.generation(samples)
    assert official(golden, batch.input_ids, batch.attention_mask) == recorded["input_ids"]


def without_limit(processor: OpenUniProcessor) -> OpenUniProcessor:
    unlimited = copy(processor)
    unlimited.max_caption = None
    return unlimited


def test_long_captions_lose_their_end(golden: Golden, processor: OpenUniProcessor) -> None:
    recorded = golden.info["strings"]["caption_dataset_truncated"]
    ids, mask = without_limit(processor).generation_prompts([recorded["caption"]])
    # The official code cuts behind the template; ours cuts the caption (tests/models/test_long_texts.py).
    assert ids.shape[1] > recorded["n_ids"]
    assert ids[0, : recorded["n_ids"]][-len(recorded["last_ids"]) :].tolist() == recorded["last_ids"]


@pytest.mark.parametrize("name", ["reconstruct_dataset", "edit_dataset"])
def test_editing_prompts(golden: Golden, processor: OpenUniProcessor, name: str) -> None:
    recorded = golden.info["strings"][name]
    found = processor.editing_prompts([recorded["prompt"]])
    assert official(golden, *found) == [recorded["input_ids"]]
    assert golden.info["strings"]["reconstruct_dataset"]["prompt"] == KEEP_PROMPT


@pytest.mark.parametrize("name", ["prepare_text_conditions", "prepare_text_conditions_custom_negative"])
def test_generation_prompts(golden: Golden, processor: OpenUniProcessor, name: str) -> None:
    recorded = golden.info["strings"][name]
    ids, mask = processor.generation_prompts([recorded["prompt"]], negative=recorded["cfg_prompt"] or "")
    assert ids.tolist() == recorded["input_ids"]
    if "attention_mask" in recorded:
        assert mask.long().tolist() == recorded["attention_mask"]


def test_conversations(golden: Golden, processor: OpenUniProcessor) -> None:
    """With the image in front of a question, and where a marker puts it."""
    recorded = golden.info["strings"]["chat"]
    expected = [processor.tokenizer.encode(prompt) for prompt in recorded["prompts"]]
    assert official(golden, *processor.understanding_prompts(recorded["questions"])) == expected
    samples = [UnderstandingSample(IMAGE, question, "yes", "") for question in recorded["questions"]]
    batch = processor.understanding(samples)
    answer = [*b"yes", golden.info["tokenizer"]["specials"]["<|im_end|>"]]
    assert official(golden, batch.input_ids, batch.attention_mask) == [ids + answer for ids in expected]
    for row, ids in zip(batch.labels, expected, strict=True):
        assert row[len(ids) :][: len(answer)].tolist() == answer and (row >= 0).sum() == len(answer)


def test_a_question_about_two_images_is_refused(processor: OpenUniProcessor) -> None:
    with pytest.raises(ValueError, match="2 times <image>"):
        processor.understanding_prompts(["compare <image> and <image>"])
