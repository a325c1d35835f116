"""Many questions about one image: the answers of asking one by one, whatever the order."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, TINY_CONFIGS

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.answering import split_after_image
from infotok_lit.models.family import family as family_called

QUESTIONS = [
    "is there a red circle?",
    "how many?",
    "where is the small blue square?",
    "what colour is the triangle?",
    "is it?",
    "is there a red square?",
    "is there a red circle?",
    "is there",
]
IMAGE_OF = [0, 2, 0, 1, 2, 0, 0, 0]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    model = family_called(request.param).build(TINY_CONFIGS[request.param](0.0), str(SCENES_TOKENIZER))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            loud = name.startswith(("llm.", "vlm.", "project_in.", "encoder.fusion."))
            parameter.data += (1.0 if loud else 0.1) * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_answers_are_those_of_one_image_per_question(model, images, use_cache):
    alone = model.describe(images[IMAGE_OF], QUESTIONS, 8)
    assert len(set(alone)) > 2
    assert model.describe(images, QUESTIONS, 8, use_cache, image_of=IMAGE_OF) == alone


def test_the_official_shift_of_showo2_is_kept(images):
    torch.manual_seed(0)
    config = TINY_CONFIGS["showo2"](0.0)
    config = replace(config, prompts=replace(config.prompts, describing="official"))
    model = family_called("showo2").build(config, str(SCENES_TOKENIZER)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    alone = model.describe(images[IMAGE_OF], QUESTIONS, 8)
    assert len(set(alone)) > 1 and model.describe(images, QUESTIONS, 8, image_of=IMAGE_OF) == alone


def test_an_image_is_encoded_once(model, images, monkeypatch):
    seen = []
    # Show-o2 draws noise for its latents, so its images are encoded a step earlier.
    encode = "encode_images" if model.family == "showo2" else "understood_tokens"
    real = getattr(model, encode)
    monkeypatch.setattr(model, encode, lambda pixels, **more: seen.append(len(pixels)) or real(pixels, **more))
    model.describe(images, QUESTIONS, 2, image_of=IMAGE_OF)
    assert seen == [3]


def test_what_questions_about_an_image_begin_with_alike_is_read_once(model, images):
    asked = ["is there a red circle?", "is there a red square?", "is there a red circle?"]
    ids, _ = model.processor.understanding_prompts(asked, num_image_tokens=1)
    tails = [row[row.index(IMAGE_TOKEN_ID) :] for row in ids.tolist()]
    begins = {tuple(tail[:length]) for tail in tails for length in range(2, len(tail) + 1)}
    read = []
    hook = model.text_body.register_forward_pre_hook(
        lambda body, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with hook:
        model.describe(images[:1], asked, 1, image_of=[0, 0, 0])
    assert read[1:] == [(1, len(begins))] and len(begins) < sum(len(tail) - 1 for tail in tails)


def test_prompts_that_differ_before_the_image_share_nothing():
    ids = torch.tensor([[1, -200, -200, 5, 6], [1, -200, -200, 7, 0], [0, 2, -200, -200, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    shared = split_after_image(ids[:2], mask[:2])
    assert shared.prefix.tolist() == [1, -200, -200] and shared.questions == [[5, 6], [7]]
    assert split_after_image(ids, mask) is None
    # One more position would leave nothing of the second prompt.
    assert split_after_image(ids[:2], mask[:2], extra=1) is None
