"""Dropping tokens before the language model: the truth is the whole sequence in which nobody sees the dropped ones."""

import pytest
import torch

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from infotok_lit.scenes import Scenes
from tests.tiny import tiny_model

QUESTIONS = ["how many circles are there?", "what colour is the square?", "describe the image."]


@pytest.fixture(params=["harmon", "showo2", "openuni"])
def model(request):
    torch.manual_seed(3)
    return tiny_model(request.param).eval()


def batch_of(model, count=3):
    scenes = Scenes()
    return model.processor.understanding([scenes.sample("understanding", i) for i in range(count)])


def some_kept(model, tokens) -> torch.Tensor:
    """Another number of tokens in each row."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(tokens.shape[:2], generator=generator) < torch.tensor([[0.3], [0.6], [0.9]])
    kept[:, 0] = True
    return kept


def slots_of(model, kept) -> torch.Tensor:
    """Which image slots are kept: Harmon reads its buffers last, Show-o2 the time of an image first."""
    extras = model.num_extras["understanding"]
    always = [torch.ones(len(kept), 1, dtype=torch.bool)] if model.family == "showo2" else []
    return torch.cat([*always, kept[:, extras:], kept[:, :extras]], dim=1)


def hidden_behind_a_mask(model, ids, real, tokens, kept, shift=0) -> torch.Tensor:
    """Last hidden states (B, T, H) of whole sequences at their whole positions; no one sees what is dropped.

    Show-o2's positions of an image, counted from `shift` further right, see one another.
    """
    embeds = model.embed_with_images(ids, model.project_for_llm(tokens))
    slots, length = ids == IMAGE_TOKEN_ID, ids.shape[1]
    seen = real.bool().clone()
    seen[slots] &= slots_of(model, kept).flatten()
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(len(ids), -1, -1)
    if model.family == "showo2":
        inside = slots.roll(shift, 1)
        allowed = allowed | inside[:, None] & inside[:, :, None]
    mask = seen[:, None] & allowed | torch.eye(length, dtype=torch.bool)
    positions = torch.arange(length).expand(len(ids), -1)
    return model.text_body(inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions).last_hidden_state


@torch.no_grad()
def test_logits_of_answers_are_those_behind_a_mask(model) -> None:
    batch = batch_of(model)
    tokens = model.understood_tokens(batch.pixel_values)
    kept = some_kept(model, tokens)
    logits, wanted = model.answer_logits(batch, tokens, kept=kept)
    states = hidden_behind_a_mask(model, batch.input_ids, batch.attention_mask, tokens, kept)
    labelled = batch.labels[:, 1:] != IGNORE_INDEX
    torch.testing.assert_close(logits, model.language_model.lm_head(states[:, :-1][labelled]))
    assert torch.equal(wanted, batch.labels[:, 1:][labelled])


@torch.no_grad()
def test_dropping_tokens_changes_what_is_predicted(model) -> None:
    batch = batch_of(model)
    tokens = model.understood_tokens(batch.pixel_values)
    whole, _ = model.answer_logits(batch, tokens)
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(model.answer_logits(batch, tokens, kept=everything)[0], whole)
    assert not torch.allclose(model.answer_logits(batch, tokens, kept=some_kept(model, tokens))[0], whole, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("image_of", [None, [0, 0, 1, 2, 2, 2]])
def test_answers_are_those_behind_a_mask(model, image_of) -> None:
    tokens = model.understood_tokens(batch_of(model).pixel_values)
    kept = some_kept(model, tokens)
    questions = QUESTIONS if image_of is None else QUESTIONS * 2
    answers = model.describe_tokens(tokens, questions, 5, image_of=image_of, kept=kept)
    for question, answer, image in zip(questions, answers, image_of or range(3), strict=True):
        slots = model.project_for_llm(tokens).shape[1]
        ids, real = model.processor.understanding_prompts([question], num_image_tokens=slots)
        one = slice(image, image + 1)
        found = []
        for _ in range(5):
            states = hidden_behind_a_mask(model, ids, real, tokens[one], kept[one], model.seen_after_image)
            logits = model.language_model.lm_head(states[:, -1])
            found.append(logits.argmax(-1))
            ids, real = torch.cat([ids, found[-1][:, None]], 1), torch.cat([real, torch.ones(1, 1)], 1)
        assert answer == model.processor.decode(torch.stack(found, 1))[0]
