"""Reading and drawing with Harmon, beside what test_inference.py tests of every family."""

from dataclasses import replace

import pytest
import torch
from loud import CAPTIONS, NEW_TOKENS, PROMPTS, loud_model
from torch import Tensor

from infotok_lit.models.common.language_model import places_where
from infotok_lit.models.harmon.model import Harmon


@pytest.fixture(scope="module")
def model() -> Harmon:
    return loud_model("harmon")


@pytest.fixture
def answers(model, monkeypatch):
    """describe(images, prompts) -> answer ids up to the end of the turn."""
    end = model.processor.end_id

    def up_to_end(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(end)] if end in row else row for row in ids.tolist()]

    monkeypatch.setattr(model.processor, "decode", up_to_end)
    return lambda images, prompts: model.describe(images, prompts, NEW_TOKENS)


def loop_without_cache(model: Harmon, image: Tensor, prompt: str, penalty: float = 1.0) -> list[int]:
    """One image alone, the whole sequence anew for each token, the most likely one taken."""
    with torch.no_grad():
        latents, grid = model.latent_tokens(image[None])
        visual = model.project_for_llm(model.encoder(latents, grid))
        start, _ = model.processor.understanding_prompts([prompt], visual.shape[1])
        answer: list[int] = []
        for _ in range(NEW_TOKENS):
            ids = torch.cat([start, torch.tensor([answer], dtype=torch.int64)], dim=1)
            logits = model.llm(inputs_embeds=model.embed_with_images(ids, visual), use_cache=False).logits[0, -1]
            for used in set(answer):
                logits[used] = logits[used] / penalty if logits[used] > 0 else logits[used] * penalty
            chosen = int(logits.argmax())
            if chosen == model.processor.end_id:
                break
            answer.append(chosen)
    return answer


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_the_key_value_cache_changes_nothing(model, images, answers, monkeypatch, penalty) -> None:
    monkeypatch.setattr(model, "config", replace(model.config, repetition_penalty=penalty))
    expected = [
        loop_without_cache(model, image, prompt, penalty) for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert answers(images, PROMPTS) == expected


def test_an_image_of_another_size_is_read(model, answers) -> None:
    wide = torch.rand(1, 3, 16, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert answers(wide, PROMPTS[:1]) == [loop_without_cache(model, wide[0], PROMPTS[0])]


def test_long_and_odd_prompts(model, images) -> None:
    prompts = ["", "x" * 1000, "what? \N{SLIGHTLY SMILING FACE} \u65e5\u672c", " "]
    assert len(model.describe(images, prompts, max_new_tokens=2)) == 4
    assert draw(model, ["", "x" * 10_000, prompts[2]], iterations=1).isfinite().all()


# Drawing


def draw(model: Harmon, captions: list[str], seed: int = 5, size: tuple[int, int] | None = None, **drawing) -> Tensor:
    return model.generate(captions, seed, replace(model.config.sampling, **drawing), size)


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (64, 8)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_any_grid(model, size, guidance) -> None:
    picture = draw(model, CAPTIONS[:2], size=size, guidance=guidance)
    assert picture.shape == (2, 3, *size)
    assert picture.isfinite().all() and picture.std() > 0


def test_without_guidance_no_unconditional_prompt_is_encoded(model, monkeypatch) -> None:
    rows = []
    original = model.text_cache
    monkeypatch.setattr(model, "text_cache", lambda ids: rows.append(len(ids)) or original(ids))
    for guidance in (1.0, 3.0):
        draw(model, CAPTIONS, guidance=guidance, iterations=1)
    assert rows == [3, 6]


def test_more_rounds_than_places_add_nothing(model) -> None:
    """With as many rounds as places each round draws one; any more have nothing left to draw."""
    assert torch.equal(draw(model, CAPTIONS[:1], iterations=40), draw(model, CAPTIONS[:1], iterations=16))
    assert not torch.equal(draw(model, CAPTIONS[:1], iterations=8), draw(model, CAPTIONS[:1], iterations=16))


def test_cached_prompts_change_nothing(model) -> None:
    """Twice from one cache: a round must leave the cache as it found it."""
    random = torch.Generator().manual_seed(2)
    ids, mask = model.processor.generation_prompts(CAPTIONS, negative="")
    assert not mask.all()
    with torch.no_grad():
        cache = model.text_cache(ids)
        for num_visible in (3, 16, 0):
            hidden = torch.ones(len(ids), 16, dtype=torch.bool)
            hidden[:, :num_visible] = False
            latents = torch.randn(len(ids), 16, model.latent_width, generator=random)
            tokens = model.encoder(latents, (4, 4), places_where(~hidden, num_visible))
            torch.testing.assert_close(
                model.condition_on_cache(tokens, cache, mask),
                model.condition_on(tokens, model.text_embedding(ids), mask),
                rtol=1e-4,
                atol=1e-4,
            )


def test_conditioning_does_not_depend_on_padding(model) -> None:
    ids, mask = model.processor.generation_prompts(CAPTIONS)
    tokens = torch.randn(3, 18, model.token_widths["generation"], generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = model.condition_on(tokens, model.text_embedding(ids), mask)
        for i, caption in enumerate(CAPTIONS):
            ids, mask = model.processor.generation_prompts([caption])
            alone = model.condition_on(tokens[i : i + 1], model.text_embedding(ids), mask)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
