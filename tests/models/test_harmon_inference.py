"""Describing and drawing: caches, batches and seeds change nothing that they should not."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_harmon

from infotok_lit.data.scenes import Scenes

QUESTIONS = ["how many circles are there?", "what?", "is the red circle left of the blue square?"]
CAPTIONS = ["a red circle", "two blue squares and nothing else at all", "a cross"]


@pytest.fixture(scope="module")
def model():
    model = tiny_harmon()
    torch.manual_seed(1)
    # Loud enough for answers to depend on the image and the question.
    for parameter in model.llm.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def images(model):
    source = Scenes(split="val")
    samples = [source.sample("understanding", i, None) for i in range(3)]
    return model.processor.understanding(samples).pixel_values


@torch.no_grad()
def greedy_without_cache(model, image, question: str, steps: int) -> list[int]:
    """Recompute everything for every token, one image alone, no padding."""
    latents, grid = model.encode_images(image.unsqueeze(0))
    visual = model.project_for_reading(model.encoder(latents, grid))
    ids, _ = model.processor.prompts_with_image([question])
    embeds = model.embed_with_images(ids, visual)
    answer: list[int] = []
    for _ in range(steps):
        token = int(model.llm(inputs_embeds=embeds).logits[0, -1].argmax())
        answer.append(token)
        if token == model.processor.end_id:
            break
        embeds = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return answer


def test_answers_in_a_batch_are_those_without_cache_or_padding(model, images) -> None:
    expected = [
        model.processor.decode(torch.tensor([greedy_without_cache(model, image, question, 8)]))[0]
        for image, question in zip(images, QUESTIONS, strict=True)
    ]
    assert len(set(expected)) > 1, "a model that always says the same cannot tell rows apart"
    assert model.describe(images, QUESTIONS, max_new_tokens=8) == expected


def test_an_image_depends_on_its_own_seed_and_prompt_alone(model) -> None:
    together = model.generate(CAPTIONS, seed=3)
    for i, caption in enumerate(CAPTIONS):
        alone = model.generate([caption], seed=3 + i)
        torch.testing.assert_close(alone[0], together[i], atol=2e-4, rtol=0)
    assert torch.equal(together, model.generate(CAPTIONS, seed=3))
    assert not torch.equal(together, model.generate(CAPTIONS, seed=4))


def test_any_grid_and_more_iterations_than_places(model) -> None:
    drawing = replace(model.config.drawing, iterations=30)
    picture = model.generate(CAPTIONS[:1], seed=0, drawing=drawing, image_size=(16, 24))
    assert picture.shape == (1, 3, 16, 24)
    assert torch.isfinite(picture).all()


def test_a_size_that_is_no_whole_number_of_tokens_is_refused(model) -> None:
    with pytest.raises(ValueError, match="33 x 32 is not a multiple of 8"):
        model.generate(CAPTIONS[:1], seed=0, image_size=(33, 32))


@torch.no_grad()
def test_the_text_cache_changes_nothing(model) -> None:
    ids, mask = model.processor.prompts_to_draw(CAPTIONS, unconditional=True)
    cache = model.text_cache(ids, mask)
    for visible in ([], [3], [0, 7, 12]):
        places = torch.tensor(visible, dtype=torch.int64).expand(len(ids), -1)
        tokens = model.encoder(torch.randn(len(ids), 16, model.latent_width), (4, 4), places)
        expected = model.condition_on_text(tokens, ids, mask)
        torch.testing.assert_close(model.condition_on_cache(tokens, cache, mask), expected, atol=1e-5, rtol=1e-5)


def test_guidance_of_one_is_the_conditional_model(model) -> None:
    """Without guidance the unconditional prompt is not even encoded."""
    drawing = replace(model.config.drawing, guidance=1.0)
    calls = []
    original = model.processor.prompts_to_draw

    def watched(prompts, unconditional):
        calls.append(unconditional)
        return original(prompts, unconditional)

    model.processor.prompts_to_draw = watched
    try:
        assert model.generate(CAPTIONS, seed=0, drawing=drawing).shape[0] == len(CAPTIONS)
    finally:
        model.processor.prompts_to_draw = original
    assert calls == [False]


def test_long_and_odd_prompts(model, images) -> None:
    prompts = ["", "x" * 10_000, "what? 🙂 日本"]
    assert len(model.describe(images, prompts, max_new_tokens=2)) == 3
